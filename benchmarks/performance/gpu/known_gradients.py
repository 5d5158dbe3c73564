"""Gradients of which the norm is known without measuring, and who takes their norm and scales them.

Every gradient begins with 1/8, 2/8, … 7/8 and then again, which every dtype holds exactly.

                             passes over the gradients
    norm                     1 read
    norm and scale           1 read, then 1 read and 1 write   ours, and torch's clip, which divides by no targets
    rescale, norm, scale     1 read and 1 write more           three passes: divide by the targets, then torch's clip
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.performance.gpu import clock
from benchmarks.performance.methods import AUTOMODEL, FOLDED, MAX_NORM, METHODS, OURS, TORCH
from hf_gradutils.window import AccumulationWindow, WindowReport

LARGEST = 2**26
"""Elements of one parameter."""
NUM_TARGETS = 4
"""Ours, and methods that rescale, divide by it."""
LARGEST_ERROR = {torch.float32: 1e-6, torch.bfloat16: 1e-5}
"""Of a norm of ours, relative."""
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
"""Of a number that was scaled once, relative."""
_CYCLE = 7


class KnownGradients:
    """A model, and gradients of it that can be filled in again and again.

    Args:
        sizes: Elements of each parameter.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, dtype: torch.dtype):
        self.device, self.dtype, self.num_elements = device, dtype, sum(sizes)
        self.model = nn.ParameterList(nn.Parameter(torch.zeros(n, device=device, dtype=dtype)) for n in sizes)
        for parameter in self.model:
            parameter.grad = torch.empty_like(parameter)
        cycle = torch.arange(1, _CYCLE + 1, device=device, dtype=dtype) / 8
        self._values = cycle.repeat(-(-max(sizes) // _CYCLE))
        self.norm = sum(map(_sum_of_squares, sizes)) ** 0.5
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """Give the gradients their values; a clip changes them."""
        torch._foreach_copy_([p.grad for p in self.model], [self._values[: p.numel()] for p in self.model])

    def scaled(self) -> Tensor:
        """The first values of the first gradient once it is the mean, clipped to :data:`MAX_NORM`; float64."""
        factor = min(1.0, MAX_NORM / (self.norm / NUM_TARGETS + 1e-6)) / NUM_TARGETS
        return self._values[:_CYCLE].double().cpu() * factor

    def error_of(self, found: Tensor) -> float:
        """The largest relative difference of what should be :meth:`scaled`."""
        want = self.scaled()[: found.numel()]
        return float((found[:_CYCLE].detach().double().cpu() / want - 1).abs().max())


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sizes_of(num_elements: int) -> list[int]:
    """Of the parameters that have so many elements together."""
    return [min(LARGEST, num_elements - start) for start in range(0, num_elements, LARGEST)]


def fitting(num_elements: int, free_bytes: float, dtype: torch.dtype, num_copies: int) -> int:
    """So many elements, or as many as fit ``num_copies`` times into 80 % of the memory."""
    most = int(min(num_elements, free_bytes * 0.8 // (num_copies * dtype.itemsize)))
    return most // LARGEST * LARGEST or most


def _sum_of_squares(num_elements: int) -> float:
    whole, rest = divmod(num_elements, _CYCLE)
    return (whole * sum(k * k for k in range(1, _CYCLE + 1)) + sum(k * k for k in range(1, rest + 1))) / 64


# ---- Who does what ----


@dataclass(frozen=True)
class Method:
    """One way to a norm, and to clipped gradients if it scales."""

    prepare: Callable[[nn.Module], Callable[[], Tensor]]
    """Model → the call to measure, which returns the norm."""
    num_passes: int | None
    """Over the gradients; None where they have not been counted."""
    text: str
    """The same in words."""
    divides: bool = False
    """Its norm is that of the mean gradient."""
    scales: bool = True


def window_end(model: nn.Module, *, scales: bool) -> Callable[[], WindowReport]:
    """Ours: one micro-batch is weighed, and the window ends."""
    device = next(model.parameters()).device
    window = AccumulationWindow(device)
    loss, num_targets = torch.ones((), device=device), torch.tensor(NUM_TARGETS, device=device)

    def end() -> WindowReport:
        window.weigh(loss, num_targets)
        return window.close(model, MAX_NORM, scales=scales)

    return end


def _ours(model: nn.Module, *, scales: bool) -> Callable[[], Tensor]:
    end = window_end(model, scales=scales)
    return lambda: end().grad_norm


def three_passes(model: nn.Module) -> Callable[[], Tensor]:
    """Divide by the targets, take the norm, scale."""
    num_targets = torch.tensor(NUM_TARGETS, device=next(model.parameters()).device)

    @torch.no_grad()
    def call() -> Tensor:
        gradients = [p.grad for p in model.parameters()]
        torch._foreach_mul_(gradients, num_targets.reciprocal().to(gradients[0].dtype))
        return nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)

    return call


def _norm_alone(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: nn.utils.get_total_norm([p.grad for p in model.parameters()])


def methods() -> dict[str, Method]:
    """Name → method; Automodel's where it is installed."""
    found = {
        "torch's norm alone": Method(_norm_alone, 1, "1 read", scales=False),
        FOLDED: Method(functools.partial(_ours, scales=False), 1, "1 read", divides=True, scales=False),
        OURS: Method(functools.partial(_ours, scales=True), 3, "2 reads, 1 write", divides=True),
        TORCH: Method(METHODS[TORCH], 3, "2 reads, 1 write"),
        "three passes": Method(three_passes, 5, "3 reads, 2 writes", divides=True),
    }
    if AUTOMODEL in METHODS:
        found[AUTOMODEL] = Method(METHODS[AUTOMODEL], None, "not counted")
    return found


# ---- What must hold ----


def faults(name: str, method: Method, known: KnownGradients) -> list[str]:
    """Broken promises of a method of ours: it raises, it waits, its norm or its gradients are off."""
    where = f"{name}, {known.num_elements:,} elements in {name_of(known.dtype)}"
    found = clock.attempt(functools.partial(_faults, method, known), known.device)
    return [f"{where}: {fault}" for fault in ([found] if isinstance(found, str) else found)]


def _faults(method: Method, known: KnownGradients) -> list[str]:
    call = method.prepare(known.model)
    call()  # whatever is made once is made here
    found = []
    if reason := clock.why_it_waits(call, known.device):
        found.append(f"waits for the device: {reason}")
    known.fill()
    error = abs(float(call()) * (NUM_TARGETS if method.divides else 1) / known.norm - 1)
    if not error <= LARGEST_ERROR[known.dtype]:
        found.append(f"the norm is off by {error:.1e}")
    if method.scales:
        error = known.error_of(next(known.model.parameters()).grad)
        if not error <= ROUNDING[known.dtype]:
            found.append(f"scaled gradients are off by {error:.1e}")
    return found
