"""A check sees the training's own mode where that draws nothing, and says so where it cannot."""

import torch
from torch import nn
from transformers import Trainer

from hf_gradutils import GradUtilsAccelerator, GradUtilsTrainer, check_invariance, check_loop_invariance
from hf_gradutils._undisturbed import buffers_kept
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import CHECKPOINTING, make_data, make_model, reset_accelerate, train
from tests.invariance.checks import HEAD, LAYOUT, TRAINING, report_of
from tests.invariance.planted import token_losses

IN_EVALUATION = "in evaluation mode: the model draws random numbers in training"


class MeansInTraining(Trainer):
    """Right in evaluation only."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            return token_losses(model, inputs) / (inputs["labels"][:, 1:] != -100).sum()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)


class MeansInEvaluation(Trainer):
    """Right in training only."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return model(**inputs).loss
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)


class EvaluatesBetween(Trainer):
    """Looks at its model in evaluation mode before each loss, as for samples to log."""

    seen = ()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model.eval()
        self.seen = (*self.seen, any(module.training for module in model.modules()))
        model.train()
        assert model.training == all(module.training for module in model.modules())
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)


def _with_dropout(p):
    model = make_model(HEAD)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = p
    return model


@on_layouts("one_rank", "ddp2")
def test_a_branch_for_training_is_checked(layout):
    report = report_of(MeansInTraining, layout=layout)
    assert report.verdict == "FAILED", str(report)
    assert IN_EVALUATION not in report.what
    report = report_of(MeansInEvaluation, layout=layout)
    assert report.passed, str(report)
    assert report.comparisons[TRAINING].gradient_error < 2e-6
    report = report_of(EvaluatesBetween, layout=layout)
    assert report.passed, str(report)


@on_layouts("one_rank", "ddp2")
def test_a_model_that_draws_is_checked_in_evaluation_mode_and_the_report_says_so(layout):
    for kind in (Trainer, GradUtilsTrainer):
        report = report_of(kind, layout=layout, model=_with_dropout(0.2))
        assert report.passed, str(report)
        assert report.what.endswith(IN_EVALUATION)
        assert report.comparisons[LAYOUT].gradient_error < 2e-6
    assert report_of(MeansInTraining, layout=layout, model=_with_dropout(0.2)).passed  # what the words are for


@on_layouts("fsdp2x2")
def test_a_sharded_model_is_checked_in_training_mode(layout):
    report = report_of(MeansInTraining, layout=layout)
    assert report.verdict == "FAILED", str(report)
    assert report_of(Trainer, layout=layout).passed  # control


def test_a_model_with_checkpointing_is_checked_with_it():
    for use_reentrant in (True, False):
        counts = []

        class Counts(Trainer):
            def training_step(self, *args, **kwargs):
                forwards = []
                handle = self.model.model.layers[0].input_layernorm.register_forward_pre_hook(
                    lambda *_: forwards.append(1)
                )
                loss = super().training_step(*args, **kwargs)
                handle.remove()
                counts.append(len(forwards))  # noqa: B023
                return loss

        arguments = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}}
        report = report_of(Counts, arguments=arguments)
        assert report.passed, str(report)
        assert set(counts) == {2}  # once more in the backward, of one process too


def test_modes_are_as_before():
    class Looks(EvaluatesBetween):
        report = None

        def train(self, *args, **kwargs):
            if self.report is None:
                modes = [module.training for module in self.model.modules()]
                self.report = "under way"
                self.report = check_invariance(self, num_samples=8)
                assert [module.training for module in self.model.modules()] == modes
                assert "train" not in vars(self.model)
            return super().train(*args, **kwargs)

    for starts in (nn.Module.train, nn.Module.eval):
        trainer, _ = train(HEAD, 4, layout="one_rank", trainer_class=Looks, model=starts(make_model(HEAD)))
        assert trainer.report.passed
        assert not any(trainer.seen)


# ---- Batch normalisation ----


class Normalized(nn.Module):
    """A head of two classes behind a batch normalisation."""

    def __init__(self, *, is_frozen=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(50, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.is_frozen = is_frozen

    def train(self, mode=True):
        super().train(mode)
        if self.is_frozen:
            self.norm.eval()
        return self

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.head(self.norm(self.embed(input_ids).mean(1)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _rows():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(50, (8,), generator=generator), "labels": i % 2} for i in range(16)]


@on_layouts("one_rank", "ddp2")
def test_batch_normalisation_in_training_is_said_not_to_be_compared(layout):
    options = {"data": _rows(), "data_collator": None, "layout": layout}
    report = report_of(Trainer, model=Normalized(), **options)
    assert report.passed, str(report)
    assert report.answer.endswith("but for batch normalisation, which is not compared")
    assert "so the gradient depends on how the batch is cut up" in report.comparisons[-1].not_compared
    frozen = report_of(Trainer, model=Normalized(is_frozen=True), **options)
    assert frozen.passed
    assert "batch normalisation" not in str(frozen)


def test_a_step_of_one_batch_has_no_cut_that_batch_normalisation_could_depend_on():
    arguments = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 16}
    report = report_of(Trainer, model=Normalized(), data=_rows(), data_collator=None, arguments=arguments)
    assert report.passed
    assert "batch normalisation" not in report.answer


# ---- Loops ----


def test_a_loop_is_checked_in_the_modes_that_it_has_set():
    def loss_and_targets(model, batch):
        total, num_targets = token_losses(model, batch), (batch["labels"][:, 1:] != -100).sum()
        return total / (num_targets + 1 if model.training else num_targets), num_targets

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    for starts in (nn.Module.train, nn.Module.eval):  # a loop calls train by itself
        reset_accelerate()
        accelerator = GradUtilsAccelerator(cpu=True, gradient_accumulation_steps=2)
        model = accelerator.prepare(starts(make_model(HEAD)))
        before = [module.training for module in model.modules()]
        report = check_loop_invariance(accelerator, model, make_data(HEAD), collate, loss_and_targets)
        assert report.verdict == "FAILED", str(report)
        assert [module.training for module in model.modules()] == before


def test_statistics_of_batch_normalisations_are_put_back():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with buffers_kept(model):
        model(torch.rand(4, 3))
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
