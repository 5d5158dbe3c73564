"""Pickled and copied Accelerators.

A pickled one brings all that it has prepared. A deep copy is the same object, as accelerate has it.
"""

from typing import Any

from accelerate import Accelerator

from hf_gradutils.accelerator._optimizer import GradUtilsOptimizer
from hf_gradutils.accelerator._plugin import GradUtilsPlugin
from hf_gradutils.accelerator._windows import Windows
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.upstream.accelerate import dataloaders_of, optimizers_of, schedulers_of


class CopyableAccelerator(Accelerator):  # type: ignore[misc]
    """A pickled one starts with windows of its own: a pickled parameter has no gradient."""

    windows: Windows
    """The windows of the models that are trained; for Trainers and checks."""

    def _add_windows(self, plugin: GradUtilsPlugin, num_micro_batches: int) -> None:
        """Set :attr:`windows`."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """All but the windows, after raising what the device found wrong with the last step.

        Raises:
            InvalidArgumentError: DeepSpeed's engine cannot be pickled.
        """
        if self.windows.engine is not None:
            raise InvalidArgumentError("DeepSpeed's engine cannot be pickled; save_state or save_model writes it")
        self.windows.raise_pending()
        self.windows.loss_scale.update()
        return vars(self) | {"windows": (self.windows.plugin, self.windows.num_micro_batches)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        plugin, num_micro_batches = state["windows"]
        self.__dict__.update(state)
        self._add_windows(plugin, num_micro_batches)
        for optimizer in optimizers_of(self):
            GradUtilsOptimizer.adopt(optimizer, self.windows.before_step)
        self._share_state()

    def __copy__(self) -> "CopyableAccelerator":
        """A shallow copy: it shares the windows with its original, which has to live as long."""
        copied = object.__new__(type(self))
        copied.__dict__.update(vars(self))
        return copied

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super().prepare(*args, **kwargs)
        self._share_state(*args)
        return prepared

    def _share_state(self, *copies: Any) -> None:
        """Tell all prepared objects when gradients are synchronised, and which loader is read.

        Usually they know: accelerate shares its ``GradientState`` in a process. But each copied object has its own.
        """
        for prepared in (*optimizers_of(self), *schedulers_of(self), *dataloaders_of(self), *copies):
            if hasattr(prepared, "gradient_state"):
                prepared.gradient_state = self.gradient_state
