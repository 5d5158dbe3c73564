"""Documented utilities around a training step: first rank, barrier, loss, sync, rescale, clip.

Each works without a process group and gives the same answer there.
"""

import contextlib
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hf_gradutils._collectives import all_reduce_, world_domain
from hf_gradutils._devices import on_device
from hf_gradutils.coordination.barrier import barrier_and_log
from hf_gradutils.coordination.first_rank import FirstRankPerNode
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.gradients.clip import clip_parameters
from hf_gradutils.gradients.ownership import Ownership
from hf_gradutils.gradients.power_sums import check_norm_type
from hf_gradutils.gradients.scaling import check_max_norm, scale_
from hf_gradutils.sync import SyncContext
from hf_gradutils.upstream.dtensor import local_tensor

__all__ = [
    "FirstRankPerNode",
    "barrier_and_log",
    "clip_gradients",
    "get_sync_ctx",
    "logger",
    "reduce_loss",
    "rescale_gradients",
]

logger = logging.getLogger(__name__)


def reduce_loss(
    loss_store: Sequence[Tensor],
    total_num_tokens: Tensor,
    per_token_loss: bool = True,
    dp_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the losses over micro-batches and data ranks, and its denominator.

    Args:
        loss_store: This rank's losses, shape () or (1,), one per micro-batch; sums over tokens for a per-token loss.
            May be empty.
        total_num_tokens: This rank's tokens, shape () or (1,), any dtype. Left unchanged.
        per_token_loss: False divides by the number of stored losses instead of the tokens.
        dp_group: Data ranks; None is the default group, or this process without one.

    Returns:
        ``(loss, denominator)``, shape (): float64 and int64 (a count beyond 2^31 keeps its digits), on the
        losses' device, or the count's if there are none. The caller divides.

    Collectives: one all-reduce over ``dp_group``, for both numbers. Host syncs: none.
    """
    device = loss_store[0].device if loss_store else total_num_tokens.device
    if loss_store:
        loss = torch.stack([stored.detach().to(torch.float64).sum() for stored in loss_store]).sum()
    else:
        loss = torch.zeros((), dtype=torch.float64, device=device)
    if per_token_loss:
        count = on_device(total_num_tokens.detach().sum(), device).to(torch.float64)
    else:
        count = torch.full((), float(len(loss_store)), dtype=torch.float64, device=device)
    reduced = all_reduce_(world_domain(dp_group), torch.stack((loss, count)))
    return reduced[0], reduced[1].to(torch.int64)


def get_sync_ctx(model: nn.Module, is_optim_step: bool) -> contextlib.AbstractContextManager[None]:
    """Context for the forward and backward of one micro-batch.

    Gradients stay local until the last micro-batch of the accumulation window, which communicates the sum. State
    changes on enter and is restored on exit.

    Args:
        model: DDP, FSDP2, HSDP or FSDP1 anywhere in the tree, also under ``torch.compile``, PEFT and accelerate;
            without any, the context does nothing.
        is_optim_step: The optimizer steps after this micro-batch.

    Collectives: none of its own.
    """
    return SyncContext(model, is_last=is_optim_step)


@torch.no_grad()
def rescale_gradients(
    model: nn.Module, num_tokens_for_grad_scaling: Tensor, dp_group: ProcessGroup | None = None
) -> None:
    """Turn averaged sum-of-losses gradients into per-token means: multiply by dp_size / global tokens.

    Data parallelism has divided the sum by ``dp_size``; this undoes it and divides by the tokens of all ranks. If
    tensor-parallel ranks count the same tokens, the default group is right too: both numbers grow by the same factor.

    Args:
        model: Every ``grad`` in it is multiplied in place; any dtype, DTensor or not.
        num_tokens_for_grad_scaling: This rank's tokens over all micro-batches, shape () or (1,). Left unchanged. Zero
            on every rank only multiplies by ``dp_size``.
        dp_group: Ranks the gradients were averaged over; None is the default group, or this process without one.

    Collectives: one all-reduce over ``dp_group``. Host syncs: none; as :func:`clip_gradients` for offloaded gradients.
    """
    domain = world_domain(dp_group)
    grads = [local_tensor(p.grad) for p in model.parameters() if p.grad is not None]
    count = num_tokens_for_grad_scaling.detach().sum().to(torch.float64)
    if grads:
        count = on_device(count, grads[0].device)
    total = all_reduce_(domain, count.view(1))
    scale_(grads, domain.num_ranks / total.select(0, 0).clamp(min=1.0))


@torch.no_grad()
def clip_gradients(
    model: nn.Module,
    clip_norm: float,
    foreach: bool = True,
    *,
    norm_type: float = 2.0,
    group: ProcessGroup | None = None,
    ownership: Ownership | None = None,
) -> Tensor:
    """Clip the gradients of a model to a global norm, for any mix of meshes and plain tensors.

    Args:
        model: Its gradients are synchronised: sharded, replicated, Partial and plain ones side by side. Ranks may hold
            different parameters, and a rank may have no gradients.
        clip_norm: Greater than 0; ``inf`` measures without clipping.
        foreach: One multi-tensor call per dtype; False makes one per tensor.
        norm_type: p of the norm; ``inf`` is the largest element.
        group: All ranks that train the model; None is the default group, or this process without one.
        ownership: Name pattern → ``"sharded"`` for plain parameters of which each rank holds a part of its own
            (experts), or the group whose ranks hold different parts, if other groups hold copies. Megatron's and
            DeepSpeed's marks and FSDP1 need no entry. All others must be the same on all ranks, which is checked.

    Returns:
        The norm before clipping, shape (), float64, on the gradients' device. If it is not finite, gradients are left
        as they are.

    Collectives: one all-reduce over ``group`` (an all-gather for p = inf); every rank must call. The first call for a
        model also gathers one object per rank; a gradient with Partial placements adds one. Host syncs: none after the
        first call; one if gradients are offloaded to the CPU and the group cannot carry them from there.

    Raises:
        InvalidArgumentError: ``clip_norm`` ≤ 0, ``norm_type`` ≤ 0 or an invalid ``ownership``.
        ReplicaMismatchError: parameters that should be copies of each other differ between ranks.
    """
    max_norm = check_max_norm(clip_norm)
    p = check_norm_type(norm_type)
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(
            f"model must be an nn.Module, got {type(model).__name__}; for tensors use grad_utils"
        )
    return clip_parameters(model, None, max_norm, foreach=foreach, norm_type=p, group=group, ownership=ownership)
