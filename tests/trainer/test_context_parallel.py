"""Counting under context parallelism: every rank sees its part of each row, cut as torch cuts it, in place.

The attention kernel that lets the parts of a sequence see one another does not run on CPU: the model here looks at one
position at a time, and what is shown is that loss, gradient and counts of the parts come together exactly.
"""

import contextlib
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_gradutils import GradUtilsTrainer
from tests.harness.gradients import norm_of, relative_error
from tests.harness.head_rows import LENGTH, VOCAB
from tests.harness.heads import collate
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import make_data, train

HEAD = "llama causal"
SIZE = 2


class PositionByPosition(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCAB, 16)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, input_ids, labels, shift_labels=None, attention_mask=None):
        if shift_labels is None:  # a head of transformers shifts by itself
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        logits = self.head(self.embedding(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten()), "logits": logits}


@contextlib.contextmanager
def cut_in_place(tensors):
    """As torch's ``context_parallel`` does, which hands each rank the first and the last of its 2 × SIZE chunks."""
    rank = dist.get_rank()
    for tensor in tensors:
        chunks = tensor.clone().chunk(2 * SIZE, dim=1)
        part = torch.cat((chunks[rank], chunks[-1 - rank]), dim=1)
        tensor.resize_(part.shape).copy_(part)
    yield


class CutAlongTheSequence:
    def get_cp_size(self):
        return SIZE

    def _prepare_context_parallel_inputs(self, model, inputs):
        inputs["shift_labels"] = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        tensors = [inputs[name] for name in ("input_ids", "labels", "shift_labels")]
        return functools.partial(cut_in_place, tensors), inputs

    def get_train_dataloader(self):  # the ranks of a group see the same rows
        return DataLoader(self.train_dataset, self.args.per_device_train_batch_size, collate_fn=collate)

    def get_eval_dataloader(self, eval_dataset=None):
        return DataLoader(self.eval_dataset, 3, collate_fn=collate)


class Ours(CutAlongTheSequence, GradUtilsTrainer):
    pass


class Stock(CutAlongTheSequence, Trainer):
    pass


def rows():
    """Labels at the beginning of most rows, so that the ranks' parts of a micro-batch differ."""
    data = make_data(HEAD)
    for row in data[:4]:
        row["labels"][LENGTH // 4 + 1 : 3 * LENGTH // 4] = -100  # nothing for rank 1 in the first micro-batches
    for row in data:
        del row["attention_mask"]
    return data


def step(trainer_class, accumulation, **kwargs):
    options = {"per_device_train_batch_size": 16 // accumulation, "learning_rate": 0.0, "label_names": ["labels"]}
    return train(
        HEAD, accumulation, trainer_class=trainer_class, model=PositionByPosition(), arguments=options, **kwargs
    )


def truth():
    model = PositionByPosition().double()
    loss = model(**collate(rows()))["loss"]
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


@pytest.mark.parametrize("accumulation", [1, 4, 8])
@ranks(SIZE)
def test_parts_of_rows_are_counted_as_what_they_are(accumulation):
    want, want_loss = truth()
    trainer, tap = step(Ours, accumulation, data=rows(), eval_data=rows())
    assert relative_error(tap.steps[0], want) < 1e-5
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(want_loss, rel=1e-5)
    assert entry["grad_norm"] == pytest.approx(norm_of(want), rel=1e-5)
    assert entry["num_targets"] == int(collate(rows())["labels"][:, 1:].ne(-100).sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want_loss, rel=1e-5)


@ranks(SIZE)
def test_control_the_mean_of_the_parts_means_is_wrong():
    _, tap = step(Stock, 4, data=rows())
    assert not relative_error(tap.steps[0], truth()[0]) < 1e-2
