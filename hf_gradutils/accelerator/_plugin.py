"""The settings of the Trainer and of the Accelerator."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

from accelerate.utils import GradientAccumulationPlugin

from hf_gradutils import _environment
from hf_gradutils.accelerator._half_precision import AccumulateInFloat32, check_accumulate_in_float32
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.gradients.names import NormGroups, check_norm_groups
from hf_gradutils.gradients.ownership import Ownership, check_ownership
from hf_gradutils.gradients.power_sums import check_norm_type
from hf_gradutils.sync import Sync, check_sync
from hf_gradutils.targets.counter import CountTargets, LossUnit, TargetCounter
from hf_gradutils.window import OnNonfinite, StepGuard

_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


Counts: TypeAlias = Literal["auto", "streamed", "first"]


def check_counts(counts: object) -> None:
    """Raise InvalidArgumentError for an unknown value."""
    if counts not in get_args(Counts):
        raise InvalidArgumentError(f"counts must be one of {get_args(Counts)}, got {counts!r}")


Aux: TypeAlias = Literal["mean", "exact"]


def check_aux(aux: object) -> None:
    """Raise InvalidArgumentError for an unknown value."""
    if aux not in get_args(Aux):
        raise InvalidArgumentError(f"aux must be one of {get_args(Aux)}, got {aux!r}")


def _switch(text: str) -> bool:
    return _SWITCH[text.lower()]


def _mapping(text: str) -> dict[str, str]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


_FROM_TEXT: dict[str, tuple[Callable[[str], Any], str]] = {
    "loss_unit": (str, "a unit"),
    "check_loss_unit": (_switch, "true or false"),
    "counts": (str, "streamed, first or auto"),
    "aux": (str, "mean or exact"),
    "sync": (str, "a policy"),
    "accumulate_in_float32": (lambda text: "auto" if text.lower() == "auto" else _switch(text), "true, false or auto"),
    "norm_type": (float, "a number"),
    "grad_norm_groups": (
        lambda text: _mapping(text) if text.startswith("{") else text,
        """'layer', or JSON like {"group": "pattern"}""",
    ),
    "ownership": (_mapping, """JSON like {"pattern": "sharded"}"""),
    "on_nonfinite": (str, "a policy"),
    "max_skipped_steps": (int, "a whole number"),
    "fold_into_optimizer": (_switch, "true or false"),
}
"""Field → parser of its variable, and the expected value for error messages."""

_CHECKS: dict[str, Callable[[Any], object]] = {
    "loss_unit": TargetCounter,
    "count_targets": lambda count: TargetCounter(count=count),
    "counts": check_counts,
    "aux": check_aux,
    "sync": check_sync,
    "accumulate_in_float32": check_accumulate_in_float32,
    "norm_type": check_norm_type,
    "grad_norm_groups": check_norm_groups,
    "ownership": lambda ownership: check_ownership(ownership or {}),
    "on_nonfinite": StepGuard,
    "max_skipped_steps": lambda number: StepGuard(max_skipped_steps=number),
}
"""Field → check that raises InvalidArgumentError for an invalid value."""


def _from_variables() -> dict[str, Any]:
    """The fields that variables set. InvalidArgumentError for an unknown variable or an invalid value."""
    values = {}
    for name, text in _environment.read_settings().items():
        variable = f"{_environment.SETTING}{name.upper()}"
        if name not in _FROM_TEXT:
            variables = ", ".join(f"{_environment.SETTING}{field_name.upper()}" for field_name in _FROM_TEXT)
            raise InvalidArgumentError(f"{variable} sets nothing; the variables are {variables}")
        parse, expected = _FROM_TEXT[name]
        try:
            values[name] = parse(text)
        except (ValueError, KeyError):
            raise InvalidArgumentError(f"{variable} must be {expected}, got {text!r}") from None
    return values


def _setting(name: str, default: Any) -> Callable[[], Any]:
    """Return a factory of the field's default: the value of its variable, else ``default``."""
    return lambda: _from_variables().get(name, default)


