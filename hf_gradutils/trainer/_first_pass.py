"""The two passes of a Trainer over a window's batches, with the same random numbers in both."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hf_gradutils._undisturbed import random_states
from hf_gradutils.accelerator import MicroBatch
from hf_gradutils.errors import InvalidArgumentError, LossUnitError
from hf_gradutils.targets import trl
from hf_gradutils.targets.rows import with_own_tensors
from hf_gradutils.trainer._batches import TrainingBatches
from hf_gradutils.trainer._kept import variables
from hf_gradutils.trainer._loss import LossUnit
from hf_gradutils.trainer._no_trace import without_trace
from hf_gradutils.trainer._shares import Shares
from hf_gradutils.upstream.transformers import without_average


class FirstPass:
    """Runs the first pass of each window, and prepares each micro-batch of the second."""

    def __init__(self, trainer: Any, unit: LossUnit, batches: TrainingBatches):
        self._trainer, self._unit, self._batches = trainer, unit, batches
        self._states: list[Callable[[], None]] = []
        """What puts back the random states before each micro-batch."""
        self._index = 0

    def run(self, batches: Sequence[Any]) -> None:
        """Run the first pass over a window's batches, if its loss needs one.

        Collectives: those of the forwards, and a few for counts of terms or the shapes of rows.
        """
        shares, trainer = self._unit.shares, self._trainer
        self._index, self._states = 0, []
        if shares is None or not shares.needs_first_pass:
            return
        model, device = trainer.model_wrapped, trainer.args.device
        model.train()
        if callable(getattr(trainer.optimizer, "train", None)):  # of optimizers that evaluate other weights
            trainer.optimizer.train()
        with torch.no_grad(), trl.loss_only(trainer), without_trace(trainer, model, variables(trainer)):
            for batch in batches:
                self._states.append(random_states(device))
                inputs = trainer._prepare_inputs(with_own_tensors(batch))
                shares.first(model, inputs, is_padding=self._batches.is_padding(batch))
        shares.end_first()

    @contextlib.contextmanager
    def second(self, micro_batch: MicroBatch) -> Iterator[None]:
        """The context of the training step on a window's next micro-batch."""
        shares, index = self._unit.shares, self._index
        self._index += 1
        if shares is None:
            yield
            return
        if shares.needs_first_pass:
            if index >= len(self._states):
                raise InvalidArgumentError(
                    f"micro-batch {index + 1} of a window of {len(self._states)}: {shares.why}, so the batches of a "
                    "window must be those that get_batch_samples returned"
                )
            self._states[index]()
        micro_batch.index = index
        # Where a loss is a share, nothing is multiplied by the number of ranks.
        with (
            without_average(self._trainer.args) if shares.gives_share else contextlib.nullcontext(),
            shares.second(micro_batch),
        ):
            yield
        if self._trainer.accelerator.sync_gradients:
            shares.end()


def check_possible(trainer: Any, shares: Shares) -> None:
    """Raise LossUnitError where shares are not made."""
    reason = ""
    if trainer.get_cp_size() > 1 or trainer.get_sp_size() > 1:
        reason = "context or sequence parallelism, where a rank has parts of rows"
    elif trainer.accelerator.windows.engine is not None and shares.needs_first_pass:
        reason = "DeepSpeed, whose engine expects a backward for each forward"
    elif any(hasattr(model, "_orig_mod") for model in (trainer.model_wrapped, trainer.model)):
        reason = "torch.compile, under which the end of a forward is not seen"
    if reason:
        raise LossUnitError(f"{shares.why}; this is not done with {reason}")
