# ruff: noqa: ANN001, ANN201 -- what Triton passes to a kernel has no Python type
"""Segment kernels: sums of token values per response, the SLIME terms, and a scalar multiply.

With m = mean logp of a response, D = m_w - m_l, h = max(0, m_h - D), s = sigmoid(-kappa (D - m_s)),
u_t = -logp_t - delta, sp = softplus, w = 1 / pairs (arXiv 2602.02383, eq. 5 to 10):

    anchor = -lambda_w w m_w      margin = lambda_d w h s      stabilizer = lambda_l n sum_t sp(u_t)^p
    dD = -lambda_d w [D < m_h] (s + kappa h s (1 - s))
    d logp_t = (-lambda_w w + dD) / |y_w|                                      chosen tokens
    d logp_t = -dD / |y_l| - lambda_l n p sp(u_t)^(p-1) sigmoid(u_t)           rejected tokens
    n = w / |y_l| ("sequence"), or 1 / rejected tokens of the batch ("token")

| tensor | shape | dtype | |
|---|---|---|---|
| values, logp | [N] | f32 | read |
| cu_seqlens | [S + 1] | i32 | read; segment s is [cu_seqlens[s], cu_seqlens[s + 1]) |
| out, d_out | [S] | f32 | |
| chosen_logps, rejected_logps, anchor, margin_loss, stabilizer | [P] | f32 | written |
| d_values, d_logp | [N] | f32 | written |

Accumulation: float32, one sum per lane and one reduction at the end. Bytes: 4 to 12 per token. An empty segment has
mean 0 and writes nothing per token. Deterministic: one program owns a segment or a pair.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .configs import LAUNCH, SCALE_CONFIG, SCALE_MAX_PROGRAMS, SEGMENT_CONFIG
from .numerics import nonnegative_power, sigmoid, softplus


@triton.jit
def sum_of_range(values, begin, end, BLOCK: tl.constexpr):
    """Sum of values[begin:end] in float32."""
    lane_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        lane_sums += tl.load(values + tokens, mask=tokens < end, other=0.0).to(tl.float32)
    return tl.sum(lane_sums, 0)


@triton.jit
def segment_sum_kernel(
    values,  # [N]
    cu_seqlens,  # [S + 1]
    out,  # [S]
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per segment."""
    s = tl.program_id(0)
    begin = tl.load(cu_seqlens + s)
    end = tl.load(cu_seqlens + s + 1)
    total = sum_of_range(values, begin, end, BLOCK)
    if MEAN:
        total = total / tl.maximum(end - begin, 1).to(tl.float32)
    tl.store(out + s, total)


