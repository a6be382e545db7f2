"""The backend contract in plain PyTorch: runs wherever PyTorch does, and is what a new kernel is read against.

Row blocks are upcast to the accumulation dtype, so it takes more memory and time than the native kernels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from slime_fused.backends.base import (
    NO_FACTORS,
    HeadTransform,
    LogitsBlock,
    RowFactors,
    RowStats,
    SlimePairs,
    SlimeWeights,
    TokenLoss,
    VocabStats,
    acc_dtype,
    losses_of,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

SOFTPLUS_THRESHOLD = 40.0
"""Above it softplus(x) is x: exp(-40) is 4e-18. PyTorch's default of 20 leaves out 2e-9, which float64 shows."""


_LOWEST = -1e30
"""For a logit's distance from the largest: exponentials vanish long before, and 0 * -inf would be NaN."""


def transform_logits(raw: Tensor, bias: Tensor | None, head: HeadTransform) -> Tensor:
    """(M, V) raw products -> the logits of the softmax, in acc dtype."""
    z = raw.to(acc_dtype(raw.dtype))
    if bias is not None:
        z = z + bias.to(z.dtype)
    if head.softcap is None:
        factor = head.scale / head.temperature
        return z if factor == 1.0 else z * factor
    z = torch.tanh(z * head.scale / head.softcap)
    return head.softcap / head.temperature * z


def _transform_derivative(z: Tensor, head: HeadTransform) -> Tensor | float:
    slope = head.scale / head.temperature
    if head.softcap is None:
        return slope
    return slope * (1 - (z * head.temperature / head.softcap) ** 2)


