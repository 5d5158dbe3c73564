"""What changes gradients besides accelerator.backward stops in the first window; what leaves them exact does not."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import optimizer as torch_optimizer

from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError, TargetCountError
from hf_gradutils.upstream.dtensor import local_tensor
from tests.harness.accelerator_cases import HEAD, TOLERANCE, make
from tests.harness.gradients import relative_error, whole_gradients
from tests.harness.heads import HEADS
from tests.harness.layouts import LAYOUTS, on_layouts
from tests.harness.tiny_net import (
    data_rank,
    make_batch,
    make_net,
    parallelize,
    summed_loss,
    sync_plain_gradients,
    true_mean_gradient,
)
from tests.harness.trainer_cases import make_data, reset_accelerate, truth

SPREAD = ["one_rank", "ddp2", "fsdp2x2"]
LAYERS = "lm_head.weight"


def loop_of(layout, accumulation, **settings):
    rows = make_data(HEAD)
    size = len(rows) // (accumulation * LAYOUTS[layout].num_data_ranks)
    return make(HEAD, layout, plugin=GradUtilsPlugin(num_steps=accumulation, **settings), rows=rows, batch_size=size)


def weights_of(loop):
    return [local_tensor(p.detach()).clone() for group in loop.optimizer.param_groups for p in group["params"]]


def train(loop, loader, *, before=None, after=None, ending=None):
    """A window; what a user does before and after each loss, and before the step."""
    for index, batch in enumerate(loader):
        with loop.accelerator.accumulate(loop.model):
            if before:
                before(loop, batch, index)
            loop.backward(batch)
            if after:
                after(loop, batch, index)
            if ending and loop.accelerator.sync_gradients:
                ending(loop)
            loop.optimizer.step()


def plainly(loop, batch, index=0):
    loop.model(**batch)["loss"].backward()


def plainly_in_the_second(loop, batch, index):
    if index == 1:
        plainly(loop, batch)


def from_the_logits(loop, batch, index):
    loop.model(**batch)["logits"].square().mean().backward()


def some_parameters(loop, batch, index):
    loop.model(**batch)["loss"].backward(inputs=list(loop.model.parameters())[-2:])


def clip(loop):
    clip_grad_norm_(loop.model.parameters(), 1e-3)


def clip_values(loop):
    clip_grad_value_(loop.model.parameters(), 1e-3)


def halve(loop):
    for p in loop.model.parameters():
        if p.grad is not None:
            p.grad.mul_(0.5)


WRONG = {
    "plain before": {"before": plainly},
    "plain after": {"after": plainly},
    "plain in the second before": {"before": plainly_in_the_second},
    "plain in the second after": {"after": plainly_in_the_second},
    "of the logits": {"after": from_the_logits},
    "torch's clipping": {"ending": clip},
    "torch's clipping of values": {"ending": clip_values},
    "by hand": {"ending": halve},
}


@pytest.mark.wide
@on_layouts()
@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("accumulation", [2])
@pytest.mark.parametrize("layout", [*SPREAD, "hsdp2x2"])
def test_what_would_be_silently_wrong_stops_before_the_first_step(layout, accumulation, case):
    loop, loader = loop_of(layout, accumulation)
    before = weights_of(loop)
    with pytest.raises(TargetCountError, match=r"accelerator\.backward"):
        train(loop, loader, **WRONG[case])
    assert all(torch.equal(p, old) for p, old in zip(weights_of(loop), before, strict=True))


@on_layouts("ddp2", "fsdp2x2")
def test_also_before_the_first_loss_in_no_sync(layout):
    """FSDP keeps its gradients out of sight, and accelerate does not say so."""
    loop, loader = loop_of(layout, 1)
    batch = next(iter(loader))
    with loop.accelerator.no_sync(loop.model):
        plainly(loop, batch)
        with pytest.raises(TargetCountError, match=r"accelerator\.backward"):
            loop.backward(batch)


@on_layouts()
@pytest.mark.parametrize("case", ["plain before", "plain after", "torch's clipping"])
@pytest.mark.parametrize("layout", ["ddp2", "fsdp2x2"])
def test_also_without_accumulation(layout, case):
    loop, loader = loop_of(layout, 1)
    with pytest.raises(TargetCountError, match=r"accelerator\.backward"):
        train(loop, loader, **WRONG[case])


def test_one_micro_batch_on_one_process_is_as_with_torch():
    """Its gradients are final at once."""
    want, _ = truth(HEAD, make_data(HEAD))
    loop, loader = loop_of("one_rank", 1)
    train(loop, loader, after=plainly)
    assert relative_error(whole_gradients(loop.model), {name: 2 * g for name, g in want.items()}) < TOLERANCE
    loop, loader = loop_of("one_rank", 1)
    train(loop, loader, ending=clip)
    norm = float(torch.stack([g.norm() for g in want.values()]).norm())
    assert relative_error(whole_gradients(loop.model), {name: 1e-3 / norm * g for name, g in want.items()}) < 1e-4


@on_layouts("one_rank", "ddp2")
def test_a_second_backward_outside_of_accumulate_is_refused(layout):
    """Another loss, or another micro-batch? The gradients of losses add up, those of micro-batches are a mean."""
    loop, loader = loop_of(layout, 1)
    batch = next(iter(loader))
    loop.backward(batch)
    with pytest.raises(InvalidArgumentError, match=r"with accelerator\.accumulate\(model\)"):
        loop.backward(batch)
    loop.optimizer.zero_grad()
    loop.backward(batch)  # of a bad batch that was left out
    loop.optimizer.step()


@on_layouts()
@pytest.mark.parametrize("layout", ["one_rank", "ddp2", "fsdp2x2"])
def test_an_update_by_hand_stops_at_the_next_backward(layout):
    loop, loader = loop_of(layout, 2)
    loop.optimizer.step = lambda: None
    batch = next(iter(loader))
    with loop.accelerator.accumulate(loop.model):
        loop.backward(batch)
    with loop.accelerator.accumulate(loop.model):
        loop.backward(batch)
        with torch.no_grad():
            for p in loop.model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    with pytest.raises(TargetCountError, match="weights were changed"), loop.accelerator.accumulate(loop.model):
        loop.backward(batch)


@on_layouts("one_rank", "ddp2")
def test_a_backward_into_some_parameters_stops_too(layout):
    loop, loader = loop_of(layout, 2)
    with pytest.raises(TargetCountError, match=r"accelerator\.backward"):
        train(loop, loader, before=some_parameters)


# ---- What is right ----


def penalty(loop, batch, index):
    """A gradient penalty's first half: nothing is added up."""
    embeddings = torch.randn(1, 4, 16, requires_grad=True)
    logits = loop.model(inputs_embeds=embeddings)["logits"]
    torch.autograd.grad(logits.sum(), embeddings)


