"""The two passes over a window whose loss is one of the whole batch, see :mod:`hf_gradutils.targets.whole_batch`."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from hf_gradutils._collectives import add_up, gather_tensors, world_domain
from hf_gradutils._devices import widened
from hf_gradutils.errors import InvalidArgumentError, LossUnitError
from hf_gradutils.targets.whole_batch import Tensors

_LARGEST_DIFFERENCE, _LARGEST_DIFFERENCE_HALF = 1e-3, 5e-2
"""Of the two passes' rows, relative: kernels may add in another order, but dropout at other places is larger."""


_TWICE = (
    "a loss of the whole batch is computed twice in one micro-batch, but its share is known once; call compute_loss or "
    "the model once in training, or the second time under torch.no_grad()"
)


class TwoPasses:
    """What the micro-batches of one window contribute to the loss of the whole batch, and its gradient.

        first pass:   add(rows) for each micro-batch
        between:      finish(shared), when the parameters are those of the step
        second pass:  share(i, rows, shared).backward() for the i-th

    The shares of all micro-batches and ranks add up to the loss; their gradients, to its gradient.

    Args:
        loss_of: (rows of the whole batch, shared) → loss, shape ().
        num_replicas: Ranks that see the same batch.
    """

    def __init__(self, loss_of: Callable[[Tensors, Tensors], Tensor], *, num_replicas: int = 1):
        self._loss_of = loss_of
        self._num_replicas = num_replicas
        self._domain = world_domain()
        self._rows: list[Tensors] = []
        """Of each micro-batch of this rank."""
        self._are_padding: list[bool] = []
        self._gradients: list[list[Tensor | None] | None] = []
        """Of the loss, by micro-batch and kind of rows; None once the share is made."""
        self._of_shared: list[Tensor | None] = []
        self._value = torch.zeros(())
        """The loss, over the micro-batches of all ranks that are no padding."""

    @property
    def num_rows(self) -> int:
        """Rows that this rank has added."""
        return sum(len(rows[0]) for rows in self._rows)

    @property
    def is_finished(self) -> bool:
        """The loss is known."""
        return bool(self._gradients)

    @torch.no_grad()
    def add(self, rows: Tensors, *, is_padding: bool = False) -> None:
        """Add the rows of this rank's next micro-batch."""
        self._rows.append(tuple(kind.detach()[:0] if is_padding else kind.detach() for kind in rows))
        self._are_padding.append(is_padding)

    def finish(self, shared: Tensors = ()) -> Tensor:
        """Compute the loss of the rows of all ranks, and its gradients; returns the loss, shape (), detached.

        Args:
            shared: What the loss reads besides, the same on all ranks.

        Collectives: two all-gathers over all ranks, and one for each parameter that is sharded. Host syncs: one.

        Raises:
            InvalidArgumentError: rows of micro-batches or ranks differ in more than their number.
        """
        first = [_form(kind) for kind in self._rows[0]]
        is_alike = all([_form(kind) for kind in rows] == first for rows in self._rows)
        own = [torch.cat(kind) for kind in zip(*self._rows, strict=True)] if is_alike else list(self._rows[0])
        marks = own[0].new_ones(self._are_padding.count(False), dtype=torch.uint8)
        of_ranks = gather_tensors(self._domain, [*own, marks], is_valid=is_alike)[:: self._num_replicas]
        num_real = sum(len(of_rank[-1]) for of_rank in of_ranks)
        position = self._position()
        rows = [_leaf(torch.cat(kind)) for kind in zip(*(of_rank[:-1] for of_rank in of_ranks), strict=True)]
        leaves = [_leaf(_whole(value)) for value in shared]
        with torch.enable_grad(), torch.autocast(rows[0].device.type, enabled=False):
            loss = self._loss_of(tuple(rows), tuple(leaves))
        _check_reads_nothing_else(loss, [*rows, *leaves])
        gradients = _gradients(loss, [*rows, *leaves])
        self._of_shared = [g if g is None else g / num_real for g in gradients[len(rows) :]]
        self._value = loss.detach() / num_real
        by_micro_batch: list[list[Tensor | None]] = [[] for _ in self._rows]
        for index, gradient in enumerate(gradients[: len(rows)]):
            start = sum(len(of_rank[index]) for of_rank in of_ranks[:position])
            for micro_batch, parts in zip(self._rows, by_micro_batch, strict=True):
                stop = start + len(micro_batch[index])
                # A copy: the gradients of other ranks' rows need not be kept.
                parts.append(None if gradient is None else gradient[start:stop].clone())
                start = stop
        self._gradients = list(by_micro_batch)
        return loss.detach()

    def share(self, index: int, rows: Tensors, shared: Tensors = ()) -> Tensor:
        """The share of a micro-batch in the loss, shape (), in at least float32.

        Args:
            index: Of the micro-batch, in the order of the first pass.
            rows: As in the first pass, with their graph. Those of padding count for nothing.
            shared: As :meth:`finish` had them, with their graph.

        Raises:
            LossUnitError: the share has been made.
        """
        is_padding, gradients = self._are_padding[index], self._gradients[index]
        if gradients is None:
            raise LossUnitError(_TWICE)
        if is_padding:
            terms = [kind.float().sum() * 0 for kind in rows if kind.requires_grad]
        else:
            terms = [_inner(kind, of) for kind, of in zip(rows, gradients, strict=True) if of is not None]
        self._gradients[index] = None  # the graph of the share keeps them as long as they are needed
        for value, of in zip(shared, self._of_shared, strict=True):
            if of is not None and value.requires_grad:  # on padding too: a sharded one communicates
                terms.append(_of_parameter(value, of * (not is_padding)))
        share = torch.stack(terms).sum()
        return share if is_padding else share + (self._value - share).detach()

    def check_equal(self, index: int, rows: Tensors) -> None:
        """Compare rows of the second pass with those of the first, on all ranks together.

        Collectives: one all-reduce over all ranks. Host syncs: one for each kind of rows, and one.

        Raises:
            LossUnitError: they differ on some rank.
        """
        first = self._rows[index]
        is_same = all(_are_close(a.detach(), b) for a, b in zip(rows, first, strict=True))
        is_same |= self._are_padding[index]
        if num_ranks := add_up(self._domain, differing=not is_same)["differing"]:
            raise LossUnitError(
                f"two forwards of the same micro-batch differ on {num_ranks:.0f} of {self._domain.num_ranks} ranks, so "
                "that two passes cannot give the gradient of the whole batch. Random numbers of torch, numpy and "
                "Python are the same in both; a generator of your own, or a state that each forward changes, is not: "
                "set it from the inputs, or keep it out of the model"
            )

    def check_reads_rows_only(self, rows: Tensors, shared: Tensors) -> None:
        """Raise InvalidArgumentError if the loss reads more of a micro-batch's forward than its rows."""
        leaves = [_leaf(kind) for kind in rows], [_leaf(_whole(value)) for value in shared]
        with torch.enable_grad(), torch.autocast(rows[0].device.type, enabled=False):
            loss = self._loss_of(*map(tuple, leaves))
        _check_reads_nothing_else(loss, [*leaves[0], *leaves[1]])

    def _position(self) -> int:
        """Of this rank's data among those of all ranks."""
        return torch.distributed.get_rank() // self._num_replicas if self._domain.groups else 0