class TorchBackend:
    """Plain PyTorch on any device."""

    name = "torch"

    def available(self) -> tuple[bool, str]:
        """Always."""
        return True, "plain PyTorch, any device"

    def supports(self, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        """Four dtypes on every device; no product of 8-bit floats takes plain tensors."""
        if dtype not in _DTYPES:
            return False, f"the torch backend takes float32, bfloat16, float16 and float64, got {dtype}"
        return True, ""

    def softmax_residual(self, block: LogitsBlock, out: Tensor, token_loss: TokenLoss, stats: RowStats) -> None:
        """See `Backend.softmax_residual`."""
        logits, labels, loss = block.logits, block.labels, losses_of(stats)
        row_max, row_sum, logp = stats.row_max, stats.row_sum, stats.logp
        if logits.shape[0] == 0:
            return
        z = transform_logits(logits, block.bias, block.transform)
        _check_labels(labels, logits.shape[1])
        ignored = labels < 0
        at_label = labels.clamp(min=0)[:, None]
        row_max.copy_(z.amax(1).masked_fill_(ignored, 0))
        row_sum.copy_(torch.exp(z - _finite(row_max)[:, None]).sum(1).masked_fill_(ignored, 1))
        logp.copy_(torch.log_softmax(z, dim=1).gather(1, at_label).squeeze(1).masked_fill_(ignored, 0))
        if loss is not None:
            lse = row_max + row_sum.log()
            eps, vocab = token_loss.label_smoothing, logits.shape[1]
            value = -(1 - eps) * logp
            if token_loss.z_loss:
                value = value + token_loss.z_loss * lse**2
            if eps:
                value = value + eps * (lse - z.sum(1) / vocab)
            loss.copy_(value.masked_fill_(ignored, 0))
        _write_residual(torch.softmax(z, dim=1), z, block, out, token_loss, stats, NO_FACTORS)

    def logits_stats(self, block: LogitsBlock, stats: VocabStats, *, merge: bool = False) -> None:
        """See `Backend.logits_stats`."""
        if block.logits.shape[0] == 0:
            return
        z = transform_logits(block.logits, block.bias, block.transform)
        local = block.labels - block.col_offset
        is_here = (block.labels >= 0) & (local >= 0) & (local < z.shape[1])
        z_label = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
        block_max = z.amax(1)
        new_max = torch.maximum(stats.row_max, block_max) if merge else block_max
        reference = _finite(new_max)
        centred = (z - reference[:, None]).clamp_(min=_LOWEST)
        exponential = centred.exp()
        if not merge:
            stats.row_sum.zero_()
            stats.label_logit.zero_()
        # What earlier columns had relative to their maximum; their sum is 0 where that is -inf.
        shift = (stats.row_max - reference).clamp_(min=_LOWEST) if merge else torch.zeros_like(reference)
        share = shift.exp()
        if stats.moments is not None:
            before = torch.arange(z.shape[1], device=z.device) < local[:, None]
            max_before = torch.where(before, z, -torch.inf).amax(1)
            centred_sum, square_sum = (centred * exponential).sum(1), exponential.square().sum(1)
            if merge:
                centred_sum += share * (stats.moments.centred_sum + stats.row_sum * shift)
                square_sum += share**2 * stats.moments.square_sum
                max_before = torch.maximum(max_before, stats.moments.max_before)
            stats.moments.centred_sum.copy_(centred_sum)
            stats.moments.square_sum.copy_(square_sum)
            stats.moments.max_before.copy_(max_before)
        stats.row_sum.mul_(share).add_(exponential.sum(1))
        stats.label_logit.copy_(torch.where(is_here, z_label, stats.label_logit))
        stats.row_max.copy_(new_max)
        if stats.logit_sum is not None:
            stats.logit_sum.copy_(z.sum(1) + (stats.logit_sum if merge else 0))

    def residual_from_stats(
        self,
        block: LogitsBlock,
        out: Tensor,
        token_loss: TokenLoss,
        stats: RowStats,
        factors: RowFactors = NO_FACTORS,
    ) -> None:
        """See `Backend.residual_from_stats`."""
        if block.logits.shape[0] == 0:
            return
        _check_labels(block.labels, block.whole_vocab_size)
        z = transform_logits(block.logits, block.bias, block.transform)
        softmax = torch.exp(z - _finite(stats.row_max)[:, None]) / stats.row_sum[:, None]
        _write_residual(softmax, z, block, out, token_loss, stats, factors)

    def segment_sum(self, values: Tensor, cu_seqlens: Tensor, out: Tensor, *, mean: bool) -> None:
        """See `Backend.segment_sum`."""
        bounds = cu_seqlens.tolist()
        for s, (begin, end) in enumerate(pairwise(bounds)):
            total = values[begin:end].sum(dtype=torch.float64)
            out[s] = total / max(end - begin, 1) if mean else total

    def segment_sum_backward(self, d_out: Tensor, cu_seqlens: Tensor, d_values: Tensor, *, mean: bool) -> None:
        """See `Backend.segment_sum_backward`."""
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        per_token = d_out / lengths.clamp(min=1) if mean else d_out
        d_values.copy_(torch.repeat_interleave(per_token, lengths))

    def slime_terms(
        self, logp: Tensor, cu_seqlens: Tensor, weights: SlimeWeights, out: SlimePairs, d_logp: Tensor | None
    ) -> None:
        """See `Backend.slime_terms`; formulas: arXiv 2602.02383, eq. 5 to 10 and their derivatives."""
        w = weights
        num_pairs = (cu_seqlens.shape[0] - 1) // 2
        means = logp.new_empty(2 * num_pairs)
        self.segment_sum(logp, cu_seqlens, means, mean=True)
        out.chosen_logps.copy_(means[:num_pairs])
        out.rejected_logps.copy_(means[num_pairs:])
        margin = out.chosen_logps - out.rejected_logps
        hinge = (w.margin_hard - margin).clamp(min=0)
        gate = torch.sigmoid(-w.kappa * (margin - w.margin_soft))
        out.anchor.copy_(-w.lambda_w * w.pair_weight * out.chosen_logps)
        out.margin_loss.copy_(w.lambda_d * w.pair_weight * hinge * gate)

        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        first_rejected = int(cu_seqlens[num_pairs])
        excess = -logp[first_rejected:] - w.delta
        penalty = F.softplus(excess, threshold=SOFTPLUS_THRESHOLD)
        token_weight = (
            torch.full_like(penalty, w.token_weight)
            if w.token_weight
            else torch.repeat_interleave(w.pair_weight / lengths[num_pairs:].to(logp.dtype), lengths[num_pairs:])
        )
        per_token = w.lambda_l * token_weight * penalty**w.power
        self.segment_sum(per_token, cu_seqlens[num_pairs:] - first_rejected, out.stabilizer, mean=False)
        if d_logp is None:
            return
        slope = -w.lambda_d * w.pair_weight * (gate + w.kappa * hinge * gate * (1 - gate))
        d_margin = slope * (margin < w.margin_hard)
        d_means = torch.cat([d_margin - w.lambda_w * w.pair_weight, -d_margin])
        self.segment_sum_backward(d_means, cu_seqlens, d_logp, mean=True)
        d_logp[first_rejected:] -= (
            w.lambda_l * w.power * token_weight * penalty ** (w.power - 1) * torch.sigmoid(excess)
        )

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """See `Backend.scale_`."""
        tensor.mul_(factor)


def _finite(row_max: Tensor) -> Tensor:
    """What to subtract before exponentials: exp(-inf - -inf) would be NaN, and a row of -inf has sum 0."""
    return torch.where(row_max == -torch.inf, 0, row_max)


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    if labels.device.type == "cpu" and bool((labels >= vocab_size).any()):
        row = int((labels >= vocab_size).nonzero()[0])
        raise ValueError(f"labels: expected a value below {vocab_size}, got {int(labels[row])} in row {row}")


def _write_residual(
    residual: Tensor,
    z: Tensor,
    block: LogitsBlock,
    out: Tensor,
    token_loss: TokenLoss,
    stats: RowStats,
    factors: RowFactors,
) -> None:
    """Write the residual to ``out``; ``residual`` holds the probabilities of ``z``, and is used up."""
    eps, z_loss, vocab_size = token_loss.label_smoothing, token_loss.z_loss, block.whole_vocab_size
    lse = stats.row_max + stats.row_sum.log()
    entropy_part = None
    if factors.entropy is not None and factors.entropy_scale is not None:
        log_p = z - stats.row_max[:, None] - stats.row_sum.log()[:, None]
        slope = -residual * (log_p + factors.entropy[:, None])
        entropy_part = factors.entropy_scale[:, None] * slope.masked_fill_(residual == 0, 0)
    ignored = block.labels < 0
    if z_loss:
        residual *= (1 + 2 * z_loss * lse)[:, None]
    if eps:
        residual -= eps / vocab_size
    local = block.labels - block.col_offset
    is_here = ~ignored & (local >= 0) & (local < z.shape[1])
    # softmax - 1 would cancel where the label is likely; expm1 does not.
    at_label = torch.expm1(stats.logp) + eps - eps / vocab_size
    if z_loss:
        at_label = at_label + 2 * z_loss * lse * torch.exp(stats.logp)
    rows = is_here.nonzero().squeeze(1)
    residual[rows, local[rows]] = at_label[rows]
    if factors.scale is not None:
        residual *= factors.scale[:, None]
    if entropy_part is not None:
        residual += entropy_part
    residual *= _transform_derivative(z, block.transform)
    out.copy_(residual.masked_fill_(ignored[:, None], 0))
