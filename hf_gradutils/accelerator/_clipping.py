"""Clipping at the end of a window: by a norm, or each element."""

from collections.abc import Iterable

from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_gradutils.accelerator._model_windows import ModelWindow
from hf_gradutils.accelerator._windows import Windows
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.gradients.clip import clip_parameters
from hf_gradutils.gradients.power_sums import check_norm_type
from hf_gradutils.gradients.scaling import check_max_norm
from hf_gradutils.upstream.accelerate import models_of
from hf_gradutils.upstream.dtensor import local_tensor


class Clipping:
    """What ``GradUtilsAccelerator`` documents of its two methods that clip."""

    def __init__(self, accelerator: Accelerator, windows: Windows):
        self._accelerator = accelerator
        self._windows = windows

    def by_norm(self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float | None) -> Tensor:
        """Clip the exact mean gradient of these parameters to a norm; their norm before."""
        self._check_at_end("clip_grad_norm_")
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        max_norm, plugin = check_max_norm(max_norm), self._windows.plugin
        p = plugin.norm_type if norm_type is None else check_norm_type(norm_type)
        windows = self._windows.found.with_any_of(parameters)
        if len(windows) == 1 and windows[0].is_open and windows[0].is_all(parameters) and p == plugin.norm_type:
            return self._windows.close(windows[0], max_norm)[0].grad_norm
        self._close_all(windows)
        holder, trained = self._windows.found.holder_of(parameters, models_of(self._accelerator))
        return clip_parameters(holder, trained, max_norm, norm_type=p, ownership=plugin.ownership)

    def by_value(self, parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
        """Limit every element of the exact mean gradient of these parameters."""
        self._check_at_end("clip_grad_value_")
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if not clip_value > 0:
            raise InvalidArgumentError(f"clip_value must be > 0, got {clip_value}")
        self._close_all(self._windows.found.with_any_of(parameters))
        for parameter in parameters:
            gradient = parameter.grad
            if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
                raise InvalidArgumentError(
                    f"expected summed gradients, got one with placements {gradient.placements}; use clip_grad_norm_"
                )
            if gradient is not None:
                local_tensor(gradient.detach()).clamp_(-clip_value, clip_value)

    def _check_at_end(self, name: str) -> None:
        if not self._accelerator.sync_gradients:
            raise InvalidArgumentError(
                f"expected {name} at the end of a window, got it before; write `if accelerator.sync_gradients:` above"
            )

    def _close_all(self, windows: Iterable[ModelWindow]) -> None:
        for window in windows:
            if window.is_open:
                self._windows.close(window, folds=False)
            elif window.is_folded:
                raise InvalidArgumentError(
                    "expected to clip once with fold_into_optimizer=True, because the optimizer multiplies the "
                    "gradients after that, got another clip; leave out fold_into_optimizer"
                )