def of_another_model(loop, batch, index):
    teacher = torch.nn.Linear(2, 1)
    teacher(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(teacher.parameters(), lr=0.1).step()


def evaluating(loop, batch, index):
    with torch.no_grad():
        loop.model(**batch)


def looking(loop):
    assert all(p.grad.norm() >= 0 for p in loop.model.parameters() if p.grad is not None)


RIGHT = {
    "autograd.grad": {"before": penalty},
    "autograd.grad after": {"after": penalty},
    "another model": {"before": of_another_model, "after": of_another_model},
    "a forward without gradients": {"before": evaluating, "after": evaluating},
    "reads": {"ending": looking},
}


@pytest.mark.wide
@on_layouts()
@pytest.mark.parametrize("case", RIGHT)
@pytest.mark.parametrize("layout", [*SPREAD, "hsdp2x2", "tp2"])
def test_what_changes_no_gradient_is_left_alone(layout, case):
    loop, loader = loop_of(layout, 2)
    train(loop, loader, **RIGHT[case])
    assert relative_error(whole_gradients(loop.model), truth(HEAD, make_data(HEAD))[0]) < TOLERANCE


@on_layouts("plain_beside_fsdp2x2", "two_meshes2x2")
def test_gradients_that_are_averaged_by_hand_beside_sharded_ones_stay_exact(layout, mesh):
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True)
    model = parallelize(make_net(torch.float32), layout, mesh)
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    index, size = data_rank(mesh)
    x, y, mask = (part.tensor_split(size)[index] for part in make_batch())
    num_targets = mask.sum()
    loss = summed_loss(model, x.float(), y.float(), mask) / num_targets
    accelerator.backward(loss, num_targets=num_targets, model=model)
    sync_plain_gradients(model, layout, mesh)
    optimizer.step()
    assert relative_error(whole_gradients(model), true_mean_gradient()) < TOLERANCE


