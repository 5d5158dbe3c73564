"""One accumulation window: weigh every micro-batch by its targets, then turn the sum into the exact mean.

    micro-batch m:   (L[m] · n[m] / K).backward()        L the micro-batch's own mean, n its targets
    window's end:    grad ·= K · R / S                   R ranks, S = Σ n over micro-batches and ranks

Data-parallel wrappers average over D ranks, and T = R / D ranks see the same batch (tensor parallelism), so
S = T·N and K·R/S = K·D/N with N the targets of the whole batch: what is left is Σ n·∇L / N. K is a power of
two that keeps the backward's magnitudes near those of a mean, which matters in fp16; it cancels exactly.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.ownership import Ownership, plan_for_model, trainable_parameters
from hf_gradutils.scaling import clip_coefficient, scale_
from hf_gradutils.total_norm import collect_gradients, reduce_with_norm


@dataclass(frozen=True, slots=True)
class WindowReport:
    """What one optimizer step was made of; 0-d tensors on the device, read by whoever logs them."""

    loss: Tensor
    """Σ n·L / Σ n over micro-batches and data ranks, float64; 0 for a window without targets."""
    num_targets: Tensor
    """Σ n over micro-batches and data ranks, float64; a tensor-parallel replica counts once."""
    grad_norm: Tensor
    """Norm of the exact mean gradient before clipping, float64."""
    num_ranks_with_data: Tensor
    """Ranks that said, with :meth:`AccumulationWindow.note_data_left`, that they have batches for another window."""


class AccumulationWindow:
    """Sums of the micro-batches whose gradients are in ``.grad`` now.

    It lives as long as those gradients: ``close`` empties it, and the next ``weigh`` starts a new window.

    Args:
        device: Where the sums live; the losses' device.
        loss_scale: K, a power of two, the same on every rank and from ``weigh`` to ``close``.
        num_replicas: Ranks that see the same batch, R / D: 1 for data parallelism of any kind.
        is_sum: The losses are sums, not means: they add up to that of the whole batch and are not divided.
    """

    def __init__(self, device: torch.device, *, loss_scale: float = 1.0, num_replicas: int = 1, is_sum: bool = False):
        if loss_scale <= 0 or not math.log2(loss_scale).is_integer():
            raise InvalidArgumentError(f"loss_scale must be a power of two, got {loss_scale}")
        self._loss_scale = loss_scale
        self._num_replicas = num_replicas
        self._is_sum = is_sum
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def weigh(self, loss: Tensor, num_targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss to call ``backward`` on, in at least float32 (bf16 would round n / K to 8 bits).

        Args:
            loss: Shape (), the micro-batch's own mean over its targets.
            num_targets: Shape (), any dtype: the targets that mean is over. At 0 the loss counts for nothing.
            weight: Shape (), what turns the loss into the sum over its targets, where that is not their number.

        Collectives: none. Host syncs: none.
        """
        device = self._sums.device
        count = num_targets.detach().to(device=device, dtype=torch.float64, non_blocking=True)
        factor = count if weight is None else weight.detach().to(device=device, dtype=torch.float64, non_blocking=True)
        own_mean = loss.detach().to(device=device, dtype=torch.float64)
        self._sums[:2] += torch.stack((count, torch.where(factor == 0, 0.0, own_mean * factor)))
        wide = loss.to(torch.promote_types(loss.dtype, torch.float32))
        return wide * (factor / self._loss_scale).to(device=wide.device, dtype=wide.dtype)

    def note_data_left(self, has_data: bool) -> None:
        """Say whether this rank has batches for another window; ``close`` tells everybody how many ranks do."""
        self._sums[2].fill_(has_data)

    def discard(self) -> None:
        """Forget the micro-batches so far, together with the gradients that the caller drops."""
        self._sums.zero_()

    @torch.no_grad()
    def close(
        self,
        model: nn.Module,
        max_norm: float = math.inf,
        *,
        norm_type: float = 2.0,
        ownership: Ownership | None = None,
    ) -> WindowReport:
        """Make ``.grad`` the exact mean gradient of the window, clipped to ``max_norm``, and start afresh.

        Args:
            model: All of the model that is trained; its gradients are synchronised.
            max_norm: Greater than 0; inf does not clip.
            norm_type: p of the norm; inf is the largest element.
            ownership: As in :func:`hf_gradutils.dist_utils.clip_gradients`.

        Collectives: one all-reduce over all ranks (an all-gather for p = inf); every rank must call. The
            first call for a model also builds its plan. Host syncs: none.
        """
        parameters = trainable_parameters(model)
        plan = plan_for_model(model, parameters, ownership=ownership)
        gradients = collect_gradients(parameters.values(), plan)
        norms, (count, weighted_loss, num_ranks_with_data) = reduce_with_norm(plan, gradients, norm_type, self._sums)
        self.discard()

        # A window without targets has gradients of zero; any finite divisor leaves them so.
        divisor = torch.where(count == 0, float(self._num_replicas), count)
        if self._is_sum:
            divisor = torch.full_like(count, self._num_replicas)
        multiplier = self._loss_scale * plan.domain.num_ranks / divisor
        grad_norm = norms.total * multiplier
        scale_(gradients.shards, multiplier * clip_coefficient(grad_norm, max_norm))
        return WindowReport(
            loss=weighted_loss / divisor,
            num_targets=count / self._num_replicas,
            grad_norm=grad_norm,
            num_ranks_with_data=num_ranks_with_data,
        )


def loss_scale_for(targets_per_window: float) -> float:
    """A K for :class:`AccumulationWindow`: the power of two next to a rank's targets in one window.

    Args:
        targets_per_window: The same number on every rank.
    """
    return float(2 ** round(math.log2(max(targets_per_window, 1.0))))
