"""What a user deletes is freed at once, and what is copied or pickled trains on, as with accelerate's Accelerator."""

import contextlib
import copy
import gc
import pickle
import warnings
import weakref
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin
from hf_gradutils.errors import GradUtilsError, InvalidArgumentError, NonfiniteGradientError
from hf_gradutils.gradients.partial_sums import _HookOnForward
from tests.harness.accelerator_cases import FUSED
from tests.harness.gradients import relative_error
from tests.harness.half_cases import with_scaler
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import reset_accelerate

BOTH = pytest.mark.parametrize("accelerator_class", [Accelerator, GradUtilsAccelerator])
"""accelerate's own is the control: it shows that the test can pass."""
ROWS = [torch.randn(1 + x % 3, 2, generator=torch.Generator().manual_seed(x)) for x in range(8)]
"""Each a micro-batch, of one target to three."""


class Net(torch.nn.Module):
    built: ClassVar[list[weakref.ref[torch.nn.Module]]] = []

    def __init__(self):
        super().__init__()
        self.built.append(weakref.ref(self))
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x):
        return self.linear(x).square().mean()


@contextlib.contextmanager
def without_collections():
    """Only what no reference holds any more is freed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def halved(step):
    return 0.5**step


def prepared(accelerator_class, *, optimizer=torch.optim.SGD, scaled=False, **options):
    reset_accelerate()
    accelerator = accelerator_class(cpu=True, **options)
    if scaled:
        with_scaler(accelerator)
    model = Net()
    made = optimizer(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, halved)
    loader = DataLoader(ROWS)
    return accelerator, *accelerator.prepare(model, made, loader, scheduler)


def train(accelerator, model, optimizer, loader, scheduler, *, raises=False):
    counts = isinstance(accelerator, GradUtilsAccelerator)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch), **{"num_targets": batch.shape[1]} if counts else {})
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if raises:
                raise KeyError("of the user's")


def references(*objects):
    return [weakref.ref(thing) for thing in objects]


def alive(made):
    return [type(thing).__name__ for reference in made if (thing := reference()) is not None]


# ---- Freed at once ----


def only_prepares(accelerator_class):
    objects = prepared(accelerator_class)
    return references(*objects, next(objects[1].parameters()))


def trains(accelerator_class):
    objects = prepared(accelerator_class, gradient_accumulation_steps=2)
    train(*objects)
    return references(*objects, next(objects[1].parameters()))


def trains_two_after_each_other(accelerator_class):
    return [*trains(accelerator_class), *trains(accelerator_class)]


def raises_in_the_loop(accelerator_class):
    objects = prepared(accelerator_class, gradient_accumulation_steps=2)
    with contextlib.suppress(KeyError):
        train(*objects, raises=True)
    return references(*objects)


def stops_in_mid_window(accelerator_class):
    objects = prepared(accelerator_class, gradient_accumulation_steps=3)
    train(*objects)
    return references(*objects)


def trains_with_a_fused_optimizer(accelerator_class):
    objects = prepared(accelerator_class, optimizer=FUSED)
    train(*objects)
    return references(*objects)


CASES = [
    only_prepares,
    trains,
    trains_two_after_each_other,
    raises_in_the_loop,
    stops_in_mid_window,
    trains_with_a_fused_optimizer,
]


@BOTH
@pytest.mark.parametrize("case", CASES)
@on_layouts("one_rank", "ddp2")
def test_all_is_freed_with_its_last_reference(case, accelerator_class, layout):
    with without_collections():
        assert alive(case(accelerator_class)) == []


@BOTH
def test_free_memory_lets_go_of_all(accelerator_class):
    with without_collections():
        accelerator, *objects = prepared(accelerator_class, optimizer=FUSED, gradient_accumulation_steps=3)
        train(accelerator, *objects)
        made = references(*objects, next(objects[0].parameters()))
        accelerator.free_memory()
        del objects
        assert alive(made) == []


def test_free_memory_lets_go_of_what_the_loss_scale_holds():
    objects = prepared(GradUtilsAccelerator, scaled=True)
    train(*objects)
    scale = objects[0].windows.loss_scale
    assert scale.is_removed
    objects[0].free_memory()
    assert not scale.is_removed
    assert not scale.scaler._per_optimizer_states, "it has been updated"


def calls_backward_without_a_count():
    accelerator, model, *_ = prepared(GradUtilsAccelerator)
    accelerator.backward(model(ROWS[0]))


def calls_backward_after_the_step():
    accelerator, model, optimizer, *_ = prepared(GradUtilsAccelerator)
    with accelerator.accumulate(model):
        accelerator.backward(model(ROWS[0]), num_targets=2)
        optimizer.step()
        accelerator.backward(model(ROWS[0]), num_targets=2)


def has_no_finite_gradient(on_nonfinite="raise", optimizer=torch.optim.SGD):
    plugin = GradUtilsPlugin(on_nonfinite=on_nonfinite, max_skipped_steps=0)
    objects = prepared(GradUtilsAccelerator, optimizer=optimizer, gradient_accumulation_plugin=plugin)
    accelerator, model, optimizer, *_ = objects
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(ROWS[0] * float("inf")), num_targets=2)
            optimizer.step()


def has_none_and_may_skip_no_step():
    has_no_finite_gradient("skip")


def has_none_and_skips_on_the_device():
    has_no_finite_gradient(optimizer=FUSED)


@pytest.mark.parametrize(
    "wrong",
    [
        calls_backward_without_a_count,
        calls_backward_after_the_step,
        has_no_finite_gradient,
        has_none_and_may_skip_no_step,
        has_none_and_skips_on_the_device,
    ],
)
@on_layouts("one_rank", "ddp2")
def test_an_error_of_ours_keeps_nothing_alive(wrong, layout):
    Net.built.clear()
    with without_collections():
        with contextlib.suppress(GradUtilsError):
            wrong()
            pytest.fail("no error")
        assert len(Net.built) == 1
        assert alive(Net.built) == []


def test_a_parameter_whose_increments_are_summed_is_freed_with_its_module():
    with without_collections():
        module = torch.nn.Linear(2, 1)
        module.register_forward_pre_hook(_HookOnForward(None))
        module(torch.ones(2))
        made = references(module, module.weight)
        assert module.weight._backward_hooks
        del module
        assert alive(made) == []


# ---- Copied and pickled ----


def pickled(thing):
    # A copied optimizer has lost the mark by which torch's schedulers see that it steps first.
    warnings.filterwarnings("ignore", "Seems like `optimizer.step")
    return pickle.loads(pickle.dumps(thing))


def deepcopied(thing):
    warnings.filterwarnings("ignore", "Seems like `optimizer.step")
    return copy.deepcopy(thing)


NORM_TYPE = 3.0
TOLERANCE = 1e-5
SIZE = {"one_rank": 3, "ddp2": 6}
"""Rows of a window; 8 leave a short last one."""


def settings():
    plugin = GradUtilsPlugin(num_steps=3, norm_type=NORM_TYPE, sync="every", grad_norm_groups="layer")
    return {"gradient_accumulation_plugin": plugin}


def weights_of(model):
    return {name.removeprefix("module."): p.detach().double() for name, p in model.named_parameters()}


def by_hand(num_epochs, layout):
    """The weights after that, in float64 on one process with whole windows."""
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, halved)
    for _ in range(num_epochs):
        for start in range(0, len(ROWS), SIZE[layout]):
            model(torch.cat(ROWS[start : start + SIZE[layout]]).double()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=NORM_TYPE)
            optimizer.step()
            for _ in range(1 if layout == "one_rank" else 2):  # accelerate steps it once for each rank
                scheduler.step()
            optimizer.zero_grad()
    return weights_of(model)


@BOTH
def test_an_accelerator_may_be_pickled_before_it_prepares(accelerator_class):
    reset_accelerate()
    accelerator = pickled(accelerator_class(cpu=True, gradient_accumulation_steps=2))
    assert type(accelerator) is accelerator_class
    assert accelerator.gradient_accumulation_steps == 2


@BOTH
def test_a_deep_copy_is_the_same_accelerator(accelerator_class):
    accelerator, *_ = prepared(accelerator_class)
    assert copy.deepcopy(accelerator) is accelerator


@pytest.mark.parametrize("num_epochs_before", [0, 1])
@on_layouts("one_rank", "ddp2")
def test_a_pickled_accelerator_trains_exactly_on_what_was_pickled_with_it(num_epochs_before, layout):
    objects = prepared(GradUtilsAccelerator, **settings())
    for _ in range(num_epochs_before):
        train(*objects)
    copies = pickled(objects)
    assert copies[0].windows.plugin == objects[0].windows.plugin
    train(*copies)
    assert relative_error(weights_of(copies[1]), by_hand(num_epochs_before + 1, layout)) < TOLERANCE
    assert relative_error(weights_of(objects[1]), by_hand(num_epochs_before, layout)) < TOLERANCE, "untouched"
    train(*objects)
    assert relative_error(weights_of(objects[1]), by_hand(num_epochs_before + 1, layout)) < TOLERANCE


def test_control_accelerates_own_does_not_accumulate_once_pickled():
    objects = pickled(prepared(Accelerator, gradient_accumulation_steps=3))
    steps = []
    objects[2].optimizer.register_step_post_hook(lambda *_: steps.append(1))
    train(*objects)
    assert len(steps) == 8, "the optimizer has its own word on when gradients are synchronised"


@on_layouts("one_rank", "ddp2")
def test_a_pickled_accelerator_prepares_and_trains_new_objects(layout):
    accelerator = pickled(prepared(GradUtilsAccelerator, **settings())[0])
    accelerator.free_memory()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, halved)
    model, *others = accelerator.prepare(model, optimizer, DataLoader(ROWS), scheduler)
    train(accelerator, model, *others)
    assert relative_error(weights_of(model), by_hand(1, layout)) < TOLERANCE


@pytest.mark.parametrize("copied", [deepcopied, pickled])
@on_layouts("one_rank", "ddp2")
def test_copied_objects_train_exactly_once_they_are_prepared_again(copied, layout):
    accelerator, *objects = prepared(GradUtilsAccelerator, **settings())
    model, optimizer, loader, scheduler = copied(objects)
    with pytest.raises(InvalidArgumentError, match="prepare a copy again"):
        optimizer.step()
    accelerator.free_memory()
    train(accelerator, *accelerator.prepare(model, optimizer, loader, scheduler))
    assert relative_error(weights_of(model), by_hand(1, layout)) < TOLERANCE


def test_a_shallow_copy_shares_the_windows():
    accelerator, *objects = prepared(GradUtilsAccelerator, **settings())
    copied = copy.copy(accelerator)
    train(copied, *objects)
    assert relative_error(weights_of(objects[0]), by_hand(1, "one_rank")) < TOLERANCE
    assert copied.report is accelerator.report


def test_an_optimizer_without_its_accelerator_does_not_step():
    accelerator, model, optimizer, *_ = prepared(GradUtilsAccelerator)
    accelerator.backward(model(ROWS[0]), num_targets=2)
    del accelerator
    with pytest.raises(InvalidArgumentError, match="its own is gone"):
        optimizer.step()


def test_pickling_after_a_bad_step_raises_what_the_next_step_would():
    plugin = GradUtilsPlugin(on_nonfinite="raise")
    objects = prepared(GradUtilsAccelerator, optimizer=FUSED, gradient_accumulation_plugin=plugin)
    accelerator, model, optimizer, *_ = objects
    with accelerator.accumulate(model):
        accelerator.backward(model(ROWS[0] * float("inf")), num_targets=2)
        optimizer.step()
    with pytest.raises(NonfiniteGradientError):
        pickled(objects)


def test_an_accelerator_pickled_after_an_fp16_step_goes_on_with_its_scale():
    objects = prepared(GradUtilsAccelerator, scaled=True, **settings())
    train(*objects)
    copies = pickled(objects)
    train(*copies)
    assert relative_error(weights_of(copies[1]), by_hand(2, "one_rank")) < TOLERANCE
