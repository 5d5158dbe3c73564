"""The global norms of gradients, from one packed reduction."""

import itertools
import math
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from hf_gradutils._collectives import all_reduce_, gather_extremes
from hf_gradutils._devices import on_device
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.gradients.names import unwrapped_name
from hf_gradutils.gradients.of_model import LocalGradients, Slots
from hf_gradutils.gradients.plan import Plan
from hf_gradutils.gradients.power_sums import power_sums, root


@dataclass(frozen=True, slots=True)
class Norms:
    """Global norms, and the contributions of this rank's parameters."""

    total: Tensor
    """Shape (), float64."""
    powers: Tensor
    """Σ |x|^p of this rank's part of each present gradient."""
    _plan: Plan
    _slots: Slots
    _by_slot: Tensor
    _norm_type: float

    def of_groups(self) -> dict[str, Tensor]:
        """Norm group → norm, shape (); their p-norm is the total."""
        norms = torch.zeros(len(self._plan.groups), dtype=torch.float64, device=self.total.device)
        if math.isinf(self._norm_type):
            norms.scatter_reduce_(0, self._slots.of_groups, self._by_slot, "amax")
        else:
            norms = root(norms.index_add_(0, self._slots.of_groups, self._by_slot), self._norm_type)
        return dict(zip(self._plan.groups, norms.unbind(), strict=True))

    def nonfinite_parameters(self) -> list[str]:
        """Names of this rank's parameters whose gradients are not finite. A host sync."""
        powers = zip(self._slots.indices, self.powers.tolist(), strict=True)
        return [unwrapped_name(self._plan.names[parameter]) for parameter, power in powers if not math.isfinite(power)]


def total_norm(
    gradients: LocalGradients, norm_type: float, sums: Tensor | None = None, *, foreach: bool = True
) -> tuple[Norms, Tensor]:
    """The global p-norms of the gradients, and any further sums in the same collective. Called under ``no_grad``.

    Args:
        gradients: Of this step; every rank of the plan's domain must call, with or without gradients.
        norm_type: p, greater than 0; inf is the largest element.
        sums: Shape (n,), float64, on the device of the norms: further numbers to sum over the domain; None for none.
        foreach: As in :func:`power_sums`.

    Returns:
        ``(norms, sums)``. If only some ranks have a gradient of a plain replica, these count it whole.

    Raises:
        InvalidArgumentError: some gradients are complex, and p is not 2.

    Collectives: one all-reduce per axis of the domain (one all-gather for p = inf). Host syncs: none; one where norms
        are computed on the CPU and the group cannot carry them from there.
    """
    plan, slots, device = gradients.plan, gradients.slots, gradients.slots.zeros.device
    if gradients.are_complex and norm_type != 2.0:
        raise InvalidArgumentError(f"gradients of complex parameters have no {norm_type:g}-norm here, only norm_type=2")
    if sums is None:
        sums = torch.zeros(0, dtype=torch.float64, device=device)
    powers = _power_sums(gradients, norm_type, device, foreach=foreach)
    if math.isinf(norm_type):
        own = slots.zeros.scatter_reduce(0, slots.of_gradients, powers, "amax")
        sums, by_slot = gather_extremes(plan.domain, sums, own)
        return Norms(by_slot.amax(), powers, plan, slots, by_slot, norm_type), sums

    # [the sums | Σ |g|^p of each slot | count of each slot]
    own = slots.zeros.index_add(0, slots.of_gradients, powers)
    packed = all_reduce_(plan.domain, torch.cat((sums, own, slots.counted)))
    num_slots = len(plan.weights)
    sums, added, counted = packed.split_with_sizes((sums.numel(), num_slots, num_slots))
    by_slot = added / counted
    return Norms(root(by_slot.sum(), norm_type), powers, plan, slots, by_slot, norm_type), sums


def _power_sums(gradients: LocalGradients, norm_type: float, device: torch.device, *, foreach: bool) -> Tensor:
    """Σ |x|^p of each gradient, on ``device``."""
    if gradients.kind.device is not None or not gradients.values:
        powers = power_sums(gradients.values, norm_type, foreach=foreach, sizes=gradients.sizes)
        return on_device(powers, device)
    by_device = itertools.groupby(gradients.values, key=attrgetter("device"))
    return torch.cat([on_device(power_sums(list(part), norm_type, foreach=foreach), device) for _, part in by_device])
