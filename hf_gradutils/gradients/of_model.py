"""The gradients of a model on this rank: their parameters, layouts, and the plan that counts each once.

gradients_of(model)   the trained parameters and their plan; cached until either changes
.read()               this rank's parts of the gradients, as plain tensors
total_norm(…)         the one all-reduce
scale_(…)             in place
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from hf_gradutils._collectives import world_domain
from hf_gradutils._devices import Kind, common_kind, on_device
from hf_gradutils.gradients.names import NormGroups
from hf_gradutils.gradients.ownership import Ownership, check_ownership
from hf_gradutils.gradients.plan import Plan, plan_by_name
from hf_gradutils.gradients.power_sums import as_real
from hf_gradutils.upstream.dtensor import layouts_of, local_tensor, local_tensors_and_layouts
from hf_gradutils.upstream.torch import grads_of, trained_parameters

_MAX_HELD = 8
"""Plans per model: one for all parameters, others for some that are clipped separately."""

_held: WeakKeyDictionary[nn.Module, list["Gradients"]] = WeakKeyDictionary()


def gradients_of(
    model: nn.Module,
    parameters: Sequence[nn.Parameter] | None = None,
    *,
    group: ProcessGroup | None = None,
    ownership: Ownership | None = None,
    norm_groups: NormGroups = None,
) -> "Gradients":
    """Plan the gradients of a model; cached until its parameters, their layouts or the settings change.

    ``parameters`` are some of ``trained_parameters(model)``, in that order; None is all of them. ``group`` has all
    ranks that train the model. Other arguments as in :func:`plan_by_name`.

    Collectives: the first call for a model gathers one object per rank over ``group``; later ones none.
    Host syncs: as :func:`plan_by_name` in the first call.

    Raises:
        ReplicaMismatchError: as :func:`plan_by_name`.
    """
    ownership = check_ownership(ownership or {})
    parameters = trained_parameters(model) if parameters is None else parameters
    layouts = layouts_of(parameters)
    domain = world_domain(group)
    grouping = norm_groups if norm_groups is None or isinstance(norm_groups, str) else tuple(norm_groups.items())
    settings = (domain.groups, tuple(ownership.items()), grouping)
    held = _held.setdefault(model, [])
    for gradients in held:
        if gradients.fits(parameters, layouts, settings):
            return gradients
    gradients = Gradients(parameters, plan_by_name(model, parameters, domain, ownership, norm_groups), settings)
    # Do not keep parameters alive that the model no longer has, such as whole ones from before it was sharded.
    current = {id(p) for p in model.parameters()}
    held[:] = [other for other in held if all(id(p) in current for p in other.parameters)][: _MAX_HELD - 1]
    held.insert(0, gradients)
    return gradients


class Gradients:
    """The gradients of some parameters, read anew at every step.

    Args:
        parameters: The same ones at every step.
        plan: Counts each element once.
        settings: Of the plan, beside the parameters.
    """

    def __init__(self, parameters: Sequence[Tensor], plan: Plan, settings: object = None):
        self.parameters = parameters
        self.plan = plan
        self._settings = settings
        self._layouts = layouts_of(parameters)
        # Layouts of the last step's gradients, mostly the same objects again. Comparing layouts of gradients with those
        # of parameters, or measuring 300 tensors, takes longer than the rest of a read.
        self._seen: tuple[Sequence[int], list[object]] | None = None
        self._are_aligned = True
        self._measured: tuple[list[int], Kind] | None = None
        self._slots: Slots | None = None
        self._are_complex = any(p.is_complex() for p in parameters)

    def fits(self, parameters: Sequence[Tensor], layouts: list[object], settings: object) -> bool:
        """True if the plan is for these parameters, layouts and settings."""
        is_same = len(self.parameters) == len(parameters) and all(map(operator.is_, self.parameters, parameters))
        return is_same and self._layouts == layouts and self._settings == settings

    def read(self, device: torch.device | None = None) -> "LocalGradients":
        """Return this rank's parts of the present gradients. Called under ``no_grad``.

        Args:
            device: Of the norms; default: the parameters' device.

        Collectives: none; one per gradient whose layout differs from its parameter's (a Partial one), over the mesh
            dims that differ, and then each rank of its mesh must hold such a gradient.
        """
        grads = grads_of(self.parameters)
        indices: Sequence[int] = range(len(grads))
        present = [grad for grad in grads if grad is not None]
        if len(present) < len(grads):
            indices = [index for index, grad in enumerate(grads) if grad is not None]
        shards, layouts = local_tensors_and_layouts(present)
        if self._seen != (indices, layouts):
            self._seen, self._measured = (indices, layouts), None
            self._are_aligned = layouts == layouts_of([self.parameters[index] for index in indices])
        values = shards if self._are_aligned else self._align(indices, present)
        if self._are_complex:
            shards, values = list(map(as_real, shards)), list(map(as_real, values))
        sizes, kind = self._measure(values, shards, are_dtensors=len(layouts) == len(present))
        if 0 in sizes or kind.device is None:  # drop empty shards, and sort by device if some are offloaded
            order = sorted((i for i, size in enumerate(sizes) if size), key=lambda i: str(shards[i].device))
            shards, values = [shards[i] for i in order], [values[i] for i in order]
            indices, sizes = [indices[i] for i in order], [sizes[i] for i in order]
            kind = common_kind(shards)
        if device is None:
            device = self.parameters[0].device if self.parameters else torch.device("cpu")
        if self._slots is None or self._slots.indices != indices or self._slots.zeros.device != device:
            self._slots = Slots.of(self.plan, indices, device)
        return LocalGradients(self.plan, shards, values, sizes, kind, self._slots, self._are_complex)

    def _measure(
        self, values: Sequence[Tensor], shards: Sequence[Tensor], *, are_dtensors: bool
    ) -> tuple[list[int], Kind]:
        """Sizes of the values, and the kind of the shards. Layouts of DTensors determine all but the device."""
        if self._measured is not None and shards and self._measured[1].device == shards[0].device:
            return self._measured
        measured = list(map(Tensor.numel, values)), common_kind(shards)
        self._measured = measured if are_dtensors else None
        return measured

    def _align(self, indices: Sequence[int], present: Sequence[Tensor]) -> list[Tensor]:
        return [local_tensor(in_layout_of(self.parameters[i], g)) for i, g in zip(indices, present, strict=True)]


def in_layout_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient in its parameter's layout: a Partial one is summed, another one redistributed.

    Called under ``no_grad``. Collectives: as :meth:`Gradients.read`, for one gradient.
    """
    if not (isinstance(parameter, DTensor) and isinstance(gradient, DTensor)):
        return gradient
    if gradient.placements == parameter.placements:
        return gradient
    return gradient.redistribute(placements=parameter.placements)


