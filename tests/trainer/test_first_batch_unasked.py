"""Losses that no cut of the first batch can tell about are not refused: random ones, and rows that belong together."""

import logging

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_gradutils import GradUtilsTrainer
from hf_gradutils.errors import LossUnitError
from tests.harness.gradients import relative_error
from tests.harness.heads import collate
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, make_model, train

TOLERANCE = 1e-5


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "hf_gradutils.loss_unit"]


# ---- Losses that cannot be asked ----


class RandomTimesteps(torch.nn.Module):
    """Draws a level of noise for every row in every forward, as diffusion models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(torch.nn.Embedding(48, 8), torch.nn.Linear(8, 8))

    def forward(self, input_ids, labels=None, attention_mask=None):
        x = self.net[0](input_ids).mean(1)
        t = torch.rand(len(x), 1)
        noise = torch.randn_like(x)
        return {"loss": (self.net[1](x + t * noise) - noise).square().mean()}


class Dropping(RandomTimesteps):
    def forward(self, input_ids, labels=None, attention_mask=None):
        x = torch.nn.functional.dropout(self.net[0](input_ids).mean(1), 0.5, training=True)
        return {"loss": self.net[1](x).square().mean()}


class Negatives(RandomTimesteps):
    def forward(self, input_ids, labels=None, attention_mask=None):
        x = self.net[0](input_ids).mean(1)
        drawn = self.net[0](torch.randint(48, (len(x),)))
        return {"loss": torch.nn.functional.softplus((x * (drawn - self.net[1](x))).sum(1)).mean()}


@pytest.mark.parametrize("model", [RandomTimesteps, Dropping, Negatives])
@pytest.mark.parametrize("accumulation", [2, 16])
def test_a_loss_that_draws_random_numbers_is_said_to_be_unchecked_and_trained(model, accumulation, caplog):
    with caplog.at_level(logging.WARNING, "hf_gradutils.loss_unit"):
        trainer, _ = train("bert classes", accumulation, model=model(), arguments={"max_steps": 3})
    assert trainer.state.global_step == 3
    (message,) = said(caplog)
    assert "the loss differs between equal forwards" in message


class SumWithNoise(RandomTimesteps):
    def forward(self, input_ids, labels=None, attention_mask=None):
        x = self.net[1](self.net[0](input_ids).mean(1))
        return {"loss": x.square().sum() * (1 + 1e-3 * torch.rand(()))}


def test_control_noise_does_not_hide_another_unit():
    with pytest.raises(LossUnitError, match=r"L\(AB\)·n\(AB\) ="):
        train("bert classes", 4, model=SumWithNoise())


# ---- Rows that belong together ----


class Pairs(GradUtilsTrainer):
    """Preferences as users write them: all chosen rows, then all rejected ones."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = model(**inputs)["logits"][:, 0]
        chosen, rejected = scores.chunk(2)
        return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def collate_pairs(pairs):
    return collate([pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs])


class Interleaved(Pairs):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = model(**inputs)["logits"][:, 0]
        return -torch.nn.functional.logsigmoid(scores[::2] - scores[1::2]).mean()


def collate_interleaved(pairs):
    return collate([row for pair in pairs for row in (pair["chosen"], pair["rejected"])])


class Anchored(Pairs):
    """The first row is a question, the others are answers to it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = model(**inputs)["logits"][:, 0].unflatten(0, (2, -1))
        return (scores[0] - scores[1] - 1).square().mean()


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize(
    ("trainer_class", "collator"),
    [(Pairs, collate_pairs), (Interleaved, collate_interleaved), (Anchored, collate_pairs)],
)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_pairs_that_a_cut_would_tear_apart_are_checked_as_the_collator_puts_them(
    trainer_class, collator, batch_size, layout
):
    rows = make_data("bert classes", 32)
    for row in rows:
        del row["labels"]
    pairs = [{"chosen": a, "rejected": b} for a, b in zip(rows[::2], rows[1::2], strict=True)]
    model = make_model("bert classes").double()
    trainer_class.compute_loss(None, model, collator(pairs)).backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    num_ranks = 1 if layout == "one_rank" else 2
    options = {"data": pairs, "data_collator": collator, "trainer_class": trainer_class}
    arguments = {"per_device_train_batch_size": batch_size}
    _, tap = train("bert classes", 16 // batch_size // num_ranks, arguments=arguments, **options)
    assert relative_error(tap.steps[0], want) < TOLERANCE


class ContrastivePairs(Pairs):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        a, b = model(**inputs)["logits"].chunk(2)
        return cross_entropy(a @ b.T, torch.arange(len(a)))


@pytest.mark.parametrize("accumulation", [4, 16])
def test_control_pairs_that_are_compared_with_others_are_refused(accumulation):
    rows = make_data("bert classes", 32)
    for row in rows:
        del row["labels"]
    pairs = [{"chosen": a, "rejected": b} for a, b in zip(rows[::2], rows[1::2], strict=True)]
    with pytest.raises(LossUnitError, match=r"L\(AB\)·n\(AB\) ="):
        train("bert classes", accumulation, data=pairs, data_collator=collate_pairs, trainer_class=ContrastivePairs)
