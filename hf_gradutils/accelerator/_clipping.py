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


def clip_by_norm(
    accelerator: Accelerator,
    windows: Windows,
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float | None,
) -> Tensor:
    """:meth:`GradUtilsAccelerator.clip_grad_norm_`; one collective where these are all parameters of a window."""
    parameters = _at_the_end(accelerator, "clip_grad_norm_", parameters)
    max_norm, plugin = check_max_norm(max_norm), windows.plugin
    p = plugin.norm_type if norm_type is None else check_norm_type(norm_type)
    ending = windows.by_models.with_any_of(parameters)
    if windows.engine is not None:
        if p != plugin.norm_type:
            raise InvalidArgumentError(f"DeepSpeed's engine clips by another norm than norm_type={p:g}; leave it out")
        return _clip_by_engine(windows, ending, parameters, max_norm)
    if len(ending) == 1 and ending[0].is_open and ending[0].is_all(parameters) and p == plugin.norm_type:
        return windows.close(ending[0], max_norm)[0].grad_norm
    _close_all(windows, ending)
    holder, trained = windows.by_models.holder_of(parameters, models_of(accelerator))
    return clip_parameters(holder, trained, max_norm, norm_type=p, ownership=plugin.ownership)


def _clip_by_engine(windows: Windows, ending: list[ModelWindow], parameters: list[Tensor], max_norm: float) -> Tensor:
    """Close the window by DeepSpeed's engine, which clips; the norm before, again if it has ended in this step."""
    assert windows.engine is not None
    if len(ending) != 1 or not ending[0].is_all(parameters) or not (ending[0].is_open or ending[0].num_closed):
        raise InvalidArgumentError(
            "DeepSpeed's engine clips all its gradients by one norm, in its step: call clip_grad_norm_ with all "
            "parameters of the model, after the last backward of a window"
        )
    if ending[0].is_open:
        return windows.close(ending[0], max_norm)[0].grad_norm
    windows.engine.check_clipping(max_norm)
    assert windows.report is not None
    return windows.report.grad_norm


def clip_by_value(
    accelerator: Accelerator, windows: Windows, parameters: Tensor | Iterable[Tensor], clip_value: float
) -> None:
    """:meth:`GradUtilsAccelerator.clip_grad_value_`."""
    parameters = _at_the_end(accelerator, "clip_grad_value_", parameters)
    if not clip_value > 0:
        raise InvalidArgumentError(f"clip_value must be > 0, got {clip_value}")
    if windows.engine is not None:
        raise InvalidArgumentError("DeepSpeed's engine clips by a norm only, and by itself; leave out clip_grad_value_")
    _close_all(windows, windows.by_models.with_any_of(parameters))
    for gradient in (p.grad for p in parameters if p.grad is not None):
        if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
            raise InvalidArgumentError(
                f"a gradient with placements {gradient.placements} is not summed over its mesh yet, so its elements "
                "cannot be clipped; use clip_grad_norm_"
            )
        local_tensor(gradient.detach()).clamp_(-clip_value, clip_value)


def _at_the_end(accelerator: Accelerator, method: str, parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The parameters as a list. InvalidArgumentError if the window goes on."""
    if not accelerator.sync_gradients:
        raise InvalidArgumentError(
            f"{method} was called before the end of the window; write `if accelerator.sync_gradients:` above it"
        )
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _close_all(windows: Windows, ending: Iterable[ModelWindow]) -> None:
    for window in ending:
        if window.is_open:
            windows.close(window, folds=False)
        elif window.is_folded:
            raise InvalidArgumentError(
                "gradients can be clipped once per window with fold_into_optimizer=True, because the optimizer scales "
                "them afterwards; leave out fold_into_optimizer to clip again"
            )
