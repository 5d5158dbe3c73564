"""Losses of the user's own, smoothed ones, without targets; a loss that cannot be exact stops with an error."""

import math

import pytest
import torch

from hf_gradutils import GradUtilsTrainer
from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.errors import LossUnitError, TargetCountError
from tests.harness.gradients import relative_error
from tests.harness.heads import collate
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, make_model, train, truth

TOLERANCE = 1e-5
COMMON = ["one_rank", "ddp2", "fsdp2x2"]


class _OwnLoss(GradUtilsTrainer):
    """A subclass as users write it, that never calls ours."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return (loss, outputs) if return_outputs else loss


def sum_over_count(outputs, labels, num_items_in_batch=None):
    loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / num_items_in_batch


def mean_whatever_the_count(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


@on_layouts(*COMMON)
@pytest.mark.parametrize(
    "options",
    [
        {"trainer_class": _OwnLoss},
        {"compute_loss_func": sum_over_count},
        {"compute_loss_func": mean_whatever_the_count},
    ],
    ids=["override", "sum over the count", "mean whatever the count"],
)
def test_losses_of_the_users_own_are_exact(options, layout):
    head = "bert masked"
    want, want_loss = truth(head, make_data(head))
    trainer, tap = train(head, 4, layout=layout, **options)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)


@on_layouts(*COMMON)
def test_label_smoothing_shifts_as_the_head_does(layout):
    head, epsilon = "llama causal", 0.1
    model = make_model(head).double()
    batch = collate(make_data(head))
    labels = batch.pop("labels")[:, 1:]
    log_p = torch.log_softmax(model(**batch).logits[:, :-1], -1)
    is_target = labels.ne(-100)
    likelihood = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    loss = -((1 - epsilon) * likelihood + epsilon * log_p.mean(-1))[is_target].mean()
    loss.backward()
    want = {n: p.grad for n, p in model.named_parameters()}
    trainer, tap = train(head, 4, layout=layout, arguments={"label_smoothing_factor": epsilon})
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


@on_layouts(*COMMON)
@pytest.mark.parametrize("head", ["llama causal", "bert masked"])
def test_micro_batches_without_targets_count_for_nothing(head, layout):
    data = make_data(head)
    for index in (0, 1, 2, 3, 9):
        data[index]["labels"] = torch.full_like(data[index]["labels"], -100)
    want, want_loss = truth(head, data)
    trainer, tap = train(head, 8, layout=layout, data=data)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss, rel=1e-5)


# ---- What cannot be exact stops with an error ----


class _Contrastive(torch.nn.Module):
    """Batch negatives: the objective changes with the micro-batch."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(48, 8)

    def forward(self, input_ids, labels=None, attention_mask=None):
        x = self.embed(input_ids).mean(1)
        scores = x @ x.T
        return {"loss": torch.nn.functional.cross_entropy(scores, torch.arange(len(x))), "logits": scores}


@on_layouts("one_rank", "ddp2")
def test_a_loss_that_is_no_mean_of_its_samples_stops_with_the_numbers(layout):
    data = make_data("bert classes")
    with pytest.raises(LossUnitError, match=r"L\(AB\)·n\(AB\) = .* set loss_unit or count_targets"):
        train("bert classes", 2, model=_Contrastive(), data=data)
    plugin = GradUtilsPlugin(check_loss_unit=False)
    trainer, _ = train("bert classes", 2, model=_Contrastive(), data=data, grad_plugin=plugin)
    assert trainer.state.global_step == 1


def test_a_wrong_unit_is_caught_and_the_users_own_count_is_used():
    head = "bert masked"
    want, _ = truth(head, make_data(head))
    with pytest.raises(LossUnitError, match="loss_unit='rows'"):
        train(head, 2, grad_plugin=GradUtilsPlugin(loss_unit="rows"))
    plugin = GradUtilsPlugin(count_targets=lambda batch: batch["labels"].ne(-100).sum())
    assert relative_error(train(head, 2, grad_plugin=plugin)[1].steps[0], want) < TOLERANCE
    with pytest.raises(ValueError, match="loss_unit must be one of"):
        GradUtilsPlugin(loss_unit="words")


@on_layouts("one_rank", "ddp2")
def test_labels_that_nothing_can_count_are_an_error_on_every_rank(layout):
    data = make_data("bert classes")
    for row in data:
        row["labels"] = torch.tensor(True)
    with pytest.raises(TargetCountError, match=r"labels must be a tensor of integers .* torch.bool"):
        train("bert classes", 2, data=data)


@on_layouts(*COMMON)
def test_data_without_any_target_is_an_error_on_every_rank(layout):
    data = make_data("llama causal")
    for row in data:
        row["labels"] = torch.full_like(row["labels"], -100)
    with pytest.raises(TargetCountError, match="every label is -100"):
        train("llama causal", 2, data=data, layout=layout)


@pytest.mark.parametrize("max_grad_norm", [-1.0, math.nan])
def test_a_clip_threshold_below_zero_is_refused(max_grad_norm):
    with pytest.raises(ValueError, match="max_grad_norm must be > 0, got"):
        train("bert classes", arguments={"max_grad_norm": max_grad_norm})


def test_backward_without_a_count_says_what_to_pass():
    trainer, _ = train("bert classes")
    with pytest.raises(TargetCountError, match="num_targets="):
        trainer.accelerator.backward(torch.ones((), requires_grad=True))
