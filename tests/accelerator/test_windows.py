"""Windows of GradUtilsAccelerator: short, uneven, given up, or interrupted by a checkpoint."""

import functools

import pytest
import torch

from hf_gradutils import GradUtilsPlugin
from tests.harness.accelerator_cases import HEAD, TOLERANCE, make, run_loop
from tests.harness.gradients import relative_error, whole_gradients
from tests.harness.layouts import LAYOUTS, on_layouts
from tests.harness.trainer_cases import make_data, truth


@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_the_gradient_is_exact_without_clipping_and_in_a_short_last_window(layout):
    rows = make_data(HEAD)
    loop = run_loop(HEAD, layout, 3, batch_size=2, optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    in_window = 6 * LAYOUTS[layout].num_data_ranks
    windows = [rows[start : start + in_window] for start in range(0, len(rows), in_window)]
    assert len(loop.losses) == len(windows) > 1
    assert len(windows[-1]) < in_window, "control: the last one is short"
    for got, loss, window in zip(loop.gradients, loop.losses, windows, strict=True):
        want, want_loss = truth(HEAD, window)
        assert relative_error(got, want) < TOLERANCE
        assert loss == pytest.approx(want_loss, rel=TOLERANCE)


@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_a_loop_that_says_no_sync_itself_is_exact(layout):
    rows = make_data(HEAD)
    size = len(rows) // (4 * LAYOUTS[layout].num_data_ranks)
    loop, loader = make(HEAD, layout, plugin=GradUtilsPlugin(), rows=rows, batch_size=size)
    for index, batch in enumerate(loader):
        is_last = index == len(loader) - 1
        windows, model = loop.accelerator.windows, loop.model
        with windows.sync_context(model, is_last=True) if is_last else loop.accelerator.no_sync(model):
            loop.backward(batch)
    loop.optimizer.step()
    assert relative_error(whole_gradients(loop.model), truth(HEAD, rows)[0]) < TOLERANCE


@on_layouts("ddp2", "fsdp2x2", "hsdp2x2")
def test_every_sync_policy_gives_the_same_gradient(layout):
    want, _ = truth(HEAD, make_data(HEAD))
    for sync in ("every", "reduce_scatter", "auto"):
        loop = run_loop(HEAD, layout, 4, plugin=GradUtilsPlugin(num_steps=4, sync=sync))
        assert relative_error(loop.gradients[0], want) < TOLERANCE


@pytest.mark.parametrize(
    ("layout", "num_rows"),
    [("ddp2", 10), ("ddp2", 2), ("fsdp2x2", 10)],  # 5 batches over 2 ranks; 2 rows leave the second without any
)
@on_layouts()
def test_ranks_with_fewer_batches_are_waited_for_and_count_for_nothing(layout, num_rows):
    rows = make_data(HEAD, num_rows)
    want, loss = truth(HEAD, rows)
    loop, loader = make(HEAD, layout, plugin=GradUtilsPlugin(num_steps=4), rows=rows, batch_size=2)
    accelerator, seen = loop.accelerator, 0
    with accelerator.join_uneven_inputs([loop.model], even_batches=False):
        for batch in loader:
            seen += 1
            with accelerator.accumulate(loop.model):
                loop.backward(batch)
                loop.optimizer.step()
    assert seen == -(-num_rows // 4)
    assert relative_error(whole_gradients(loop.model), want) < TOLERANCE
    assert float(accelerator.report.loss) == pytest.approx(loss, rel=TOLERANCE)
    assert loader.batch_sampler.even_batches, "as before"


@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_a_window_that_is_given_up_leaves_nothing_behind(layout):
    rows = make_data(HEAD)
    size = len(rows) // (4 * LAYOUTS[layout].num_data_ranks)
    loop, loader = make(HEAD, layout, plugin=GradUtilsPlugin(num_steps=4), rows=rows, batch_size=size)

    def micro_batch(batch):
        with loop.accelerator.accumulate(loop.model):
            loop.backward(batch)

    for batch in list(loader)[:3]:
        micro_batch(batch)
    loop.accelerator.discard_window(loop.model)
    for batch in loader:
        micro_batch(batch)
    loop.optimizer.step()
    assert relative_error(whole_gradients(loop.model), truth(HEAD, rows)[0]) < TOLERANCE


def test_a_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path):
    def loop_from(start, *, saves=None, loads=None):
        loop, loader = make(HEAD, "one_rank", plugin=GradUtilsPlugin(num_steps=2), rows=make_data(HEAD), batch_size=2)
        accelerator = loop.accelerator
        if loads:
            accelerator.load_state(loads)
        rest = accelerator.skip_first_batches(loader, start) if start else loader
        for index, batch in enumerate(rest, start):
            with accelerator.accumulate(loop.model):
                loop.backward(batch)
                loop.optimizer.step()
                if accelerator.sync_gradients:
                    loop.losses.append(float(accelerator.report.loss))
                loop.scheduler.step()
                loop.optimizer.zero_grad()
            if saves and index == 3:
                accelerator.save_state(saves)
        return loop.losses

    whole = loop_from(0, saves=str(tmp_path))
    assert len(whole) == 4
    assert loop_from(4, loads=str(tmp_path)) == whole[2:]
