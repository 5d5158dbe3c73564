"""A loss that is no mean over its targets is refused where the first batch could not tell, and right ones are not.

Batch size 1 with accumulation, and batches of rows of equal length, are what most language models are trained with.
"""

import logging

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, IterableDataset

from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.errors import LossUnitError
from tests.harness.gradients import relative_error
from tests.harness.heads import HEADS
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, make_model, train, truth, truth_of_micro_batches

TOLERANCE = 1e-5
IN_ORDER = {"train_sampling_strategy": "sequential"}


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "hf_gradutils.loss_unit"]


# ---- Losses ----


def token_mean(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits.flatten(0, -2), labels.flatten())


def row_means(outputs, labels, num_items_in_batch=None):
    rows = zip(outputs.logits, labels, strict=True)
    return torch.stack([cross_entropy(logits, wanted) for logits, wanted in rows]).mean()


def token_sums(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits.flatten(0, -2), labels.flatten(), reduction="sum")


def sum_per_row(outputs, labels, num_items_in_batch=None):
    return token_sums(outputs, labels) / len(labels)


def weighted(outputs, labels, num_items_in_batch=None):
    weights = 1.0 + torch.arange(outputs.logits.shape[-1]) % 5
    return cross_entropy(outputs.logits.flatten(0, -2), labels.flatten(), weight=weights)


WRONG = [
    ("bert masked", row_means),
    ("bert masked", token_sums),
    ("bert masked", sum_per_row),
    ("bert masked", weighted),
    ("bert tokens", weighted),
    ("bert classes", weighted),
    ("bert classes", token_sums),
]


def ids(case):
    return " ".join(part if isinstance(part, str) else part.__name__ for part in case)


def equal_at_first(head, num_rows=8):
    """Rows of which the first have equally many targets, and one class."""
    data = make_data(head)
    for row in data[:num_rows]:
        if row["labels"].dim():
            is_target = torch.arange(len(row["labels"])) < 3
            row["labels"] = torch.where(is_target, row["input_ids"] % 3, -100)
        else:
            row["labels"] = torch.tensor(1)
    return data


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("case", WRONG, ids=ids)
def test_a_loss_over_something_else_is_refused_with_batch_size_1(case, layout):
    head, loss = case
    accumulation = 16 if layout == "one_rank" else 8
    with pytest.raises(LossUnitError, match=r"L\(AB\)·n\(AB\) = .* set loss_unit or count_targets"):
        train(head, accumulation, compute_loss_func=loss)


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("case", WRONG, ids=ids)
def test_a_loss_over_something_else_is_refused_after_a_first_batch_of_equal_rows(case, layout):
    head, loss = case
    with pytest.raises(LossUnitError, match=r"L\(AB\)·n\(AB\) ="):
        train(head, 4, compute_loss_func=loss, data=equal_at_first(head), arguments=IN_ORDER)