@on_layouts("ddp2")
def test_gradients_that_are_averaged_by_hand_without_ddp_stay_exact(layout):
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True)
    model = make_net(torch.float32)
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    rank = dist.get_rank()
    x, y, mask = (part.tensor_split(2)[rank] for part in make_batch())
    loss = summed_loss(model, x.float(), y.float(), mask) / mask.sum()
    accelerator.backward(loss, num_targets=mask.sum(), model=model)
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= 2
    optimizer.step()
    assert relative_error(whole_gradients(model), true_mean_gradient()) < TOLERANCE


@on_layouts()
@pytest.mark.parametrize("layout", SPREAD)
@pytest.mark.parametrize("sets_to_none", [True, False])
def test_a_plain_backward_that_is_dropped_counts_for_nothing(layout, sets_to_none):
    """To reserve memory, or to attack the inputs."""
    loop, loader = loop_of(layout, 1)
    plainly(loop, next(iter(loader)))
    loop.model.zero_grad(set_to_none=sets_to_none)

    def attack(loop, batch, index):
        plainly(loop, batch)
        loop.model.zero_grad(set_to_none=sets_to_none)

    train(loop, loader, before=attack)
    assert relative_error(whole_gradients(loop.model), truth(HEAD, make_data(HEAD))[0]) < TOLERANCE


def mask(loop):
    """As textual inversion does: all rows but the new one stay as they are."""
    for name, p in loop.model.named_parameters():
        if name.endswith(LAYERS):
            p.grad[1:] = 0


def mask_by_factor(loop):
    for p in loop.model.parameters():
        if p.grad is not None and p.grad.dim() == 2:
            p.grad *= torch.arange(p.shape[1]) % 2


@on_layouts()
@pytest.mark.parametrize("masking", [mask, mask_by_factor])
@pytest.mark.parametrize("layout", ["one_rank", "ddp2"])
def test_elements_that_are_set_to_zero_stay_zero_and_others_exact(layout, masking):
    loop, loader = loop_of(layout, 2)
    train(loop, loader, ending=masking)
    want, _ = truth(HEAD, make_data(HEAD))
    got = whole_gradients(loop.model)
    masked = {name: torch.where(got[name] == 0, 0, g) for name, g in want.items()}
    assert any((masked[name] != g).any() for name, g in want.items()), "control"
    assert relative_error(got, masked) < TOLERANCE


def mask_what_is_small(loop):
    """Nothing tells that nothing else was changed."""
    for p in loop.model.parameters():
        if p.grad is not None and p.grad.dim() == 2:
            p.grad[p.grad.abs() < 1e-2 * p.grad.abs().max()] = 0


def only_touched(loop):
    for p in loop.model.parameters():
        if p.grad is not None:
            p.grad.nan_to_num_()


@pytest.mark.parametrize("touching", [mask_what_is_small, only_touched])
def test_gradients_that_are_touched_and_stay_are_exact(touching):
    loop, loader = loop_of("one_rank", 2)
    want, _ = truth(HEAD, make_data(HEAD))
    for step in range(3):
        train(loop, loader, ending=touching)
        if not step:
            got = whole_gradients(loop.model)
            assert (
                relative_error(got, {name: torch.where(got[name] == 0, 0, g) for name, g in want.items()}) < TOLERANCE
            )
        loop.optimizer.zero_grad()


