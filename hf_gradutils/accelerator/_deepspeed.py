"""DeepSpeed's engine, which runs backwards, averages, clips and steps by itself.

    window's start          the targets of all its micro-batches, added up over all ranks
    each micro-batch        engine.backward of its share of the window's mean: gradients are that mean when all are in
    clip or optimizer.step  whichever comes first ends the window: engine.step

What DeepSpeed decides stays its own: sharding, clipping, fp16's loss scale, checkpoints, and leaving out a step whose
gradient is not finite.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_gradutils._collectives import gather_objects, world_domain
from hf_gradutils.accelerator._deepspeed_limits import check_engine, check_plugin, warn_of_rounding
from hf_gradutils.accelerator._first_window import NOT_WEIGHTED, adds_up_a_parameter, nodes_behind
from hf_gradutils.accelerator._model_windows import ModelWindow
from hf_gradutils.accelerator._plugin import GradUtilsPlugin
from hf_gradutils.errors import InvalidArgumentError, NonfiniteGradientError, TargetCountError
from hf_gradutils.targets.probe import LATER_STEPS
from hf_gradutils.upstream.deepspeed import (
    add_up_from_here,
    drop_gradients,
    holding_loss_scale,
    num_averaged,
    num_ranks,
    scale_adapts,
    scale_is_fixed,
    steps_on_grad,
)
from hf_gradutils.window import WindowReport

if TYPE_CHECKING:
    from hf_gradutils.accelerator._windows import Windows

ONE_LOSS = (
    "a second backward in one micro-batch, or none of optimizer.step() and clip_grad_norm_ after the last micro-batch "
    "of a window: DeepSpeed averages gradients over ranks in the backward of that, so add the losses and call backward "
    "once, and end each window"
)
_NO_LAST = (
    "the last micro-batch of a window had no backward, in which DeepSpeed averages gradients over ranks; call "
    "accelerator.backward(loss, num_targets=0) for a micro-batch that is left out"
)
_THAWED = (
    "parameters train that did not when DeepSpeed made its engine, which leaves them as they are; freeze what is to be "
    "frozen later after prepare (in a Trainer: in on_train_begin)"
)
_FIXED_SCALE = 'fp16 has a fixed "loss_scale": lower it, or set 0, with which DeepSpeed adapts it'


class Engine:
    """Takes the place of backward, averaging, clipping and step.

    Args:
        engine: DeepSpeed's.
        plugin: Settings, of which the engine does not follow all.
        clipping_is_set: The configuration says to what norm to clip.

    Raises:
        InvalidArgumentError: the engine does what cannot be made exact, or the plugin asks for what it does not do.
    """

    def __init__(self, engine: Any, plugin: GradUtilsPlugin, *, clipping_is_set: bool):
        self._engine, self._plugin, self._clipping_is_set = engine, plugin, clipping_is_set
        check_engine(engine)
        check_plugin(plugin, engine)
        warn_of_rounding(engine)
        self.num_averaged = num_averaged(engine)
        """Divisor of the average over ranks."""
        self._steps_on_grad = steps_on_grad(engine)
        self.awaits_step = False
        """The last micro-batch of a window has had its backward."""
        self.left_out_step = False
        """The last step, for a gradient that was not finite."""
        self._mixes_up = engine.zero_optimization_stage() in (1, 2) and num_ranks(engine) > 1
        self._frozen = [p for p in engine.module.parameters() if not p.requires_grad]
        self._reached: list[set[int]] | None = []
        """Parameters that each micro-batch of a window trains, where it is looked at."""

    # ---- A micro-batch ----

    def backward(self, loss: Tensor, *, is_last: bool, **kwargs: Any) -> None:
        """Add up the gradient of a loss; with ``is_last`` the engine averages it over ranks.

        Raises:
            InvalidArgumentError: the last micro-batch of a window has had its loss.
        """
        if self.awaits_step:
            raise InvalidArgumentError(ONE_LOSS)
        if self._mixes_up and self._reached is not None:
            self._reached.append({id(n.variable) for n in nodes_behind(loss) if adds_up_a_parameter(n)})
        add_up_from_here(self._engine)
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss, scale_wrt_gas=False, **kwargs)
        self.awaits_step = is_last

    def discard(self) -> None:
        """Drop the gradients of a window that has not ended."""
        drop_gradients(self._engine)
        self.awaits_step = False

    # ---- Clipping ----

    def clipping_as_set(self) -> float:
        """The norm that the configuration says to clip to; inf for none.

        Raises:
            InvalidArgumentError: it does not say, and DeepSpeed clips all the same.
        """
        if not self._clipping_is_set and self._clipping < math.inf:
            raise InvalidArgumentError(
                f"DeepSpeed clips gradients to {self._clipping:g}, because its configuration does not say to what "
                'norm; set "gradient_clipping": 0.0 there, or call accelerator.clip_grad_norm_ with that norm'
            )
        return self._clipping

    @property
    def _clipping(self) -> float:
        return float(self._engine.gradient_clipping() or math.inf)

    def check_clipping(self, max_norm: float) -> None:
        """Raise InvalidArgumentError if the engine clips to another norm; inf is none."""
        if not math.isclose(self._clipping, max_norm):
            wanted = 0.0 if math.isinf(max_norm) else max_norm
            does = "does not clip" if math.isinf(self._clipping) else f"clips gradients to {self._clipping:g}"
            raise InvalidArgumentError(
                f"DeepSpeed {does}, but max_grad_norm or clip_grad_norm_ says {max_norm:g} (inf: not at all); set "
                f'"gradient_clipping": {wanted} in the configuration of DeepSpeed (with a Trainer "auto", and '
                f"max_grad_norm={wanted}). Without the entry DeepSpeed clips to 1.0"
            )

    # ---- The end of a window ----

    def close(self, window: ModelWindow, step: int, *, has_data_left: bool | None) -> tuple[WindowReport, bool]:
        """Let the engine step on the gradients of a window.

        Returns:
            The report, and False if the step was left out.

        Collectives: one all-reduce over all ranks, and those of the engine. Host syncs: one, and those of the engine.

        Raises:
            InvalidArgumentError: the last micro-batch had no backward; or as
                :meth:`AccumulationWindow.close_by_engine`.
            NonfiniteGradientError: as the plugin's ``on_nonfinite`` says.
        """
        if not self.awaits_step:
            raise InvalidArgumentError(_NO_LAST)
        if any(p.requires_grad for p in self._frozen):
            raise InvalidArgumentError(_THAWED)
        self._check_reached(window)
        if self._steps_on_grad:
            return self._close_on_grad(window, step, has_data_left)
        report = window.sums.close_by_engine(self._step, has_data_left=has_data_left)
        self.awaits_step = False
        was_applied = self._engine.was_step_applied()
        # An overflow now and then is a part of a loss scale that adapts itself; a loss that is not finite is not.
        if scale_adapts(self._engine) and (was_applied or math.isfinite(report.loss)):
            return report, True
        try:
            is_taken = window.guard.judge(report, step, is_finite=was_applied)
        except NonfiniteGradientError as error:
            if scale_is_fixed(self._engine):
                error.add_note(_FIXED_SCALE)
            raise
        return report, is_taken

    def _check_reached(self, window: ModelWindow) -> None:
        """Raise InvalidArgumentError if ranks train different parameters, of which ZeRO 1 and 2 mix up the gradients.

        Collectives: one gather of objects, in a few windows.
        """
        if self._reached is not None and self._mixes_up:
            names = {id(p): name for name, p in window.whole.named_parameters()}
            own = [sorted(names[one] for one in reached if one in names) for reached in self._reached]
            every = gather_objects(world_domain(), own)
            if any(other != every[0] for other in every):
                odd = {name for of_rank in zip(*every, strict=False) for name in _not_in_all(of_rank)}
                raise InvalidArgumentError(
                    f"ranks train different parameters in a micro-batch ({', '.join(sorted(odd)[:3])}, …), and ZeRO 1 "
                    "and 2 mix up their gradients (DeepSpeed 0.19.8): use stage 0 or FSDP2, or let each loss reach all "
                    "parameters: loss + 0.0 * sum(p.sum() for p in the_others)"
                )
        self._reached = [] if window.num_closed + 1 in LATER_STEPS else None

    def _close_on_grad(self, window: ModelWindow, step: int, has_data_left: bool | None) -> tuple[WindowReport, bool]:
        """The same at stage 0 in float32, where DeepSpeed clips, but neither reports a norm nor looks at it."""
        plugin, is_taken = self._plugin, False
        try:
            report = window.sums.close(
                window.whole,
                norm_type=plugin.norm_type,
                ownership=plugin.ownership,
                norm_groups=plugin.grad_norm_groups,
                has_data_left=has_data_left,
            )
            is_taken = window.guard.judge(report, step)
        finally:
            self.awaits_step, self.left_out_step = False, not is_taken
            if is_taken:
                self._engine.step()
            else:
                drop_gradients(self._engine)
        return report, is_taken

    def _step(self) -> float:
        with holding_loss_scale(self._engine):
            self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return norm if self._engine.was_step_applied() else math.inf


def _not_in_all(of_ranks: Sequence[Sequence[str]]) -> set[str]:
    names = [name for own in of_ranks for name in own]
    return {name for name in names if names.count(name) < len(of_ranks)}


def close_by_engine(
    windows: "Windows", engine: Engine, window: ModelWindow, max_norm: float, step: int
) -> tuple[WindowReport, bool]:
    """:meth:`Windows.close` by an engine.

    Raises:
        TargetCountError: no loss was weighted since the last step, or another backward has added to the gradients.
        InvalidArgumentError: the engine clips to another norm.
    """
    windows.outside.check(window, ends=True)
    if not window.is_open:
        raise TargetCountError(NOT_WEIGHTED)
    engine.check_clipping(max_norm)
    try:
        windows.report, is_taken = engine.close(window, step, has_data_left=windows.has_data_left)
    finally:
        windows.end(window)
    return windows.report, is_taken