@triton.jit
def segment_sum_backward_kernel(
    d_out,  # [S]
    cu_seqlens,  # [S + 1]
    d_values,  # [N]
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per segment."""
    s = tl.program_id(0)
    begin = tl.load(cu_seqlens + s)
    end = tl.load(cu_seqlens + s + 1)
    gradient = tl.load(d_out + s)
    if MEAN:
        gradient = gradient / tl.maximum(end - begin, 1).to(tl.float32)
    for start in range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        tl.store(d_values + tokens, tl.zeros([BLOCK], tl.float32) + gradient, mask=tokens < end)


@triton.jit
def slime_terms_kernel(
    logp,  # [N]
    cu_seqlens,  # [2P + 1]
    chosen_logps,  # [P]
    rejected_logps,  # [P]
    anchor_out,  # [P]
    margin_out,  # [P]
    stabilizer_out,  # [P]
    d_logp,  # [N]
    pairs,
    lambda_w,
    lambda_l,
    lambda_d,
    delta,
    margin_hard,
    margin_soft,
    kappa,
    power,
    pair_weight,
    token_weight,
    HAS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per pair: both means first, then the rejected tokens once more for the stabilizer."""
    pair = tl.program_id(0)
    chosen_begin = tl.load(cu_seqlens + pair)
    chosen_end = tl.load(cu_seqlens + pair + 1)
    rejected_begin = tl.load(cu_seqlens + pairs + pair)
    rejected_end = tl.load(cu_seqlens + pairs + pair + 1)
    chosen_length = tl.maximum(chosen_end - chosen_begin, 1).to(tl.float32)
    rejected_length = tl.maximum(rejected_end - rejected_begin, 1).to(tl.float32)

    chosen_mean = sum_of_range(logp, chosen_begin, chosen_end, BLOCK) / chosen_length
    rejected_mean = sum_of_range(logp, rejected_begin, rejected_end, BLOCK) / rejected_length
    margin = chosen_mean - rejected_mean
    shortfall = tl.maximum(margin_hard - margin, 0.0)
    gate = sigmoid(-kappa * (margin - margin_soft))
    # 1 - gate would cancel where the gate is nearly open.
    closing = sigmoid(kappa * (margin - margin_soft))
    d_margin = -lambda_d * pair_weight * (gate + kappa * shortfall * gate * closing)
    d_margin = tl.where(margin < margin_hard, d_margin, 0.0)

    normaliser = tl.where(token_weight > 0.0, token_weight, pair_weight / rejected_length)
    lane_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(rejected_begin, rejected_end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        is_token = tokens < rejected_end
        excess = -tl.load(logp + tokens, mask=is_token, other=0.0).to(tl.float32) - delta
        penalty = softplus(excess)
        lane_sums += tl.where(is_token, nonnegative_power(penalty, power), 0.0)
        if HAS_GRADIENT:
            slope = power * nonnegative_power(penalty, power - 1.0) * sigmoid(excess)
            gradient = -d_margin / rejected_length - lambda_l * normaliser * slope
            tl.store(d_logp + tokens, gradient, mask=is_token)
    if HAS_GRADIENT:
        chosen_gradient = (d_margin - lambda_w * pair_weight) / chosen_length
        for start in range(chosen_begin, chosen_end, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            tl.store(d_logp + tokens, tl.zeros([BLOCK], tl.float32) + chosen_gradient, mask=tokens < chosen_end)

    tl.store(chosen_logps + pair, chosen_mean)
    tl.store(rejected_logps + pair, rejected_mean)
    tl.store(anchor_out + pair, -lambda_w * pair_weight * chosen_mean)
    tl.store(margin_out + pair, lambda_d * pair_weight * shortfall * gate)
    tl.store(stabilizer_out + pair, lambda_l * normaliser * tl.sum(lane_sums, 0))


@triton.jit
def scale_kernel(
    tensor,  # [numel]
    factor,  # [1]
    numel,
    BLOCK: tl.constexpr,
):
    """A grid-stride multiply that ends at once where the factor is exactly 1."""
    multiplier = tl.load(factor)
    if multiplier != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, numel, tl.num_programs(0).to(tl.int64) * BLOCK):
            index = start + tl.arange(0, BLOCK)
            value = tl.load(tensor + index, mask=index < numel).to(tl.float32)
            tl.store(tensor + index, (value * multiplier).to(tensor.dtype.element_ty), mask=index < numel)


def segment_sum(
    values: Any,  # [N]
    cu_seqlens: Any,  # [S + 1]
    out: Any,  # [S]
    *,
    mean: bool,
) -> None:
    """Launch `segment_sum_kernel`; S > 0."""
    config = SEGMENT_CONFIG
    segment_sum_kernel[(out.shape[0],)](
        values, cu_seqlens, out, MEAN=mean, BLOCK=config.block, num_warps=config.num_warps, **LAUNCH
    )


def segment_sum_backward(
    d_out: Any,  # [S]
    cu_seqlens: Any,  # [S + 1]
    d_values: Any,  # [N]
    *,
    mean: bool,
) -> None:
    """Launch `segment_sum_backward_kernel`; S > 0."""
    config = SEGMENT_CONFIG
    segment_sum_backward_kernel[(d_out.shape[0],)](
        d_out, cu_seqlens, d_values, MEAN=mean, BLOCK=config.block, num_warps=config.num_warps, **LAUNCH
    )


def slime_terms(
    logp: Any,  # [N]
    cu_seqlens: Any,  # [2P + 1]
    outputs: tuple[Any, Any, Any, Any, Any],  # chosen_logps, rejected_logps, anchor, margin, stabilizer: [P]
    d_logp: Any,  # [N] or None
    parameters: tuple[float, ...],  # in the order of slime_terms_kernel, lambda_w to token_weight
) -> None:
    """Launch `slime_terms_kernel`; P > 0."""
    config = SEGMENT_CONFIG
    pairs = outputs[0].shape[0]
    slime_terms_kernel[(pairs,)](
        logp,
        cu_seqlens,
        *outputs,
        d_logp,
        pairs,
        *parameters,
        HAS_GRADIENT=d_logp is not None,
        BLOCK=config.block,
        num_warps=config.num_warps,
        **LAUNCH,
    )


def scale_(
    tensor: Any,  # any shape, contiguous
    factor: Any,  # one number
) -> None:
    """Launch `scale_kernel`; the tensor is not empty."""
    config = SCALE_CONFIG
    numel = tensor.numel()
    programs = min(triton.cdiv(numel, config.block), SCALE_MAX_PROGRAMS)
    scale_kernel[(programs,)](tensor, factor, numel, BLOCK=config.block, num_warps=config.num_warps, **LAUNCH)
