"""Every error the package raises on purpose.

    GradUtilsError
    ├── InvalidArgumentError (also ValueError)   an argument, a configuration or a variable is wrong
    ├── TargetCountError     (also ValueError)   the targets of a batch cannot be counted
    ├── LossUnitError                            the loss is not a mean over the targets counted
    ├── NonfiniteGradientError                   the gradient of a step is inf or NaN somewhere
    ├── InvarianceError                          a check found that the gradient depends on how the batch is cut up
    ├── ReplicaMismatchError                     tensors that should be copies differ between ranks
    ├── LauncherError                            the launcher's variables do not describe the ranks
    └── FirstRankError                           a node's first rank did not finish its block

Each message says what is wrong and what to do.
"""


class GradUtilsError(Exception):
    """Root of the errors that hf_gradutils raises on purpose."""


class InvalidArgumentError(GradUtilsError, ValueError):
    """An argument, a configuration value or an environment variable is out of its range."""


class TargetCountError(GradUtilsError, ValueError):
    """The targets of a batch cannot be counted, so no exact mean can be formed."""


class LossUnitError(GradUtilsError):
    """The loss is not a mean over the targets that were counted."""


class NonfiniteGradientError(GradUtilsError):
    """The gradient of an optimizer step is not finite on some rank. Raised on every rank.

    Args:
        message: The parameters, the losses, and the fix.
        step: The optimizer step, counted from 1.
        parameters: Rank → names of its parameters whose gradients are not finite.
        losses: Rank → its micro-batches' own mean losses.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int | None = None,
        parameters: dict[int, list[str]] | None = None,
        losses: dict[int, list[float]] | None = None,
    ):
        super().__init__(message)
        self.step = step
        self.parameters = parameters or {}
        self.losses = losses or {}


class InvarianceError(GradUtilsError):
    """The gradient depends on how the batch is cut up or spread. Raised on every rank.

    Args:
        message: The report as text.
        report: The ``InvarianceReport``.
    """

    def __init__(self, message: str, *, report: object = None):
        super().__init__(message)
        self.report = report


class ReplicaMismatchError(GradUtilsError):
    """Tensors that should be copies of each other hold different values on different ranks."""


class LauncherError(GradUtilsError):
    """The launcher's environment variables do not describe the ranks, or contradict each other."""


class FirstRankError(GradUtilsError):
    """The first rank of a node did not finish the block that the other ranks were waiting for.

    Its traceback, where it has one, is a note of this error, so that ``str(error)`` stays one line.

    Args:
        message: The rank, its process, the block and the reason.
        global_rank: The rank that failed; None if this rank gave up by itself.
        reason: The first rank's own error as Python prints it, or how it ended; None if this rank gave up.
    """

    def __init__(self, message: str, *, global_rank: int | None = None, reason: str | None = None):
        super().__init__(message)
        self.global_rank = global_rank
        self.reason = reason