def test_a_loss_over_something_else_is_refused_in_batches_grouped_by_length():
    arguments = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2}
    with pytest.raises(LossUnitError, match=r"L\(AB\)·n\(AB\) ="):
        train(
            "bert masked", 4, compute_loss_func=row_means, data=equal_at_first("bert masked", 12), arguments=arguments
        )


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("head", ["llama causal", "t5 seq2seq", "bert tokens"])
def test_right_heads_are_exact_in_batches_grouped_by_length(head, batch_size, caplog):
    data = equal_at_first(head, 8) if head != "llama causal" else make_data(head)
    want, _ = truth(head, data)
    arguments = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": batch_size}
    with caplog.at_level(logging.WARNING, "hf_gradutils.loss_unit"):
        _, tap = train(head, 16 // batch_size, data=data, arguments=arguments)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert not said(caplog)


@pytest.mark.parametrize(
    ("head", "loss", "plugin"),
    [
        ("bert masked", row_means, GradUtilsPlugin(loss_unit="rows")),
        ("bert masked", token_sums, GradUtilsPlugin(loss_unit="sum")),
        ("bert classes", weighted, GradUtilsPlugin(count_targets=lambda batch: (1.0 + batch["labels"] % 5).sum())),
        (
            "bert masked",
            weighted,
            GradUtilsPlugin(count_targets=lambda batch: ((1.0 + batch["labels"] % 5) * batch["labels"].ne(-100)).sum()),
        ),
    ],
    ids=["rows", "sum", "weights of classes", "weights of tokens"],
)
def test_the_advice_helps(head, loss, plugin):
    data = make_data(head)
    model = make_model(head).double()
    batch = HEADS[head].collate(data)
    labels = batch.pop("labels")
    loss_of = loss if loss is not weighted else _weighted_in_float64
    loss_of(model(**batch), labels).backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    _, tap = train(head, 16, compute_loss_func=loss, grad_plugin=plugin)
    assert relative_error(tap.steps[0], want) < TOLERANCE


def _weighted_in_float64(outputs, labels):
    weights = 1.0 + torch.arange(outputs.logits.shape[-1], dtype=torch.float64) % 5
    return cross_entropy(outputs.logits.flatten(0, -2), labels.flatten(), weight=weights)


@pytest.mark.wide
@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_trained_exactly_with_batch_size_1(head, caplog):
    data = make_data(head, 6)
    splits = [[row] for row in data] if head == "qwen3 moe aux" else [data]
    want, _ = truth_of_micro_batches(head, splits)
    with caplog.at_level(logging.WARNING, "hf_gradutils.loss_unit"):
        _, tap = train(head, 6, data=data, arguments=IN_ORDER)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert not said(caplog)


@on_layouts("one_rank", "ddp2", "fsdp2x2")
@pytest.mark.parametrize("head", ["llama causal", "bert masked", "bert classes"])
def test_right_losses_of_the_users_own_are_not_refused_with_batch_size_1(head, layout):
    accumulation = 16 if layout == "one_rank" else 8
    want, _ = truth(head, make_data(head))
    options = {} if head == "llama causal" else {"compute_loss_func": token_mean}
    _, tap = train(head, accumulation, layout=layout, **options)
    assert relative_error(tap.steps[0], want) < TOLERANCE


# ---- Data without rows to look at ----


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_of_a_stream_the_first_later_batch_that_can_tell_is_asked():
    arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 100}
    data = Stream(equal_at_first("bert masked", 8) * 4)
    steps = []
    with pytest.raises(LossUnitError, match=r"L\(AB\)·n\(AB\) ="):
        train("bert masked", 2, compute_loss_func=_noting(row_means, steps), data=data, arguments=arguments)
    num_asked = 1 + 4  # how many terms it returns, and what it divides by
    assert sum(steps) == num_asked + 2, "the first window is of equal rows"
    trainer, _ = train("bert masked", 2, compute_loss_func=token_mean, data=data, arguments=arguments)
    assert trainer.state.global_step == 4


def _noting(loss, calls):
    def noting(outputs, labels, num_items_in_batch=None):
        calls.append(torch.is_grad_enabled())
        return loss(outputs, labels, num_items_in_batch)

    return noting


def test_of_a_stream_with_batch_size_1_one_warning_says_what_is_unchecked(caplog):
    arguments = {"max_steps": 3, "per_device_train_batch_size": 1}
    with caplog.at_level(logging.WARNING, "hf_gradutils.loss_unit"):
        train("bert masked", 2, data=Stream(make_data("bert masked")), arguments=arguments)
    (message,) = said(caplog)
    assert "could not be checked to be a mean over the targets counted (loss_unit='auto')" in message
    assert "check_invariance=True" in message


def test_data_without_any_difference_between_its_rows_is_said_to_tell_nothing(caplog):
    data = equal_at_first("bert masked", 16)
    arguments = {"max_steps": 3}
    with caplog.at_level(logging.WARNING, "hf_gradutils.loss_unit"):
        train("bert masked", 4, data=data, compute_loss_func=row_means, arguments=arguments)
        train("bert masked", 4, data=data, arguments=arguments)
    (message,) = said(caplog)
    assert "all samples that were looked at have as many targets, or one class" in message
    with pytest.raises(LossUnitError, match=r"L\(AB\)·n\(AB\) ="):  # nothing hides that
        train("bert masked", 4, data=data, compute_loss_func=token_sums, arguments=arguments)


class Unreadable(Dataset):
    """Serves its loader's order only, as some do that read ahead."""

    def __init__(self, rows):
        self.rows, self.next = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index not in (self.next, self.next - 1):
            raise RuntimeError("out of order")
        self.next = index + 1
        return self.rows[index]


def test_a_data_set_that_cannot_be_read_anywhere_is_left_alone_and_as_it_was():
    head = "bert masked"
    data = Unreadable(make_data(head))
    want, _ = truth(head, data.rows)
    _, tap = train(head, 16, data=data, arguments=IN_ORDER)
    assert relative_error(tap.steps[0], want) < TOLERANCE