def _of_parameter(value: Tensor, gradient: Tensor) -> Tensor:
    """The share of a parameter that the loss reads; where one is spread over ranks, the sum over them is averaged."""
    if isinstance(value, DTensor):
        mesh = value.device_mesh
        return _inner(value.full_tensor(grad_placements=[Partial() for _ in range(mesh.ndim)]), gradient) / mesh.size()
    return _inner(value, gradient)


def _form(kind: Tensor) -> tuple[torch.Size, torch.dtype]:
    """What rows must have alike."""
    return kind.shape[1:], kind.dtype


def _whole(value: Tensor) -> Tensor:
    if isinstance(value, DTensor):
        return value.redistribute(placements=[Replicate()] * value.device_mesh.ndim).to_local()
    return value


def _leaf(value: Tensor) -> Tensor:
    """A leaf with a gradient, in at least float32, in which the loss is computed."""
    wide = widened(value.detach())
    return wide.requires_grad_() if wide.is_floating_point() else wide


def _gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    floating = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(loss, floating, allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _check_reads_nothing_else(loss: Tensor, leaves: list[Tensor]) -> None:
    """Raise InvalidArgumentError if a gradient of the loss would be lost: of a parameter that it was not given."""
    known, todo, seen = {id(leaf) for leaf in leaves}, [loss.grad_fn], set[object]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in known:
            raise InvalidArgumentError(
                f"the loss of the whole batch reads a trained parameter of shape {tuple(leaf.shape)} that it is not "
                "given, so that it would get no gradient: return it from parameters=lambda model: (…,), and take it as "
                "an argument of the loss, after the rows"
            )
        todo += [following for following, _ in node.next_functions]


def _inner(value: Tensor, gradient: Tensor) -> Tensor:
    return (value.to(gradient.dtype) * gradient).sum()


def _are_close(now: Tensor, before: Tensor) -> bool:
    if now.shape != before.shape:
        return False
    if not now.is_floating_point():
        return bool(torch.equal(now, before))
    is_half = now.dtype in (torch.float16, torch.bfloat16)
    largest = _LARGEST_DIFFERENCE_HALF if is_half else _LARGEST_DIFFERENCE
    difference, size = torch.stack(((now - before).float().norm(), before.float().norm())).tolist()
    return not difference > largest * size  # NaN in both is for the guard of steps
