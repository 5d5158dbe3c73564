"""DeepSpeed's engine in a check: its steps show the gradient that they would take, and change nothing.

Under ZeRO no gradient is in ``.grad``: it lies in partitions between the last backward of a window and ``engine.step``,
which accelerate calls inside ``backward``. Here ``engine.step`` reads it before the engine clips it, and the engine's
optimizer takes no step: the engine then copies master weights that are as before, and clears its gradients.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.gradients.names import unwrapped_name
from hf_gradutils.upstream.deepspeed import (
    GRAD_NORM,
    counting_in,
    drop_gradients,
    full_gradient,
    gathered,
    is_engine,
    loss_scale_of,
    optimizers_in,
    scale_adapts,
)

_MOST_OVERFLOWS = 64
"""Steps in which fp16's loss scale falls from 2^32 to 1, with some patience before it falls."""
_PLAIN = (bool, int, float, str, type(None))


class DryStep:
    """Takes the place of ``engine.step``.

    Args:
        engine: DeepSpeed's, whose optimizers do not step.
    """

    def __init__(self, engine: Any):
        self._engine, self._step = engine, engine.step
        self._steps: list[dict[str, Tensor]] = []
        self._mesh: Any = None
        self.num_micro_batches = int(engine.gradient_accumulation_steps())
        """Of a window; the engine divides by it what some loops pass to its backward."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Keep the gradient, if a window ends here; the engine clears its own."""
        if self._engine.is_gradient_accumulation_boundary():
            self._steps.append(self._read())
        self._step(*args, **kwargs)

    def start_window(self, num_micro_batches: int) -> None:
        """Let the engine step after so many backwards, if its caller does not say when."""
        self.num_micro_batches, self._engine.micro_steps = num_micro_batches, 0

    def measure(self, run: Callable[[], float]) -> tuple[float, dict[str, Tensor]]:
        """Run a window; again while fp16's loss scale has to come down, as training would.

        Returns:
            The loss, and name → gradient before clipping, of which this rank keeps a part as a DTensor.

        Collectives: those of ``run``, and one for each gradient.

        Raises:
            InvalidArgumentError: the engine has not stepped once.
        """
        for _ in range(_MOST_OVERFLOWS):
            self._steps.clear()
            loss = run()
            if len(self._steps) != 1:
                raise InvalidArgumentError(
                    f"DeepSpeed's engine has taken {len(self._steps)} steps in one window. It takes one in each "
                    "self.accelerator.backward(loss) of the last micro-batch: add the losses of a micro-batch up and "
                    "call that once, and not loss.backward()"
                )
            if self._engine.was_step_applied() or not scale_adapts(self._engine):
                break
        return loss, self._steps.pop()

    @torch.no_grad()
    def _read(self) -> dict[str, Tensor]:
        gradients, scale = {}, loss_scale_of(self._engine)
        for name, p in self._engine.module.named_parameters():
            if p.requires_grad:
                gradient = full_gradient(p)
                whole = torch.zeros_like(p, dtype=torch.float32) if gradient is None else gradient.float() / scale
                gradients[unwrapped_name(name)] = self._part(whole)
        return gradients

    def _part(self, gradient: Tensor) -> Tensor:
        """This rank's share of memory for a gradient that all have."""
        if not dist.is_initialized() or dist.get_world_size() == 1 or not gradient.dim():
            return gradient
        if self._mesh is None:
            self._mesh = init_device_mesh(gradient.device.type, (dist.get_world_size(),))
        return distribute_tensor(gradient, self._mesh, [Shard(0)], src_data_rank=None)


def dry_step_of(model: nn.Module) -> DryStep | None:
    """The engine's step during a check; None for a model that is no engine."""
    step = vars(model).get("step")
    return step if isinstance(step, DryStep) else None


@contextlib.contextmanager
def steps_are_dry(model: nn.Module) -> Iterator[None]:
    """In a check, an engine steps dry, without clipping; counters, loss scale and scheduler are as before afterwards.

    Nothing for a model that is no engine. Collectives: none.
    """
    if not is_engine(model):
        yield
        return
    engine: Any = model
    step = DryStep(engine)
    with contextlib.ExitStack() as stack:
        for one in counting_in(engine):
            stack.enter_context(_counts_kept(one))
        stack.callback(drop_gradients, engine)
        for optimizer in optimizers_in(engine):
            stack.enter_context(_no_new_keys(optimizer.state))
            stack.enter_context(_replaced(optimizer, step=lambda closure=None: None))
        stack.enter_context(_replaced(engine.monitor, enabled=False))
        stack.enter_context(
            _replaced(
                engine,
                step=step,
                lr_scheduler=None,
                gradient_clipping=lambda: 0.0,
                gradient_accumulation_steps=lambda: step.num_micro_batches,
            )
        )
        yield


def whole_state(model: nn.Module, *, keeps: bool) -> dict[str, Tensor]:
    """The state of a model that ZeRO-3 has partitioned, on the CPU; empty without ``keeps``.

    Collectives: one gather for each parameter; every rank must call.
    """
    wholes: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if id(tensor) not in wholes:
            with gathered(tensor):
                wholes[id(tensor)] = tensor.detach().cpu().clone() if keeps else torch.empty(0)
    return {name: wholes[id(tensor)] for name, tensor in state.items()} if keeps else {}


@contextlib.contextmanager
def _replaced(thing: Any, **values: Any) -> Iterator[None]:
    """Other attributes inside; those of the class show again afterwards."""
    before = {name: vars(thing)[name] for name in values if name in vars(thing)}
    vars(thing).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(thing)[name]
        vars(thing).update(before)


@contextlib.contextmanager
def _counts_kept(thing: Any) -> Iterator[None]:
    """Numbers, words and flags in attributes are as before afterwards."""

    def plain() -> dict[str, Any]:
        return {name: x for name, x in vars(thing).items() if isinstance(x, _PLAIN) or name == GRAD_NORM}

    before, was_there = plain(), set(vars(thing))
    try:
        yield
    finally:
        for name in plain():
            if name in before:
                vars(thing)[name] = before[name]
            elif name not in was_there:
                del vars(thing)[name]


@contextlib.contextmanager
def _no_new_keys(state: dict[Any, Any]) -> Iterator[None]:
    """Entries of a dict that come inside go afterwards."""
    before = set(map(id, state))
    try:
        yield
    finally:
        for key in [key for key in state if id(key) not in before]:
            del state[key]
