"""What an earlier model, window or micro-batch leaves behind changes nothing later."""

import gc

import pytest
import torch
from torch import nn

from hf_gradutils.accelerator import _first_window
from tests.accelerator.test_outside_changes import HEAD, TOLERANCE, loop_of
from tests.harness.gradients import relative_error, whole_gradients
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, truth
from tests.harness.user_loops import Alone, alone, are_close, nets, ours, play, rows_of, sgd, square


def test_an_accelerator_that_is_collected_in_a_step_stops_no_other_optimizer(monkeypatch):
    accelerator, (model, *_) = ours(), nets()
    model, optimizer = accelerator.prepare(model, sgd(model))
    accelerator.backward(square(model, rows_of(0)[0]), num_targets=12)
    optimizer.step()
    accelerator.user = [accelerator]  # as in a Trainer with its callbacks: garbage, which is collected at any time
    gc.collect()
    gc.disable()
    del accelerator, model, optimizer
    other = nets()[1]
    square(other, rows_of(0)[0]).backward()
    before, parameters_of = other.weight.detach().clone(), _first_window.parameters_of

    def collecting(optimizer):
        gc.collect()
        return parameters_of(optimizer)

    monkeypatch.setattr(_first_window, "parameters_of", collecting)
    try:
        sgd(other).step()
    finally:
        gc.enable()
    assert not torch.equal(other.weight, before)


def one_optimizer_by_turns(accelerator, batches, models):
    """A bad step of one model is left out by the loop; the next is the other's."""
    _, a, b = models
    a, b, optimizer = accelerator.prepare(a, b, sgd(a, b))
    for window in range(6):
        model = (a, b)[window % 2]
        for x, _, _ in batches(window):
            with accelerator.accumulate(model):
                factor = float("inf") if window == 2 else 1
                accelerator.backward(square(model, x) * factor, num_targets=len(x), model=model)
                if accelerator.sync_gradients:
                    if accelerator.clip_grad_norm_(model.parameters(), 10.0).isfinite():
                        optimizer.step()
                    optimizer.zero_grad()


@on_layouts("one_rank", "ddp2")
def test_a_bad_step_of_one_model_does_not_cost_the_other_one_a_step(layout):
    want, _ = alone(one_optimizer_by_turns)
    assert are_close(play(one_optimizer_by_turns, layout, 1, on_nonfinite="skip")[0], want)


def masks(accelerator, batches, models):
    """One row of an embedding is trained, as in textual inversion; the first micro-batch of one row lacks it."""
    embedding = models[0]
    embedding, optimizer = accelerator.prepare(embedding, sgd(embedding))
    for _ in range(2):
        parts = [torch.tensor([1, 2]), torch.tensor([0, 3, 0])]
        for tokens in [torch.cat(parts)] if isinstance(accelerator, Alone) else parts:
            with accelerator.accumulate(embedding):
                accelerator.backward(embedding(tokens).square().mean(), num_targets=len(tokens))
                embedding.weight.grad[1:] = 0
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("counts", ["auto", "streamed"])
def test_a_micro_batch_whose_gradient_is_masked_to_zero_counts(counts):
    def embedding():
        torch.manual_seed(3)
        return [nn.Embedding(4, 2).double()]

    want, _ = alone(masks, models=embedding())
    assert are_close(play(masks, "one_rank", 2, models=embedding(), counts=counts)[0], want)


@pytest.mark.parametrize("counts", ["auto", "first"])
@on_layouts("one_rank", "ddp2", "fsdp2x2", "hsdp2x2")
def test_a_loss_whose_gradient_is_dropped_is_not_reported(layout, counts):
    want, loss = truth(HEAD, make_data(HEAD))
    for sets_to_none in (True, False) if layout in ("one_rank", "ddp2") else (True,):  # zeros of shards are not seen
        loop, loader = loop_of(layout, 1, counts=counts)
        for batch in loader:
            with loop.accelerator.accumulate(loop.model):
                loop.backward(batch)
                loop.model.zero_grad(set_to_none=sets_to_none)
                loop.backward(batch)
                loop.optimizer.step()
        assert relative_error(whole_gradients(loop.model), want) < TOLERANCE
        assert float(loop.accelerator.report.loss) == pytest.approx(loss, rel=1e-5)
