# ruff: noqa: ANN001, ANN201 -- what Triton passes to a kernel has no Python type
"""Device functions of one visit to a row of logits: its statistics, and the residual of one of its blocks.

    row_max = max_v z_v,   row_sum = sum_v exp(z_v - row_max)
    residual_v = (exp((z_v - shift) - log_sum) gain - offset) slope_v,   at the label entry slope_v

Full blocks are read without a mask; the tail, a block of its own, is masked after the head transform. Cache hints
(`EVICT`, "" for none): what is read again asks to stay in L2, what is not asks to go first.
Instructions for each bfloat16 element of a full block on sm_90, read from the assembly: 7.9 to 8.4 for the
statistics and 7.4 to 8.3 for the residual. `tests/test_triton_aot.py` keeps them from growing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import NEG_INF, exp, finite_shift, head_logit, head_logit_and_slope, label_entry


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
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """z of one column; unspecified where `is_here` is false (nothing is read then)."""
    raw = tl.load(row + column, mask=is_here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + column, mask=is_here, other=0.0).to(tl.float32)
    return head_logit(raw, scale, softcap, HAS_SCALE, HAS_SOFTCAP)


@triton.jit
def accumulate(lane_max, lane_sum, lane_logit_sum, z, z_or_zero, WANT_LOGIT_SUM: tl.constexpr):
    """Take one block of logits into the statistics of the lanes, each of which takes `VECTOR` of its columns."""
    LANES: tl.constexpr = lane_max.shape[0]
    VECTOR: tl.constexpr = z.shape[0] // LANES
    vectors = tl.reshape(z, [LANES, VECTOR])
    new_max = tl.maximum(lane_max, tl.max(vectors, 1))
    shift = finite_shift(new_max)
    block_sum = tl.sum(exp(vectors - shift[:, None]), 1)
    lane_sum = tl.fma(lane_sum, exp(lane_max - shift), block_sum)
    if WANT_LOGIT_SUM:
        lane_logit_sum += tl.sum(tl.reshape(z_or_zero, [LANES, VECTOR]), 1)
    return new_max, lane_sum, lane_logit_sum


@triton.jit
def row_statistics(
    row,
    bias,
    V,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_LOGIT_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
    EVICT: tl.constexpr,
):
    """(max z, sum exp(z - max), sum z) of one row.

    Every 16 bytes of a block have a maximum and sums of their own until the end of the row. No block then costs a
    reduction over the program, and no warp waits for another one's loads.
    """
    LANES: tl.constexpr = BLOCK * row.dtype.element_ty.primitive_bitwidth // 128
    lane_max = tl.full([LANES], NEG_INF, tl.float32)
    lane_sum = tl.zeros([LANES], tl.float32)
    lane_logit_sum = tl.zeros([LANES], tl.float32)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        raw = load_raw(row, bias, cols, V, HAS_BIAS, False, EVICT)
        z = head_logit(raw, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        lane_max, lane_sum, lane_logit_sum = accumulate(lane_max, lane_sum, lane_logit_sum, z, z, WANT_LOGIT_SUM)
    if full < V:
        cols = full + tl.arange(0, BLOCK)
        raw = load_raw(row, bias, cols, V, HAS_BIAS, True, EVICT)
        z = head_logit(raw, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        # After the transform: -inf times a scale of 0 is NaN, times one below 0 it is +inf.
        z_or_none = tl.where(cols < V, z, NEG_INF)
        z_or_zero = tl.where(cols < V, z, 0.0)
        lane_max, lane_sum, lane_logit_sum = accumulate(
            lane_max, lane_sum, lane_logit_sum, z_or_none, z_or_zero, WANT_LOGIT_SUM
        )
    row_max = tl.max(lane_max, 0)
    row_sum = tl.sum(lane_sum * exp(lane_max - finite_shift(row_max)), 0)
    return row_max, row_sum, tl.sum(lane_logit_sum, 0)


@triton.jit
def row_terms(row_max, row_sum, logp, factor, label_smoothing, z_loss, inv_vocab, HAS_EXTRAS: tl.constexpr):
    """(shift, log_sum, gain, offset, entry): residual_v = (exp((z_v - shift) - log_sum) gain - offset) slope_v.

    At the label it is entry slope_v. `factor` multiplies all of them. Never z - lse: lse was rounded, by as much as
    the logp of a likely token.
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
    return shift, log_sum, gain, offset, entry


@triton.jit
def write_residual(
    row,
    out_row,
    bias,
    start,
    V,
    column,
    terms,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_TAIL: tl.constexpr,
    EVICT: tl.constexpr,
):
    """The residual of the columns [start, start + BLOCK) of a row; `column` is the label's."""
    shift, log_sum, gain, offset, entry = terms
    cols = start + tl.arange(0, BLOCK)
    raw = load_raw(row, bias, cols, V, HAS_BIAS, IS_TAIL, EVICT)
    z, slope = head_logit_and_slope(raw, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    residual = exp((z - shift) - log_sum)
    if HAS_GAIN:
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