@dataclass
class GradUtilsPlugin(GradientAccumulationPlugin):  # type: ignore[misc]
    """Settings of gradient accumulation.

    For ``GradUtilsTrainer(grad_plugin=…)`` and ``GradUtilsAccelerator(gradient_accumulation_plugin=…)``. A field that
    is not passed takes its value from the variable ``HF_GRADUTILS_<FIELD>``, as ``HF_GRADUTILS_SYNC``. accelerate's own
    fields (``num_steps``, …) are for the Accelerator; a Trainer has arguments for them.

    Raises:
        InvalidArgumentError: a setting is invalid; the message lists the valid ones and names its variable.
    """

    loss_unit: LossUnit = field(default_factory=_setting("loss_unit", "auto"))
    """The targets that the loss is a mean over; ``auto`` finds out from the labels and the loss."""
    count_targets: CountTargets | None = None
    """Batch → number of targets, a 0-d tensor; overrides ``loss_unit``."""
    check_loss_unit: bool = field(default_factory=_setting("check_loss_unit", True))
    """Verify before the first step that the loss is a mean over what is counted: on the first batch, with three
    forwards, or on rows of the data set if that cannot tell, and for a loss of your own on both."""
    counts: Counts = field(default_factory=_setting("counts", "auto"))
    """When the targets of a window are added up over its micro-batches and ranks: ``streamed``, at its end; ``first``,
    before its first backward, as transformers does: gradients are final in the backward, and ``num_items_in_batch`` is
    the Trainer's own; or ``auto``: streamed, but first where code of yours needs it. See ``docs/custom.md``."""
    aux: Aux = field(default_factory=_setting("aux", "mean"))
    """The auxiliary loss of a mixture of experts: the ``mean`` of the micro-batches' own, weighted by targets, or
    ``exact``, that of the whole batch, for one more forward without gradients. See ``docs/whole_batch.md``."""
    sync: Sync | None = field(default_factory=_setting("sync", None))
    """When gradients are communicated: ``defer`` to the last micro-batch, ``every`` one, ``reduce_scatter`` shards in
    every one and replicas in the last, or ``auto``, by the free memory. None is ``defer``, but ``auto`` where FSDP2
    accumulates in float32 instead of half precision. See ``docs/sync.md``."""
    accumulate_in_float32: AccumulateInFloat32 = field(default_factory=_setting("accumulate_in_float32", "auto"))
    """Gradients of parameters in half precision (``model.bfloat16()``) are accumulated in float32 and then rounded, for
    2 bytes more per parameter; ``auto``: from 32 micro-batches on, but not under FSDP2. See ``docs/exactness.md``."""
    norm_type: float = field(default_factory=_setting("norm_type", 2.0))
    """p of the gradient norm that is logged and clipped to; ``inf`` is the largest element."""
    grad_norm_groups: NormGroups = field(default_factory=_setting("grad_norm_groups", None))
    """Groups of parameters whose norms are logged as ``grad_norm/<group>``: ``"layer"``, or group → name pattern."""
    ownership: Ownership | None = field(default_factory=_setting("ownership", None))
    """Plain parameters of which ranks hold different parts, see :func:`hf_gradutils.clip_gradients`."""
    on_nonfinite: OnNonfinite = field(default_factory=_setting("on_nonfinite", "raise"))
    """Policy for a step whose gradient is inf or NaN anywhere. See ``docs/nonfinite.md``."""
    max_skipped_steps: int = field(default_factory=_setting("max_skipped_steps", 10))
    """Steps in a row that ``on_nonfinite="skip"`` leaves out; one more is an error."""
    fold_into_optimizer: bool = field(default_factory=_setting("fold_into_optimizer", False))
    """Let a fused optimizer do the scaling, which saves a pass over the gradients; before the step ``.grad`` is
    unscaled."""

    def __post_init__(self) -> None:
        from_variables = _from_variables()
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            try:
                check(value)
            except InvalidArgumentError as error:
                is_from_variable = name in from_variables and from_variables[name] == value
                variable = f"{_environment.SETTING}{name.upper()}: " if is_from_variable else ""
                raise InvalidArgumentError(f"{variable}{error}") from None
        self.effective_sync(each_batch=self.sync_each_batch)

    @classmethod
    def of(cls, plugin: GradientAccumulationPlugin | None) -> "GradUtilsPlugin":
        """Return the plugin, or a new one with the settings of accelerate's own."""
        if isinstance(plugin, cls):
            return plugin
        return cls() if plugin is None else cls(**vars(plugin))

    def num_micro_batches(self, gradient_accumulation_steps: int | None) -> int:
        """Micro-batches per window: ``num_steps`` or the argument, else that of ``accelerate launch``, else 1.

        Raises:
            InvalidArgumentError: the two differ; or a setting is for a Trainer only.
        """
        if self.aux != "mean":
            raise InvalidArgumentError(
                f"aux={self.aux!r} is for a Trainer, which runs both forwards of each micro-batch; leave it out in a "
                "loop of your own"
            )
        numbers = {self.num_steps, gradient_accumulation_steps} - {None}
        if len(numbers) > 1:
            raise InvalidArgumentError(
                f"gradient_accumulation_steps={gradient_accumulation_steps} and "
                f"GradUtilsPlugin(num_steps={self.num_steps}) differ; leave out gradient_accumulation_steps"
            )
        return numbers.pop() if numbers else _environment.read_accumulation_steps() or 1

    def of_accelerate(self, num_steps: int) -> GradientAccumulationPlugin:
        """The plugin for accelerate itself."""
        own = {field.name: getattr(self, field.name) for field in fields(GradientAccumulationPlugin)}
        return GradientAccumulationPlugin(**own | {"num_steps": num_steps})

    def to_kwargs(self) -> dict[str, Any]:
        """Raise InvalidArgumentError: only accelerate's own Accelerator calls this, and it would weight nothing."""
        raise InvalidArgumentError(
            "accelerate's Accelerator would ignore the settings of a GradUtilsPlugin; use "
            "hf_gradutils.GradUtilsAccelerator(gradient_accumulation_plugin=…), or pass accelerate's own "
            "GradientAccumulationPlugin"
        )

    def counter(self) -> TargetCounter:
        """The counter of a batch's targets."""
        return TargetCounter(self.loss_unit, self.count_targets)

    def guard(self) -> StepGuard:
        """The judge of steps."""
        return StepGuard(self.on_nonfinite, self.max_skipped_steps)

    def effective_sync(self, *, each_batch: bool, widens_gradients: bool = False) -> Sync:
        """The policy; ``auto`` by default if deferred gradients are wider than without this package.

        Args:
            each_batch: accelerate's own option ``sync_each_batch``, which is ``every``.
            widens_gradients: As in :class:`Windows`.
        """
        if each_batch and self.sync not in (None, "defer", "every"):
            raise InvalidArgumentError(
                f"sync={self.sync!r} and accelerate's sync_each_batch=True contradict each other; leave out "
                "sync_each_batch, which means sync='every'"
            )
        default: Sync = "auto" if widens_gradients else "defer"
        return "every" if each_batch else self.sync or default

    def accumulation_settings(self) -> list[str]:
        """``name=value`` of each field of accelerate's own plugin that is set; a Trainer takes these elsewhere."""
        own = {field.name: field.default for field in fields(GradientAccumulationPlugin)}
        return [f"{name}={getattr(self, name)!r}" for name, default in own.items() if getattr(self, name) != default]