@on_layouts("one_rank", "ddp2")
def test_torchs_clipping_stops_when_it_first_has_something_to_clip(layout):
    loop, loader = loop_of(layout, 2)
    limit = 1e6
    for _ in range(3):
        train(loop, loader, ending=lambda loop: clip_grad_norm_(loop.model.parameters(), limit))
        loop.optimizer.zero_grad()
    limit, before = 1e-3, weights_of(loop)
    with pytest.raises(TargetCountError, match=r"accelerator\.clip_grad_norm_"):
        train(loop, loader, ending=clip)
    assert all(torch.equal(p, old) for p, old in zip(weights_of(loop), before, strict=True))


# ---- Optimizers that are not prepared ----


@on_layouts()
@pytest.mark.parametrize("when", ["streamed", "first"])
@pytest.mark.parametrize("layout", SPREAD)
def test_an_optimizer_that_is_not_prepared_does_not_step(layout, when):
    loop, loader = loop_of(layout, 1, counts=when)
    assert not loop.accelerator.windows.by_models, "control: nothing is open"
    optimizer = torch.optim.AdamW(loop.model.parameters(), lr=0.1)
    loop.backward(next(iter(loader)))
    with pytest.raises(TargetCountError, match=r"accelerator\.prepare\(optimizer\)"):
        optimizer.step()


def test_others_step_as_ever():
    loop, loader = loop_of("one_rank", 1)
    other = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    before = other.weight.detach().clone()
    loop.backward(next(iter(loader)))
    optimizer.step()
    assert not torch.equal(other.weight, before)


@pytest.mark.parametrize("kind", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_sparse_gradients_are_refused_before_the_first_backward(kind):
    reset_accelerate()
    accelerator = GradUtilsAccelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Sequential(kind(8, 2, sparse=True), torch.nn.Linear(2, 1)))
    with pytest.raises(InvalidArgumentError, match="the gradient of 0 is sparse"):
        accelerator.backward(model(torch.ones(2, 3, dtype=torch.long)).mean(), num_targets=2)


# ---- Nothing stays ----


@on_layouts("one_rank", "ddp2", "fsdp2x2")
def test_nothing_is_watched_after_the_first_window(layout):
    hooks = torch_optimizer._global_optimizer_pre_hooks
    gc.collect()  # what earlier tests have left
    others = len(hooks)
    loop, loader = loop_of(layout, 2)
    model = getattr(loop.model, "module", loop.model)
    hooked = set(model._forward_hooks)
    for batch in loader:
        with loop.accelerator.accumulate(loop.model):
            loop.backward(batch)
            assert len(hooks) == others + 1
            loop.optimizer.step()
    loop.optimizer.zero_grad()
    loop.backward(next(iter(loader)))
    assert len(hooks) == others, "of optimizers, from the second window on"
    gone = hooked - set(model._forward_hooks)
    assert len(gone) == (layout != "one_rank"), "the hook that notes plain backwards"
    loop.optimizer.zero_grad()
    plainly(loop, next(iter(loader)))  # later windows cost nothing, and say nothing


@on_layouts("ddp2")
def test_a_copied_model_notes_nothing_and_a_freed_one_is_gone(layout):
    loop, loader = loop_of(layout, 1)
    [hook] = [h for h in loop.model.module._forward_hooks.values() if type(h).__name__ == "_PlainBackward"]
    for copied in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        assert copied(loop.model, (), torch.ones(1, requires_grad=True) * 2) is None
        assert copied.take() == (False, False)
    num_targets = HEADS[HEAD].targets(next(iter(loader)))
    loop.accelerator.backward(loop.model(**next(iter(loader)))["loss"], num_targets=num_targets)
    inside = weakref.ref(loop.model.module)
    del hook, copied
    gc.collect()
    gc.disable()
    try:
        loop.accelerator.free_memory()
        del loop
        assert not torch_optimizer._global_optimizer_pre_hooks
    finally:
        gc.enable()
    gc.collect()
    assert inside() is None
