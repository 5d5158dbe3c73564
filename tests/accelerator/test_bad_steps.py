"""A gradient that is not finite, in a loop with GradUtilsAccelerator: skipped or raised, and nothing has moved."""

import math

import pytest
import torch
import torch.distributed as dist

from hf_gradutils import GradUtilsPlugin
from hf_gradutils.errors import NonfiniteGradientError
from tests.harness.accelerator_cases import FUSED, HEAD, SGD, make, run_loop
from tests.harness.layouts import LAYOUTS, on_layouts
from tests.harness.trainer_cases import make_data


def spoil_the_first(loop):
    """Put NaN into one element, on the last rank, in the first window."""
    loop.count = getattr(loop, "count", 0) + 1
    is_last_rank = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    if loop.count == 1 and is_last_rank:
        p = next(p for p in loop.model.parameters() if p.grad is not None)
        grad = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
        grad.view(-1)[0] = math.nan


@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_a_bad_step_is_skipped_and_the_scheduler_holds(layout):
    plugin = GradUtilsPlugin(num_steps=1, on_nonfinite="skip")
    loop = run_loop(HEAD, layout, 1, batch_size=4, plugin=plugin, after_backward=spoil_the_first)
    num_steps = len(loop.losses)
    assert num_steps > 1
    assert loop.accelerator.num_skipped_steps == 1
    factor = 1 if LAYOUTS[layout].num_ranks == 1 else 2  # accelerate steps a scheduler once per rank
    assert loop.scheduler.get_last_lr()[0] == pytest.approx(0.1 * 0.5 ** (factor * (num_steps - 1)))
    assert all(p.isfinite().all() for p in loop.model.parameters())


@pytest.mark.parametrize("kind", ["sgd", "fused"])
@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_a_bad_step_raises_and_nothing_has_moved(layout, kind):
    seen = []

    def look(loop):
        if not seen:
            seen.append((loop, [p.detach().clone() for p in loop.model.parameters()]))
        spoil_the_first(loop)

    optimizer = FUSED if kind == "fused" else SGD
    with pytest.raises(NonfiniteGradientError, match="step 1: the gradient is inf or NaN in rank"):
        run_loop(HEAD, layout, 1, batch_size=4, optimizer=optimizer, after_backward=look)
    ((loop, before),) = seen
    assert loop.count == (2 if kind == "fused" else 1), "the device's decision is known one step later"
    assert loop.scheduler.get_last_lr() == [0.1]
    for p, was in zip(loop.model.parameters(), before, strict=True):
        local = [t.to_local() if hasattr(t, "to_local") else t for t in (p, was)]
        assert torch.equal(*local)


def test_no_checkpoint_is_written_over_a_bad_step(tmp_path):
    rows = make_data(HEAD)
    loop, loader = make(HEAD, "one_rank", plugin=GradUtilsPlugin(), rows=rows, batch_size=16, optimizer=FUSED)
    for batch in loader:
        loop.backward(batch)
        spoil_the_first(loop)
        loop.optimizer.step()
        loop.scheduler.step()
    with pytest.raises(NonfiniteGradientError):
        loop.accelerator.save_state(str(tmp_path))
    assert not list(tmp_path.iterdir())
    loop.accelerator.end_training()  # raised once
