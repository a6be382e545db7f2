# ruff: noqa: ANN001, ANN201 -- what Triton passes to a kernel has no Python type
"""Device functions of one visit to a row of logits: its statistics, and the residual of one of its blocks.

    row_max = max_v z_v,   row_sum = sum_v exp(z_v - row_max)
    centred_sum = sum_v exp(z_v - row_max) (z_v - row_max),   square_sum = sum_v exp(z_v - row_max)^2
    max_before = max of z_v over the columns v before the label's
    residual_v = (p_v (gain - entropy_gain log p_v) - offset) slope_v,   at the label entry slope_v
    log p_v = (z_v - shift) - log_sum

Full blocks are read without a mask; the tail, a block of its own, is masked after the head transform. Cache hints
(`EVICT`, "" for none): what is read again asks to stay in L2, what is not asks to go first.
Instructions for each bfloat16 element of a full block on sm_90, read from the assembly: 7.9 to 8.4 for the
statistics, 14.5 with the last three of them, and 7.4 to 8.3 for the residual. `tests/test_triton_aot.py` keeps them
from growing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import (
    LEAST_LOG,
    NEG_INF,
    exp,
    exp_and_moments,
    finite_shift,
    head_logit,
    head_logit_and_slope,
    label_entry,
    shifted_moments,
)


@triton.jit
def load_raw(row, bias, cols, V, HAS_BIAS: tl.constexpr, IS_TAIL: tl.constexpr, EVICT: tl.constexpr):
    """raw + bias of one block of columns in float32; 0 past the end of the row."""
    if IS_TAIL:
        raw = tl.load(row + cols, mask=cols < V, other=0.0, eviction_policy=EVICT).to(tl.float32)
    else:
        raw = tl.load(row + cols, eviction_policy=EVICT).to(tl.float32)
    if HAS_BIAS:
        if IS_TAIL:
            raw += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)
        else:
            raw += tl.load(bias + cols).to(tl.float32)
    return raw


@triton.jit
def load_label_logit(
    row,
    bias,
    column,
    is_here,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """z of one column; unspecified where `is_here` is false (nothing is read then)."""
    raw = tl.load(row + column, mask=is_here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + column, mask=is_here, other=0.0).to(tl.float32)
    return head_logit(raw, inner, outer, HAS_SCALE, HAS_SOFTCAP)


@triton.jit
def accumulate(
    lane_max,
    lane_sum,
    lane_logit_sum,
    lane_centred,
    lane_square,
    lane_before,
    z,
    z_or_zero,
    before,
    WANT_LOGIT_SUM: tl.constexpr,
    WANT_MOMENTS: tl.constexpr,
):
    """Take one block of logits into the statistics of the lanes, each of which takes `VECTOR` of its columns.

    `before`: of the block's columns, how many precede the label; may be negative or more than there are. Lanes that
    the label divides are left out of `lane_before`.
    """
    LANES: tl.constexpr = lane_max.shape[0]
    VECTOR: tl.constexpr = z.shape[0] // LANES
    vectors = tl.reshape(z, [LANES, VECTOR])
    block_max = tl.max(vectors, 1)
    new_max = tl.maximum(lane_max, block_max)
    shift = finite_shift(new_max)
    if WANT_MOMENTS:
        lane_sum, lane_centred, lane_square = shifted_moments(lane_max, lane_sum, lane_centred, lane_square, shift)
        exponential, centred, square = exp_and_moments(vectors - shift[:, None])
        lane_sum += tl.sum(exponential, 1)
        lane_centred += tl.sum(centred, 1)
        lane_square += tl.sum(square, 1)
        ends = (tl.arange(0, LANES) + 1) * VECTOR
        lane_before = tl.where(ends <= before, tl.maximum(lane_before, block_max), lane_before)
    else:
        block_sum = tl.sum(exp(vectors - shift[:, None]), 1)
        lane_sum = tl.fma(lane_sum, exp(lane_max - shift), block_sum)
    if WANT_LOGIT_SUM:
        lane_logit_sum += tl.sum(tl.reshape(z_or_zero, [LANES, VECTOR]), 1)
    return new_max, lane_sum, lane_logit_sum, lane_centred, lane_square, lane_before


@triton.jit
def row_statistics(
    row,
    bias,
    V,
    before,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_LOGIT_SUM: tl.constexpr,
    WANT_MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVICT: tl.constexpr,
):
    """(max, sum, sum of logits, centred sum, sum of squares, maximum before the label) of one row.

    `before`: how many of its columns precede the label, 0 to V.
    Every 16 bytes of a block have a maximum and sums of their own until the end of the row. No block then costs a
    reduction over the program, and no warp waits for another one's loads.
    """
    VECTOR: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // VECTOR
    lane_max = tl.full([LANES], NEG_INF, tl.float32)
    lane_sum = tl.zeros([LANES], tl.float32)
    lane_logit_sum = tl.zeros([LANES], tl.float32)
    lane_centred = tl.zeros([LANES], tl.float32)
    lane_square = tl.zeros([LANES], tl.float32)
    lane_before = tl.full([LANES], NEG_INF, tl.float32)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        raw = load_raw(row, bias, cols, V, HAS_BIAS, False, EVICT)
        z = head_logit(raw, inner, outer, HAS_SCALE, HAS_SOFTCAP)
        lane_max, lane_sum, lane_logit_sum, lane_centred, lane_square, lane_before = accumulate(
            lane_max, lane_sum, lane_logit_sum, lane_centred, lane_square, lane_before, z, z, before - start,
            WANT_LOGIT_SUM, WANT_MOMENTS,
        )  # fmt: skip
    if full < V:
        cols = full + tl.arange(0, BLOCK)
        raw = load_raw(row, bias, cols, V, HAS_BIAS, True, EVICT)
        z = head_logit(raw, inner, outer, HAS_SCALE, HAS_SOFTCAP)
        # After the transform: -inf times a scale of 0 is NaN, times one below 0 it is +inf.
        z_or_none = tl.where(cols < V, z, NEG_INF)
        z_or_zero = tl.where(cols < V, z, 0.0)
        lane_max, lane_sum, lane_logit_sum, lane_centred, lane_square, lane_before = accumulate(
            lane_max, lane_sum, lane_logit_sum, lane_centred, lane_square, lane_before, z_or_none, z_or_zero,
            before - full, WANT_LOGIT_SUM, WANT_MOMENTS,
        )  # fmt: skip
    row_max = tl.max(lane_max, 0)
    shift = finite_shift(row_max)
    max_before = row_max
    if WANT_MOMENTS:
        lane_sum, lane_centred, lane_square = shifted_moments(lane_max, lane_sum, lane_centred, lane_square, shift)
        # The lane that the label divides, read once more: a comparison per element would cost every lane.
        cols = before // VECTOR * VECTOR + tl.arange(0, VECTOR)
        raw = load_raw(row, bias, cols, before, HAS_BIAS, True, "")
        z = tl.where(cols < before, head_logit(raw, inner, outer, HAS_SCALE, HAS_SOFTCAP), NEG_INF)
        max_before = tl.maximum(tl.max(lane_before, 0), tl.max(z, 0))
    else:
        lane_sum *= exp(lane_max - shift)
    row_sum = tl.sum(lane_sum, 0)
    logit_sum = tl.sum(lane_logit_sum, 0)
    return row_max, row_sum, logit_sum, tl.sum(lane_centred, 0), tl.sum(lane_square, 0), max_before


@triton.jit
def row_terms(
    row_max,
    row_sum,
    logp,
    factor,
    entropy,
    entropy_gain,
    label_smoothing,
    z_loss,
    inv_vocab,
    HAS_EXTRAS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """(shift, log_sum, gain, entropy_gain, offset, entry) of a residual, see the top of this file.

    `factor` multiplies the gradient of the token's loss, `entropy_gain` that of the row's entropy. Never z - lse:
    lse was rounded, by as much as the logp of a likely token.
    """
    shift = finite_shift(row_max)
    log_sum = tl.log(row_sum)
    lse = shift + log_sum
    gain = factor
    offset = 0.0
    if HAS_EXTRAS:
        gain = factor * (1.0 + 2.0 * z_loss * lse)
        offset = factor * (label_smoothing * inv_vocab)
    entry = factor * label_entry(logp, lse, label_smoothing, z_loss, inv_vocab, HAS_EXTRAS)
    if HAS_ENTROPY:
        gain -= entropy_gain * entropy
        entry -= entropy_gain * (exp(logp) * (tl.maximum(logp, LEAST_LOG) + entropy))
    return shift, log_sum, gain, entropy_gain, offset, entry


@triton.jit
def write_residual(
    row,
    out_row,
    bias,
    start,
    V,
    column,
    terms,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
    EVICT: tl.constexpr,
):
    """The residual of the columns [start, start + BLOCK) of a row; `column` is the label's."""
    shift, log_sum, gain, entropy_gain, offset, entry = terms
    cols = start + tl.arange(0, BLOCK)
    raw = load_raw(row, bias, cols, V, HAS_BIAS, IS_TAIL, EVICT)
    z, slope = head_logit_and_slope(raw, inner, outer, HAS_SCALE, HAS_SOFTCAP)
    log_p = (z - shift) - log_sum
    residual = exp(log_p)
    if HAS_ENTROPY:
        gains = tl.fma(tl.maximum(log_p, LEAST_LOG), -entropy_gain, gain)
        residual = tl.fma(residual, gains, -offset)
    elif HAS_GAIN:
        residual = tl.fma(residual, gain, -offset)
    # Most blocks of a row do not have its label: they skip a comparison per element.
    if (column >= start) & (column < start + BLOCK):
        residual = tl.where(cols == column, entry, residual)
    if HAS_SOFTCAP:
        residual *= slope
    residual = residual.to(out_row.dtype.element_ty)
    if IS_TAIL:
        tl.store(out_row + cols, residual, mask=cols < V, eviction_policy=EVICT)
    else:
        tl.store(out_row + cols, residual, eviction_policy=EVICT)
