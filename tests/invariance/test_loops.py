"""check_loop_invariance and check_window_invariance: loops of accelerate and of plain torch."""

import functools

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_gradutils import (
    GradUtilsAccelerator,
    check_loop_invariance,
    check_window_invariance,
    get_sync_ctx,
    reduce_loss,
    rescale_gradients,
)
from tests.harness.heads import HEADS
from tests.harness.layouts import on_layouts
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import make_data, make_model, reset_accelerate
from tests.invariance.checks import COPIES, HEAD, LAYOUT, PARTS


def causal_loss(model, batch):
    return model(**batch).loss, (batch["labels"][:, 1:] != -100).sum()


@on_layouts("one_rank", "ddp2")
def test_a_loop_is_checked_too(layout):
    for kind, is_right in ((Accelerator, False), (GradUtilsAccelerator, True)):
        reset_accelerate()
        accelerator = kind(cpu=True, gradient_accumulation_steps=2)
        model, _ = accelerator.prepare(made := make_model(HEAD), torch.optim.SGD(made.parameters(), lr=0.1))
        report = check_loop_invariance(accelerator, model, make_data(HEAD), HEADS[HEAD].collate, causal_loss)
        assert report.passed == is_right, str(report)
        assert accelerator.gradient_accumulation_steps == 2
        assert all(p.grad is None for p in model.parameters())
        assert is_right or "use hf_gradutils.GradUtilsAccelerator" in report.comparisons[PARTS].problem
    wrong = check_loop_invariance(
        accelerator, model, make_data(HEAD), HEADS[HEAD].collate, lambda m, b: (m(**b).loss, len(b["labels"]))
    )
    for row in wrong.comparisons[PARTS:]:
        assert "num_targets is not the number of targets that the loss is a mean over" in row.problem


@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_a_loop_of_plain_torch_is_checked_too(layout):
    model = make_model(HEAD)
    if layout == "ddp2":
        model = nn.parallel.DistributedDataParallel(model)
    if layout == "fsdp2x2":
        fully_shard(model)

    def run_window(batches, *, divides=True):
        losses, num_targets = [], torch.zeros(())
        for index, batch in enumerate(batches):
            with get_sync_ctx(model, is_optim_step=index == len(batches) - 1):
                loss, num_here = causal_loss(model, batch)
                (loss * num_here).backward()
            losses.append(loss.detach() * num_here)
            num_targets += num_here
        if divides:
            rescale_gradients(model, num_targets)
        total, denominator = reduce_loss(losses, num_targets)
        return total / denominator

    arguments = (model, make_data(HEAD), HEADS[HEAD].collate)
    report = check_window_invariance(*arguments, run_window, causal_loss)
    assert report.passed, str(report)
    assert report.comparisons[LAYOUT].gradient_error < 2e-6
    wrong = check_window_invariance(*arguments, functools.partial(run_window, divides=False), causal_loss)
    assert "times what it should be" in wrong.comparisons[LAYOUT].problem


class Experts(nn.Module):
    """Each rank has an expert of its own, which is not declared."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(48, 4)
        torch.manual_seed(dist.get_rank())
        self.expert = nn.Linear(4, 48)

    def forward(self, input_ids, labels, attention_mask=None):
        logits = self.expert(self.embed(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def expert_loss(model, batch):
    return model(**batch)["loss"], (batch["labels"] != -100).sum()


@ranks(2)
def test_an_undeclared_expert_shard_is_found():
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True)
    model = Experts()  # not wrapped: DDP would make the experts alike
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(optimizer)
    report = check_loop_invariance(accelerator, model, make_data(HEAD), HEADS[HEAD].collate, expert_loss)
    assert not report.passed
    assert "'expert.weight' should be the same" in report.comparisons[COPIES].problem
    assert "pass ownership={'expert.weight': 'sharded'}" in report.comparisons[COPIES].problem