@dataclass(frozen=True, slots=True)
class LocalGradients:
    """This rank's parts of the gradients at one step: ``shards`` to scale in place, ``values`` to take the norm of.

    The two differ for a Partial gradient, which is summed over its mesh before its norm is taken.
    """

    plan: Plan
    shards: list[Tensor]
    values: list[Tensor]
    sizes: list[int]
    """Elements of each value; not 0."""
    kind: Kind
    """Of the shards."""
    slots: "Slots"
    are_complex: bool = False
    """Some were complex: their real and imaginary parts are elements here."""


_UNCOUNTED = 1e-100
"""In place of 0 for a replica without a gradient: 0/0 where no rank has one would be NaN."""


@dataclass(frozen=True, slots=True)
class Slots:
    """The plan's slots for one set of gradients; tensors on the device of the norms."""

    indices: Sequence[int]
    """Of the gradients' parameters in the plan."""
    of_gradients: Tensor
    counted: Tensor
    """How often this rank counts each slot."""
    zeros: Tensor
    of_groups: Tensor
    """Norm group of each slot."""

    @classmethod
    def of(cls, plan: Plan, indices: Sequence[int], device: torch.device) -> "Slots":
        """Find the slots of the gradients, and count the replicas with a gradient."""
        slots = [plan.slots[index] for index in indices]
        counted = torch.tensor([weight or _UNCOUNTED for weight in plan.weights], dtype=torch.float64)
        counted[[slot for slot in slots if not plan.weights[slot]]] = 1.0
        return cls(
            indices=indices,
            of_gradients=on_device(torch.tensor(slots, dtype=torch.long), device),
            counted=on_device(counted, device),
            zeros=torch.zeros(len(plan.weights), dtype=torch.float64, device=device),
            of_groups=on_device(torch.tensor(plan.group_of_slot), device),
        )
