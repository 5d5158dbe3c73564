"""Losses of sentence-transformers that compare the rows of the whole batch, in two passes.

The trainer's own ``compute_loss`` runs in all passes, with something else in the place of its loss. A batch belongs to
one data set; where several have losses of their own, the loss of a window is

    Σ_d n_d / N · loss_d(all rows of d in the window)

with n_d of the N rows from data set d.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_gradutils._collectives import gather_objects, world_domain
from hf_gradutils._devices import widened
from hf_gradutils.accelerator import LossParameters, MicroBatch
from hf_gradutils.errors import InvalidArgumentError, LossUnitError
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.rows import with_own_tensors
from hf_gradutils.targets.sentence_losses import (
    kind_of,
    loss_name,
    losses_of,
    own_parameters,
    token_counter,
)
from hf_gradutils.targets.sentence_rows import Embedded, alone, embed, loss_of, put_model, shared_parameters
from hf_gradutils.targets.whole_batch import Tensors
from hf_gradutils.trainer._shares import Seen, TwoPassShares

if TYPE_CHECKING:
    from hf_gradutils.trainer._loss import LossUnit

_Call = Callable[[str | None, Sequence[Any], Tensor | None], Tensor]


class SentenceShares(TwoPassShares):
    """Shares of the losses of a trainer of sentence or sparse encoders, at least one of which is of the whole batch."""

    def __init__(self, trainer: Any, unit: "LossUnit"):
        super().__init__(trainer, unit)
        self._losses = losses_of(trainer)
        self._names = sorted(self._losses, key=str)
        self._layouts: dict[str | None, _Layout] = {}
        self._first: list[tuple[str | None, Seen, bool]] = []
        """Data set, rows and padding of the micro-batches of the first pass."""
        self._components: dict[str, Tensor] = {}

    # ---- The two passes ----

    def first(self, model: nn.Module, inputs: Any, *, is_padding: bool) -> None:
        self._first.append((*self._rows_of(model, inputs), is_padding))

    def end_first(self) -> None:
        if len(self._names) > 1:  # which ranks may have seen differently many of
            for found in gather_objects(world_domain(), self._layouts):
                self._layouts = found | self._layouts
        for dataset, (rows, _), is_padding in self._first:
            self.passes.add(self._in_all_columns(dataset, rows), is_padding=is_padding)
        self._first = []

    def _finish(self, shared: Tensors) -> None:
        with one_draw(self._trainer):
            super()._finish(shared)

    @contextlib.contextmanager
    def second(self, micro_batch: MicroBatch) -> Iterator[None]:
        trainer = self._trainer

        def give_share(dataset: str | None, features: Sequence[Any], labels: Tensor | None) -> Tensor:
            if not torch.is_grad_enabled():
                value: Any = self._losses[dataset](features, labels)
                return torch.stack(list(value.values())).sum() if isinstance(value, dict) else value
            rows, shared = self._embed(trainer.model_wrapped, dataset, features, labels)
            share = self.share_of_rows(micro_batch, (self._in_all_columns(dataset, rows), shared))
            if self._components:
                trainer.track_loss_components(self._components)
            return micro_batch.give(share)

        with super().second(micro_batch), self._in_place_of_losses(give_share):
            yield

    # ---- The check before the first step ----

    def applies(self, model: nn.Module, batch: Any) -> bool:
        return True

    def look(self, model: nn.Module, batch: Any) -> tuple[Tensor, Seen]:
        if None in self._losses and isinstance(self._trainer.train_dataset, dict):
            raise LossUnitError(
                "one loss is given for several data sets, whose batches do not tell which of them they are from, and "
                "rows of different ones are not to be compared; pass loss={name: loss} with the name of each"
            )
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_draw(self._trainer))
            for loss in self._losses.values():
                stack.enter_context(alone(loss))
            with self._trainer.compute_loss_context_manager():
                loss = self._trainer.compute_loss(model, with_own_tensors(batch))
        dataset, (rows, shared) = self._rows_of(model, batch)
        return loss, ((rows[0].new_full((len(rows[0]),), self._names.index(dataset)), *rows), shared)

    def combine(self, parts: Sequence[Seen]) -> Tensor:
        marks, *kinds = (torch.cat(kind) for kind in zip(*(rows for rows, _ in parts), strict=True))
        dataset = self._names[int(marks[0])]
        with one_draw(self._trainer):
            return self._loss_of_one(dataset, list(map(widened, kinds)), parts[0][1])[0]

    # ---- Rows of a batch, and the loss of rows ----

    def _rows_of(self, model: nn.Module, inputs: Any) -> tuple[str | None, Seen]:
        """The data set of a batch and its rows."""
        found: list[tuple[str | None, Seen]] = []

        def note(dataset: str | None, features: Sequence[Any], labels: Tensor | None) -> Tensor:
            found.append((dataset, self._embed(model, dataset, features, labels)))
            return torch.zeros((), device=self._trainer.args.device)

        with self._in_place_of_losses(note), self._trainer.compute_loss_context_manager():
            self._trainer.compute_loss(model, inputs)
        if len(found) != 1:
            raise LossUnitError(f"compute_loss has computed {len(found)} losses of one batch; let it compute one")
        return found[0]

    def _embed(self, model: nn.Module, dataset: str | None, features: Sequence[Any], labels: Tensor | None) -> Seen:
        loss = self._losses[dataset]
        with one_draw(self._trainer):
            embedded = embed(loss, model, features, labels)
        rows = embedded.rows if labels is None else (*embedded.rows, labels)
        num_rows = len(embedded.rows[0])
        if any(len(kind) != num_rows for kind in rows):
            raise LossUnitError(
                f"{type(loss).__name__} embeds columns of different numbers of rows, {[len(kind) for kind in rows]}, "
                "which cannot be told apart in a larger batch"
            )
        self._layouts[dataset] = _Layout(embedded, labels)
        return rows, tuple(p for name in self._names for p in shared_parameters(self._losses[name]))

    def _in_all_columns(self, dataset: str | None, rows: Tensors) -> Tensors:
        """The data set of each row, and then the rows of every data set, of which all but one are empty."""
        device = rows[0].device
        kinds = [torch.full((len(rows[0]),), self._names.index(dataset), device=device)]
        for name in self._names:
            if name == dataset:
                kinds += rows
            elif name in self._layouts:
                kinds += self._layouts[name].empty(device)
        return tuple(kinds)

    def loss_of_rows(self, rows: Tensors, shared: Tensors) -> Tensor:
        marks, *kinds = rows
        terms, self._components = [], {}
        for index, name in enumerate(self._names):
            if (layout := self._layouts.get(name)) is None:
                continue
            own, kinds = kinds[: layout.num_kinds], kinds[layout.num_kinds :]
            num_rows = int((marks == index).sum())
            if num_rows:
                loss, components = self._loss_of_one(name, own, shared)
                weight = num_rows / len(marks)
                terms.append(loss * weight)
                for part, value in components.items():
                    self._components[part] = self._components.get(part, 0) + value * weight
        return torch.stack(terms).sum()

    def _loss_of_one(
        self, dataset: str | None, kinds: Sequence[Tensor], shared: Tensors
    ) -> tuple[Tensor, dict[str, Tensor]]:
        layout, loss = self._layouts[dataset], self._losses[dataset]
        start = 0
        for name in self._names[: self._names.index(dataset)]:
            start += len(shared_parameters(self._losses[name]))
        own = shared[start : start + len(shared_parameters(loss))]
        embedded = Embedded(tuple(kinds[: layout.num_embedded]), layout.num_columns, layout.num_layers)
        labels = kinds[layout.num_embedded].detach() if layout.has_labels else None
        return loss_of(loss, embedded, labels, own)

    # ---- Contexts ----

    @contextlib.contextmanager
    def _in_place_of_losses(self, call: _Call) -> Iterator[None]:
        """Let the trainer's ``compute_loss`` call this in the place of its losses."""
        trainer = self._trainer
        before = trainer.loss
        is_one = not isinstance(before, dict)
        trainer.loss = _Instead(None, call) if is_one else {name: _Instead(name, call) for name in before}
        try:
            yield
        finally:
            trainer.loss = before


