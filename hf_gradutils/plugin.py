"""The settings of the Trainer and of the Accelerator."""

from dataclasses import dataclass, fields

from accelerate.utils import GradientAccumulationPlugin

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.nonfinite import OnNonfinite, StepGuard
from hf_gradutils.norm_groups import NormGroups, check_norm_groups
from hf_gradutils.norms import check_norm_type
from hf_gradutils.ownership import Ownership, check_ownership
from hf_gradutils.sync_auto import SYNCS, Sync
from hf_gradutils.targets import CountTargets, LossUnit, TargetCounter


@dataclass
class GradUtilsPlugin(GradientAccumulationPlugin):  # type: ignore[misc]
    """How gradients are accumulated, for ``GradUtilsTrainer(grad_plugin=…)``.

    Raises:
        InvalidArgumentError: a setting that means nothing, with what it may be.
    """

    loss_unit: LossUnit = "auto"
    """What the loss is a mean over; ``auto`` asks the labels and the loss itself."""
    count_targets: CountTargets | None = None
    """Batch → number of targets, a 0-d tensor; overrides ``loss_unit``."""
    check_loss_unit: bool = True
    """Verify on the first batch, with three forwards, that the loss is a mean over what is counted."""
    sync: Sync = "defer"
    """When gradients are communicated: ``defer`` to the last micro-batch, ``every`` one, ``reduce_scatter`` shards in
    every one and replicas in the last, or ``auto``, by what memory allows. See ``docs/sync.md``."""
    norm_type: float = 2.0
    """p of the gradient norm that is logged and clipped to; ``inf`` is the largest element."""
    grad_norm_groups: NormGroups = None
    """Groups of parameters whose norms are logged as ``grad_norm/<group>``: ``"layer"``, or group → name pattern."""
    ownership: Ownership | None = None
    """Plain parameters of which ranks hold different parts, see :func:`hf_gradutils.clip_gradients`."""
    on_nonfinite: OnNonfinite = "raise"
    """What becomes of a step whose gradient is inf or NaN anywhere. See ``docs/nonfinite.md``."""
    max_skipped_steps: int = 10
    """Steps in a row that ``on_nonfinite="skip"`` leaves out; one more is an error."""
    fold_into_optimizer: bool = False
    """Let a fused optimizer do the scaling, which saves one pass over the gradients. Whatever reads ``.grad`` before
    the step sees it unscaled."""

    def __post_init__(self) -> None:
        self.counter()
        self.guard()
        if self.sync not in SYNCS:
            raise InvalidArgumentError(f"sync must be one of {', '.join(SYNCS)}, got {self.sync!r}")
        self.effective_sync(each_batch=self.sync_each_batch)
        check_norm_type(self.norm_type)
        check_norm_groups(self.grad_norm_groups)
        check_ownership(self.ownership or {})

    def counter(self) -> TargetCounter:
        """Counts a batch's targets as these settings say."""
        return TargetCounter(self.loss_unit, self.count_targets)

    def guard(self) -> StepGuard:
        """Judges steps as these settings say."""
        return StepGuard(self.on_nonfinite, self.max_skipped_steps)

    def effective_sync(self, *, each_batch: bool) -> Sync:
        """The policy, with accelerate's own option ``sync_each_batch`` taken for ``every``."""
        if each_batch and self.sync not in ("defer", "every"):
            raise InvalidArgumentError(
                f"expected sync or accelerate's sync_each_batch, got sync={self.sync!r} and sync_each_batch=True; "
                "leave out sync_each_batch, which means sync='every'"
            )
        return "every" if each_batch else self.sync

    def accumulation_settings(self) -> list[str]:
        """``name=value`` of everything set that accelerate's own plugin has, which a Trainer takes elsewhere."""
        own = {field.name: field.default for field in fields(GradientAccumulationPlugin)}
        return [f"{name}={getattr(self, name)!r}" for name, default in own.items() if getattr(self, name) != default]
