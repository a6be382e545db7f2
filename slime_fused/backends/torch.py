"""The backend contract in plain PyTorch: runs wherever PyTorch does, and is what a new kernel is read against.

Row blocks are upcast to the accumulation dtype, so it takes more memory and time than the native kernels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from slime_fused.backends.base import HeadTransform, SlimeWeights, TokenLoss, acc_dtype

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

SOFTPLUS_THRESHOLD = 40.0
"""Above it softplus(x) is x: exp(-40) is 4e-18. PyTorch's default of 20 leaves out 2e-9, which float64 shows."""


def transform_logits(raw: Tensor, bias: Tensor | None, head: HeadTransform) -> Tensor:
    """(M, V) raw products -> the logits of the softmax, in acc dtype."""
    z = raw.to(acc_dtype(raw.dtype))
    if bias is not None:
        z = z + bias.to(z.dtype)
    if head.scale != 1.0:
        z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z


def _transform_derivative(z: Tensor, head: HeadTransform) -> Tensor | float:
    if head.softcap is None:
        return head.scale
    return head.scale * (1 - (z / head.softcap) ** 2)


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

    def softmax_residual(
        self,
        logits: Tensor,
        out: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadTransform,
        token_loss: TokenLoss,
        *,
        row_max: Tensor,
        row_sum: Tensor,
        logp: Tensor,
        loss: Tensor | None,
    ) -> None:
        """See `Backend.softmax_residual`."""
        if logits.shape[0] == 0:
            return
        z = transform_logits(logits, bias, head)
        _check_labels(labels, logits.shape[1])
        ignored = labels < 0
        at_label = labels.clamp(min=0)[:, None]
        row_max.copy_(z.amax(1).masked_fill_(ignored, 0))
        row_sum.copy_(torch.exp(z - _finite(row_max)[:, None]).sum(1).masked_fill_(ignored, 1))
        lse = row_max + row_sum.log()
        logp.copy_(torch.log_softmax(z, dim=1).gather(1, at_label).squeeze(1).masked_fill_(ignored, 0))
        if loss is not None:
            eps, vocab = token_loss.label_smoothing, logits.shape[1]
            value = -(1 - eps) * logp + token_loss.z_loss * lse**2
            if eps:
                value = value + eps * (lse - z.sum(1) / vocab)
            loss.copy_(value.masked_fill_(ignored, 0))
        softmax = torch.softmax(z, dim=1)
        self._write_residual(softmax, z, out, labels, head, token_loss, 0, logits.shape[1], lse, logp, None)

    def logits_stats(
        self,
        logits: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadTransform,
        *,
        col_offset: int,
        row_max: Tensor,
        row_sum: Tensor,
        label_logit: Tensor,
        logit_sum: Tensor | None,
        merge: bool,
    ) -> None:
        """See `Backend.logits_stats`."""
        if logits.shape[0] == 0:
            return
        z = transform_logits(logits, bias, head)
        local = labels - col_offset
        is_here = (labels >= 0) & (local >= 0) & (local < z.shape[1])
        z_label = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
        block_max = z.amax(1)
        new_max = torch.maximum(row_max, block_max) if merge else block_max
        reference = _finite(new_max)
        block_sum = torch.exp(z - reference[:, None]).sum(1)
        if merge:
            row_sum.mul_(torch.exp(row_max - reference)).add_(block_sum)
            label_logit.copy_(torch.where(is_here, z_label, label_logit))
        else:
            row_sum.copy_(block_sum)
            label_logit.copy_(torch.where(is_here, z_label, 0))
        row_max.copy_(new_max)
        if logit_sum is not None:
            logit_sum.copy_(z.sum(1) + (logit_sum if merge else 0))

    def residual_from_stats(
        self,
        logits: Tensor,
        out: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadTransform,
        token_loss: TokenLoss,
        *,
        col_offset: int,
        vocab_size: int,
        row_max: Tensor,
        row_sum: Tensor,
        logp: Tensor,
        row_scale: Tensor | None,
    ) -> None:
        """See `Backend.residual_from_stats`."""
        if logits.shape[0] == 0:
            return
        _check_labels(labels, vocab_size)
        z = transform_logits(logits, bias, head)
        softmax = torch.exp(z - _finite(row_max)[:, None]) / row_sum[:, None]
        lse = row_max + row_sum.log()
        self._write_residual(
            softmax, z, out, labels, head, token_loss, col_offset, vocab_size, lse, logp, row_scale
        )

    def _write_residual(
        self,
        residual: Tensor,
        z: Tensor,
        out: Tensor,
        labels: Tensor,
        head: HeadTransform,
        token_loss: TokenLoss,
        col_offset: int,
        vocab_size: int,
        lse: Tensor,
        logp: Tensor,
        row_scale: Tensor | None,
    ) -> None:
        eps, z_loss = token_loss.label_smoothing, token_loss.z_loss
        ignored = labels < 0
        if z_loss:
            residual *= (1 + 2 * z_loss * lse)[:, None]
        if eps:
            residual -= eps / vocab_size
        local = labels - col_offset
        is_here = ~ignored & (local >= 0) & (local < z.shape[1])
        # softmax - 1 would cancel where the label is likely; expm1 does not.
        at_label = torch.expm1(logp) + eps - eps / vocab_size
        if z_loss:
            at_label = at_label + 2 * z_loss * lse * torch.exp(logp)
        rows = is_here.nonzero().squeeze(1)
        residual[rows, local[rows]] = at_label[rows]
        residual *= _transform_derivative(z, head)
        if row_scale is not None:
            residual *= row_scale[:, None]
        out.copy_(residual.masked_fill_(ignored[:, None], 0))

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
        self,
        logp: Tensor,
        cu_seqlens: Tensor,
        weights: SlimeWeights,
        *,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        anchor: Tensor,
        margin_loss: Tensor,
        stabilizer: Tensor,
        d_logp: Tensor | None,
    ) -> None:
        """See `Backend.slime_terms`; formulas: arXiv 2602.02383, eq. 5 to 10 and their derivatives."""
        w = weights
        num_pairs = (cu_seqlens.shape[0] - 1) // 2
        means = logp.new_empty(2 * num_pairs)
        self.segment_sum(logp, cu_seqlens, means, mean=True)
        chosen_logps.copy_(means[:num_pairs])
        rejected_logps.copy_(means[num_pairs:])
        margin = chosen_logps - rejected_logps
        hinge = (w.margin_hard - margin).clamp(min=0)
        gate = torch.sigmoid(-w.kappa * (margin - w.margin_soft))
        anchor.copy_(-w.lambda_w * w.pair_weight * chosen_logps)
        margin_loss.copy_(w.lambda_d * w.pair_weight * hinge * gate)

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
        self.segment_sum(per_token, cu_seqlens[num_pairs:] - first_rejected, stabilizer, mean=False)
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