class _Instead:
    """Stands in the place of a loss."""

    def __init__(self, dataset: str | None, call: _Call):
        self._dataset, self._call = dataset, call

    def __call__(self, features: Sequence[Any], labels: Tensor | None) -> Tensor:
        return self._call(self._dataset, features, labels)


class _Layout:
    """What the rows of a data set are; pickled to ranks that have none."""

    def __init__(self, embedded: Embedded, labels: Tensor | None):
        kinds = embedded.rows if labels is None else (*embedded.rows, labels)
        self.num_columns, self.num_layers = embedded.num_columns, embedded.num_layers
        self.num_embedded, self.num_kinds, self.has_labels = len(embedded.rows), len(kinds), labels is not None
        self._shapes = [(kind.shape[1:], kind.dtype) for kind in kinds]

    def empty(self, device: torch.device) -> list[Tensor]:
        """No rows."""
        return [torch.zeros((0, *shape), dtype=dtype, device=device) for shape, dtype in self._shapes]


def sentence_shares(trainer: Any, unit: "LossUnit") -> SentenceShares | None:
    """The shares of a trainer of sentence or sparse encoders, if its losses need them."""
    losses = losses_of(trainer)
    is_whole = any(kind_of(loss) == "whole" for loss in losses.values())
    return SentenceShares(trainer, unit) if is_whole else None


