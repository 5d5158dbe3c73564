"""The losses that a Trainer is asked for besides training: on any batch, for any count, without a trace."""

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_gradutils._undisturbed import RowsDrawAlike, in_evaluation_mode
from hf_gradutils.targets import trl
from hf_gradutils.targets.auxiliary_loss import auxiliary_coefficient
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.known_heads import draws_by_row
from hf_gradutils.targets.router_losses import add_coefficient, own_router_loss
from hf_gradutils.targets.rows import with_own_tensors
from hf_gradutils.targets.sample import DatasetRows
from hf_gradutils.trainer._given_terms import one_loss
from hf_gradutils.trainer._kept import variables
from hf_gradutils.trainer._no_trace import Snapshot, without_trace
from hf_gradutils.trainer._overrides import is_transformers, is_users
from hf_gradutils.trainer._sentences import one_draw
from hf_gradutils.trainer._ulysses import rows_loader
from hf_gradutils.upstream.deepspeed import is_engine
from hf_gradutils.upstream.torch import is_multiple

if TYPE_CHECKING:
    from hf_gradutils.trainer._loss import LossUnit


class TrainerLosses:
    """Losses of a Trainer's batches, computed inside :meth:`asked`."""

    def __init__(self, trainer: Any, unit: "LossUnit"):
        self._trainer, self._unit = trainer, weakref.proxy(unit)
        self._snapshot: Snapshot | None = None

    @property
    def is_the_users(self) -> bool:
        """True if code outside transformers and trl computes the loss."""
        trainer, head = self._trainer, self._unit.head
        if trainer.compute_loss_func is not None or is_users(trainer, "compute_loss"):
            return True
        places = [next((cls for cls in type(head).__mro__ if "forward" in vars(cls)), type(head))]
        loss_function = vars(head).get("_loss_function")
        return not all(is_transformers(place) for place in (*places, loss_function) if place is not None)

    @contextlib.contextmanager
    def asked(self) -> Iterator[Any]:
        """Evaluation mode without gradients and without a trace. Yields the function that prepares a batch."""
        trainer = self._trainer
        # A head that draws by row is asked as if all rows drew the same, or its losses would not be comparable.
        draws = RowsDrawAlike() if draws_by_row(self._unit.head) else contextlib.nullcontext()
        with (
            draws,
            in_evaluation_mode(self.model),
            torch.no_grad(),
            trl.loss_only(trainer, with_auxiliary=False),
            without_trace(trainer, self.model, variables(trainer)) as self._snapshot,
        ):
            # A copy, because a subclass may take entries out.
            try:
                yield lambda inputs: trainer._prepare_inputs(with_own_tensors(inputs))
            finally:
                self._snapshot = None

    def dataset_rows(self) -> DatasetRows:
        trainer = self._trainer
        loader = trainer.callback_handler.train_dataloader
        if loader is None:  # a check before training
            with contextlib.suppress(Exception):  # of a Trainer that makes its batches itself
                loader = trainer.get_train_dataloader()
        loader, shard_of = rows_loader(trainer, loader)
        if not (hasattr(loader, "dataset") and hasattr(loader, "collate_fn")):  # the user's own, of any kind
            return DatasetRows(None, list, list, trainer.args.device)
        prepare = lambda batch: trainer._prepare_inputs(shard_of(batch))  # noqa: E731 - a bound method would hold it
        batch_sampler = getattr(loader, "batch_sampler", None)
        return DatasetRows(loader.dataset, loader.collate_fn, prepare, trainer.args.device, batch_sampler)

    def of_head(self, batch: Any) -> Tensor:
        """The loss of the head itself, without label smoothing around it."""
        trainer = self._trainer
        smoother, trainer.label_smoother = trainer.label_smoother, None
        try:
            return self.given(batch, torch.tensor(1))
        finally:
            trainer.label_smoother = smoother

    def trained(self, batch: Any, counter: TargetCounter) -> Tensor:
        """The loss that is trained, without the auxiliary term of a mixture of experts, which is no mean."""
        trainer, unit = self._trainer, self._unit
        unit.counter = counter
        num_targets = unit.count(batch).clamp(min=1)
        is_the_models_own = trainer.label_smoother is None and trainer.compute_loss_func is None
        coefficient = auxiliary_coefficient(unit.head) if is_the_models_own else 0.0
        # trl's trainers add the auxiliary term themselves, which is off here; outputs would cost them a forward.
        has_auxiliary = bool(coefficient) and trl.trl_name(trainer) is None
        loss = self.given(batch, num_targets, return_outputs=has_auxiliary)
        if not has_auxiliary:
            return loss
        loss, outputs = loss
        own = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if not (isinstance(own, Tensor) and torch.equal(own.to(loss), loss)):  # code of the user's may leave it out
            return loss
        if (own := own_router_loss(unit.head, outputs)) is not None:
            return loss - add_coefficient(unit.head) * own
        auxiliary = outputs.get("aux_loss")
        return loss - coefficient * auxiliary if isinstance(auxiliary, Tensor) else loss

    @property
    def model(self) -> Any:
        """The model as ``compute_loss`` is given it in training, in DDP or an engine, but not compiled."""
        wrapped = getattr(self._trainer.model_wrapped, "_orig_mod", self._trainer.model_wrapped)
        is_wrapped = isinstance(wrapped, DistributedDataParallel) or is_engine(wrapped)
        return wrapped if is_wrapped else self._trainer.model

    def models_own(self, batch: Any, count: Tensor | None = None) -> Tensor:
        """The loss that the model computes for a batch with labels, given a count or not."""
        assert self._snapshot is not None
        try:
            with self._trainer.compute_loss_context_manager():
                options = {} if count is None else {"num_items_in_batch": count}
                outputs = self._trainer.model(**with_own_tensors(batch), **options)
            return outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
        finally:
            self._snapshot.restore()

    def is_models_multiple(self, batch: Any, num_targets: Tensor) -> bool:
        """True if the loss is the one that the model returns, times constants. A forward with autograd."""
        losses: list[Tensor] = []

        def keep(_: nn.Module, args: Any, outputs: Any) -> None:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
            losses.extend([loss] if isinstance(loss, Tensor) else [])

        with contextlib.ExitStack() as stack:
            for model in {self.model, self._trainer.model}:
                stack.callback(model.register_forward_hook(keep).remove)
            stack.enter_context(torch.enable_grad())
            loss = self.given(batch, num_targets)
        return any(is_multiple(loss, of) for of in losses)

    def given(self, batch: Any, num_targets: Tensor, *, return_outputs: bool = False) -> Any:
        trainer = self._trainer
        assert self._snapshot is not None
        options = {"return_outputs": True} if return_outputs else {}
        model = self.model
        # A loss that needs autograd must not start DDP's reduction of gradients.
        is_held = torch.is_grad_enabled() and isinstance(model, DistributedDataParallel)
        try:
            no_sync = model.no_sync() if is_held else contextlib.nullcontext()
            with no_sync, trainer.compute_loss_context_manager(), one_draw(trainer):
                loss = trainer.compute_loss(model, with_own_tensors(batch), num_items_in_batch=num_targets, **options)
                loss = one_loss(self._unit, loss)
            self._snapshot.has_gradients |= torch.is_grad_enabled()
            return loss
        finally:
            self._snapshot.restore()
