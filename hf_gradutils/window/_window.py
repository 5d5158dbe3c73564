"""One accumulation window: weight every micro-batch by its targets, then turn the sum into the exact mean.

    micro-batch m:   (L[m] · n[m] / K).backward()        L the micro-batch's own mean, n its targets
    window's end:    grad ·= K · R / S                   R ranks, S = Σ n over micro-batches and ranks

Data-parallel wrappers average over D ranks, and T = R / D ranks see the same batch (tensor parallelism), so
S = T·N and K·R/S = K·D/N with N the targets of the whole batch: the result is Σ n·∇L / N. K is a power of
two that keeps the backward's magnitudes near those of a mean, which matters in fp16; it cancels exactly.

If S is known first (`expect`), the factor moves into the backward: (L[m] · n[m] · R / S).backward(), and ``.grad`` is
final as soon as it is there, for hooks and for optimizers that step in the backward.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_gradutils._collectives import all_reduce_, world_domain
from hf_gradutils._devices import on_device
from hf_gradutils.errors import InvalidArgumentError
from hf_gradutils.gradients.names import NormGroups
from hf_gradutils.gradients.of_model import Gradients, gradients_of
from hf_gradutils.gradients.ownership import Ownership
from hf_gradutils.gradients.scaling import clip_divisor, scale_
from hf_gradutils.gradients.total_norm import total_norm
from hf_gradutils.targets.counter import check_count
from hf_gradutils.window._report import FEWEST, Totals, WindowReport


class AccumulationWindow:
    """Sums of the micro-batches whose gradients are in ``.grad`` now.

    ``close`` empties it, and the next ``weigh`` starts a new window.

    Args:
        device: Of the sums; the losses' device.
        loss_scale: K, a power of two, the same on every rank and from ``weigh`` to ``close``.
        num_replicas: Ranks that see the same batch, R / D: 1 for data parallelism of any kind.
        is_sum: The losses are sums, not means: they add up to the whole batch's and are not divided.
    """

    def __init__(self, device: torch.device, *, loss_scale: float = 1.0, num_replicas: int = 1, is_sum: bool = False):
        if loss_scale <= 0 or not math.log2(loss_scale).is_integer():
            raise InvalidArgumentError(f"loss_scale must be a power of two, got {loss_scale}")
        self._loss_scale = loss_scale
        self._inverse_loss_scale = torch.full((), 1 / loss_scale, dtype=torch.float64, device=device)
        self._num_replicas = num_replicas
        self._is_sum = is_sum
        self._device = self._inverse_loss_scale.device  # with an index: accelerate's "cuda" has none
        self._sums: Tensor | None = None
        """``Totals``, in one tensor: it goes through one reduction."""
        self._losses: list[Tensor] = []
        self._last_factor = self._inverse_loss_scale
        self._expected: Callable[[], Tensor] | None = None
        self._scale: Tensor | None = None
        """K · R / S, once it is known first."""
        self._num_averaged = 1
        self._has_shares = False
        self._planned: Gradients | None = None
        self.has_new_parameters = True
        """The last window trained other parameters than the one before."""

    @property
    def is_empty(self) -> bool:
        """True if no loss has been weighed since the last window ended."""
        return self._sums is None

    @property
    def is_expected(self) -> bool:
        """True if the window's number of targets is known first."""
        return self._expected is not None

    def expect(self, num_targets: Callable[[], Tensor], num_averaged: int) -> None:
        """Make gradients final in the backward.

        Args:
            num_targets: Returns S, Σ n over the window's micro-batches and all ranks, shape (), on the sums' device.
                Called once, before the first backward.
            num_averaged: Divisor of the average over ranks: R, unless an engine divides by another number.
        """

        def scale() -> Tensor:
            if self._is_sum:
                return torch.full_like(self._inverse_loss_scale, self._loss_scale * num_averaged / self._num_replicas)
            return self._loss_scale * num_averaged / num_targets().clamp(min=FEWEST)

        self._expected, self._scale, self._num_averaged = scale, None, num_averaged

    def share(self, weight: Tensor) -> Tensor:
        """The factor from a micro-batch's own mean to its share of the window's mean, whose targets are expected."""
        assert self._expected is not None
        if self._scale is None:
            self._scale = self._expected()
        return self._over_loss_scale(weight) * self._scale

    def weigh(
        self,
        loss: Tensor,
        num_targets: Tensor,
        weight: Tensor | None = None,
        *,
        is_share: bool = False,
        is_reported: bool = True,
    ) -> Tensor:
        """Return the weighted loss to call ``backward`` on, in at least float32 (bf16 would round n / K to 8 bits).

        Args:
            loss: Shape (), the micro-batch's own mean over its targets.
            num_targets: Shape (), any dtype: number of these targets. At 0 the loss counts for nothing.
            weight: Shape (), factor that turns the loss into the sum over its targets, if not their number.
            is_share: The loss is divided by the targets of the whole window already, which must be expected; ``weight``
                then only makes it the share of this rank.
            is_reported: False leaves the report to :meth:`report_loss`.

        Collectives: none. Host syncs: none.
        """
        scaled = factor = self._over_loss_scale(num_targets)
        if weight is not None and weight is not num_targets:
            factor = self._over_loss_scale(weight)
        in_backward = factor
        if is_share:
            assert weight is not None
            in_backward = on_device(weight, self._device)
            factor = in_backward / self.share(torch.ones_like(in_backward)) * self._inverse_loss_scale
            self._has_shares = True
        elif self._expected is not None:
            in_backward = self.share(num_targets if weight is None else weight)
        self._last_factor = factor
        added = torch.stack((scaled, self._sum_of(loss) if is_reported else torch.zeros_like(scaled)))
        self._sums = added if self._sums is None else self._sums.add_(added)
        wide = loss if loss.dtype in (torch.float32, torch.float64) else loss.float()
        return wide * in_backward.to(wide.device, wide.dtype)

    def report_loss(self, loss: Tensor, scale: float = 1.0) -> None:
        """Count a loss for the report, with the weight of the last one that was weighed, times ``scale``."""
        assert self._sums is not None
        self._sums[1] += self._sum_of(loss.detach() * scale)

    def _sum_of(self, loss: Tensor) -> Tensor:
        """The sum over the targets of a mean, over K; kept for messages."""
        own_mean = loss.detach().to(self._device, torch.float64)
        self._losses.append(own_mean)
        return (own_mean * self._last_factor).masked_fill_(self._last_factor == 0, 0.0)

    def _over_loss_scale(self, number: Tensor) -> Tensor:
        number = number.detach() if number.requires_grad else number
        return on_device(number, self._device) * self._inverse_loss_scale  # exact: a power of two

    def discard(self, *, keeps_count: bool = False) -> None:
        """Drop the sums of the micro-batches so far, and what is expected; the caller drops their gradients."""
        self._sums, self._losses = None, []
        if not keeps_count:
            self._expected = self._scale = None
            self._has_shares = False

    @torch.no_grad()
    def close(
        self,
        model: nn.Module,
        max_norm: float = math.inf,
        *,
        norm_type: float = 2.0,
        ownership: Ownership | None = None,
        norm_groups: NormGroups = None,
        scales: bool = True,
        has_data_left: bool | None = None,
    ) -> WindowReport:
        """Make ``.grad`` the exact mean gradient of the window, clipped to ``max_norm``, and start afresh.

        Args:
            model: All that is trained; its gradients are synchronised.
            max_norm: Greater than 0; inf does not clip.
            norm_type: p of the norm; inf is the largest element.
            ownership: As in :func:`hf_gradutils.dist_utils.clip_gradients`.
            norm_groups: Groups whose norms the report has, beside the total.
            scales: False leaves ``.grad`` as it is: the caller multiplies it by the report's ``multiplier``.
            has_data_left: True if this rank has batches for another window; passed on all ranks or on none.

        Collectives: one all-reduce over all ranks (an all-gather for p = inf); every rank must call. The first call for
            a model also builds its plan. Host syncs: none; one if gradients are offloaded to the CPU.
        """
        planned = gradients_of(model, ownership=ownership, norm_groups=norm_groups)
        self.has_new_parameters, self._planned = planned is not self._planned, planned
        gradients = planned.read(self._device)
        norms, sums = total_norm(gradients, norm_type, self._to_add_up(has_data_left))
        totals = Totals(*sums.unbind())
        losses, in_backward, has_shares = self._losses, self._scale, self._has_shares
        self.discard()

        num_ranks = gradients.plan.domain.num_ranks if in_backward is None else self._num_averaged
        if self._is_sum:
            divisor = torch.full_like(norms.total, self._num_replicas / (self._loss_scale * num_ranks))
        else:
            divisor = (totals.num_targets / num_ranks).clamp(min=FEWEST)
        if in_backward is not None:
            # 1, unless labels were changed or left out after they had been counted.
            divisor = torch.ones_like(divisor) if has_shares else divisor * in_backward
        grad_norm = norms.total / divisor
        multiplier = (divisor * clip_divisor(grad_norm, max_norm)).reciprocal()
        if scales:
            scale_(gradients.shards, multiplier, kind=gradients.kind)
        return WindowReport(
            grad_norm=grad_norm,
            multiplier=multiplier,
            micro_batch_losses=losses,
            domain=gradients.plan.domain,
            _norms=norms,
            _totals=totals,
            _divisor=divisor,
            _loss_scale=self._loss_scale,
            _num_replicas=self._num_replicas,
            _is_sum=self._is_sum,
        )

    @torch.no_grad()
    def close_by_engine(self, take_step: Callable[[], float], *, has_data_left: bool | None = None) -> WindowReport:
        """End a window whose gradients an engine keeps and steps on itself, which are its mean already.

        Args:
            take_step: Lets the engine step; returns the norm before clipping, inf for a step that it left out.
            has_data_left: As in :meth:`close`.

        Collectives: one all-reduce over all ranks; every rank must call. Host syncs: one.

        Raises:
            InvalidArgumentError: there were other targets in the micro-batches than expected; no step was taken.
            TargetCountError: targets could not be counted; likewise.
        """
        domain = world_domain()
        totals = Totals(*all_reduce_(domain, self._to_add_up(has_data_left)).unbind())
        losses, in_backward, has_shares = self._losses, self._scale, self._has_shares
        self.discard()
        if in_backward is not None and not (self._is_sum or has_shares):
            expected = self._loss_scale * self._num_averaged / in_backward
            num_expected, num_targets = torch.stack((expected, totals.num_targets * self._loss_scale)).tolist()
            check_count(num_targets)
            if not math.isclose(num_expected, num_targets, rel_tol=1e-9, abs_tol=1e-6):
                raise InvalidArgumentError(
                    f"the micro-batches of this step had {num_targets:g} targets, but {num_expected:g} were counted "
                    "before the first, by which the gradient was divided: let the collator change labels and not the "
                    "step, and give start_window the targets of all the window's micro-batches, without padding"
                )
        norm = torch.full_like(totals.loss, take_step())
        return WindowReport(
            grad_norm=norm,
            multiplier=torch.ones_like(norm),
            micro_batch_losses=losses,
            domain=domain,
            _norms=None,
            _totals=totals,
            _divisor=torch.ones_like(norm),
            _loss_scale=self._loss_scale,
            _num_replicas=self._num_replicas,
            _is_sum=self._is_sum,
        )

    def _to_add_up(self, has_data_left: bool | None) -> Tensor:
        """:class:`Totals` of this rank, in one tensor."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device) if self._sums is None else self._sums
        if has_data_left is None:
            return sums
        return torch.cat((sums, torch.full_like(sums[:1], float(has_data_left))))


def loss_scale_for(targets_per_window: float) -> float:
    """A K for :class:`AccumulationWindow`: the power of two next to a rank's targets in a window; same on all ranks."""
    return float(2 ** round(math.log2(max(targets_per_window, 1.0))))