def sentence_counter(trainer: Any) -> TargetCounter | None:
    """The counter for losses of sentence-transformers that are no mean over rows.

    Raises:
        LossUnitError: data sets have losses of different units.
    """
    losses = losses_of(trainer)
    by_kind = {kind_of(loss): loss for loss in losses.values()}
    if not {"sum", "tokens"} & by_kind.keys():
        return None
    if len(losses) > 1:
        names = ", ".join(sorted({loss_name(loss) for loss in losses.values()}))
        raise LossUnitError(
            f"the losses of the data sets have different units ({names}: sums, or means over tokens), so no weight "
            "makes their micro-batches add up; train with one of them, or with losses that are means over rows"
        )
    kind, loss = by_kind.popitem()
    return TargetCounter("sum") if kind == "sum" else TargetCounter(count=token_counter(loss))


def prepare_losses(trainer: Any) -> None:
    """Prepare the losses of a trainer of sentence or sparse encoders for a training.

    They are to call the model with its wrappers, also where the library leaves the bare one in them; and their own
    parameters are averaged over ranks, which no wrapper does.

    Collectives: a broadcast, if there are own parameters.
    """
    losses, windows = losses_of(trainer), trainer.accelerator.windows
    parameters = own_parameters(trainer)
    if parameters and windows.engine is not None:
        raise InvalidArgumentError(
            f"the loss has {len(parameters)} trained parameters of its own, which DeepSpeed's engine does not step on; "
            "train with DDP or FSDP"
        )
    windows.loss_parameters = LossParameters(parameters)
    for loss in losses.values():
        put_model(loss, trainer.model_wrapped)


@contextlib.contextmanager
def one_draw(trainer: Any) -> Iterator[None]:
    """The same random numbers of Python in all micro-batches of a window, for losses that draw dimensions or layers."""
    if not losses_of(trainer):
        yield
        return
    state = random.getstate()
    random.seed(f"{trainer.args.seed} {trainer.state.global_step}")
    try:
        yield
    finally:
        random.setstate(state)
