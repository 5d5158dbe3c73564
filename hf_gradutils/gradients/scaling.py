"""Multiply local tensors by a number on the device, and the number for clipping."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_gradutils._devices import Kind, common_kind, on_device
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.upstream.torch import foreach_mul_, foreach_mul_in_fp32_, foreach_mul_promoted_

_EPS = 1e-6
"""Added to the norm before dividing, as in ``torch.nn.utils.clip_grad_norm_``."""


def check_max_norm(max_norm: float) -> float:
    """Return ``max_norm`` as a float. InvalidArgumentError unless it is > 0 (``inf`` is, and never clips)."""
    value = float(max_norm)
    if not value > 0:
        raise InvalidArgumentError(
            f"max_norm must be > 0, got {max_norm}; to measure without clipping call get_grad_norm or pass inf"
        )
    return value


def clip_divisor(total_norm: Tensor, max_norm: float) -> Tensor:
    """The divisor of clipping: ``max(1, (total_norm + 1e-6) / max_norm)``, and 1 if the norm is not finite.

    A non-finite norm as a factor would turn finite gradients into zeros or NaN, and hide which ones were bad.

    The result has the dtype of ``total_norm``. Host syncs: none.

    Source: ``torch.nn.utils.clip_grad_norm_``, except for norms that are not finite.
    """
    if math.isinf(max_norm):
        return torch.ones_like(total_norm)
    ratio = torch.rsub(total_norm, _EPS / max_norm, alpha=-1 / max_norm)  # a sum and a division in one call
    return ratio.clamp(min=1.0).nan_to_num(nan=1.0, posinf=1.0)


def clip_coefficient(total_norm: Tensor, max_norm: float) -> Tensor:
    """The factor of clipping: 1 / :func:`clip_divisor`."""
    return clip_divisor(total_norm, max_norm).reciprocal()


@torch.no_grad()
def scale_(tensors: Iterable[Tensor], factor: Tensor, *, foreach: bool = True, kind: Kind | None = None) -> None:
    """Multiply every tensor by ``factor``, in place.

    Half-precision tensors are multiplied in float32 and rounded once, so that the factor keeps its digits.

    Args:
        tensors: Local floating-point tensors on any devices; each is read and written once.
        factor: Shape (), any float dtype, on any device.
        foreach: One multi-tensor call per device and dtype; False makes one call per tensor. For bfloat16 CUDA has no
            multi-tensor kernel with a float32 factor: one call, but a launch per tensor.
        kind: ``common_kind(tensors)``, if known.

    Host syncs: none; one if tensors are on the CPU and the factor is not.
    """
    for (device, dtype), batch in _batches(list(tensors), kind).items():
        is_half = dtype in (torch.bfloat16, torch.float16)
        local_factor = on_device(factor, device).to(torch.float32 if is_half else dtype)
        if not foreach:
            for tensor in batch:
                foreach_mul_promoted_([tensor], local_factor)
        elif is_half or (dtype == torch.float32 and device.type == "cpu"):  # takes half as long for small tensors there
            foreach_mul_in_fp32_(batch, local_factor)
        else:
            foreach_mul_(batch, local_factor)


def _batches(tensors: Sequence[Tensor], kind: Kind | None) -> dict[tuple[torch.device, torch.dtype], Sequence[Tensor]]:
    """The tensors by device and dtype."""
    device, dtype = common_kind(tensors) if kind is None else kind
    if device is not None and dtype is not None:
        return {(device, dtype): tensors}
    batches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        batches.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return dict(batches)
