"""Every error the package raises on purpose.

    GradUtilsError
    ├── InvalidArgumentError (also ValueError)   an argument, a configuration or a variable is wrong
    ├── TargetCountError     (also ValueError)   nobody can say how many targets a batch has
    ├── LossUnitError                            the loss is not a mean over what was counted
    ├── ReplicaMismatchError                     tensors that should be copies differ between ranks
    ├── LauncherError                            the launcher's variables do not describe the ranks
    └── FirstRankError                           a node's first rank did not finish its block

Each message says what was expected, what arrived and what to do.
"""


class GradUtilsError(Exception):
    """Root of the errors that hf_gradutils raises on purpose."""


class InvalidArgumentError(GradUtilsError, ValueError):
    """An argument, a configuration value or an environment variable is out of its range."""


class TargetCountError(GradUtilsError, ValueError):
    """The targets of a batch cannot be counted, so no exact mean can be formed."""


class LossUnitError(GradUtilsError):
    """The loss does not behave like a mean over the targets that were counted."""


class ReplicaMismatchError(GradUtilsError):
    """Tensors that should be copies of each other hold different values on different ranks."""


class LauncherError(GradUtilsError):
    """The launcher's environment variables do not describe the ranks, or contradict each other."""


class FirstRankError(GradUtilsError):
    """The first rank of a node did not finish the block that the other ranks were waiting for."""
