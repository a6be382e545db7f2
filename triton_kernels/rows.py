# ruff: noqa: ANN001, ANN201 -- what Triton passes to a kernel has no Python type
"""Row kernels: softmax statistics and the residual of one row of logits at a time.

    row_max = max_v z_v,   row_sum = sum_v exp(z_v - row_max),   lse = row_max + log row_sum,   logp = z_label - lse
    residual_v = d(token loss)/d(raw logit_v)      (softmax - onehot in the plain case), from statistics also with
    entropy_scale * d(entropy)/d(raw logit_v),   d(entropy)/dz_v = -p_v (log p_v + entropy)

| tensor | shape | dtype | |
|---|---|---|---|
| logits | [M, V], rows `logits_stride` apart | f32, bf16, f16 | read; once or twice |
| out | [M, V], rows `out_stride` apart, may be logits | dtype of logits | written |
| labels | [M] | i64 | read; negative = ignored row |
| bias | [V] or None | dtype of logits | read |
| row_max, row_sum, logp, loss, label_logit, logit_sum | [M] | f32 | |
| centred_sum, square_sum, max_before | [M], all or none | f32 | of `logits_stats`: see `row_visits` |
| row_scale, entropy, entropy_scale | [M]; the last two both or none | f32 | read by `residual_from_stats` |

Accumulation: float32. Bytes moved for M x V logits of b bytes: `softmax_residual` 2 b M V from memory while a row
stays in L2 between its two visits (3 b M V otherwise; `configs.ROW_CONFIGS` has the arithmetic), `logits_stats`
b M V, `residual_from_stats` 2 b M V.

Limits: rows whose pitch is not a multiple of 16 elements are read element by element (correct, several times
slower): give the logits buffer such a pitch. Deterministic: one program owns a row, no atomics.
Model: online softmax (Milakov and Gimelshein, arXiv 1805.02867).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .configs import CHECKED_LAUNCH, LAUNCH, STREAM_CONFIG, RowConfig
from .numerics import finite_shift, head_factors, merge_softmax, shifted_moments
from .row_visits import load_label_logit, row_statistics, row_terms, write_residual


@triton.jit
def softmax_residual_kernel(
    logits,  # [M, V]
    out,  # [M, V]
    labels,  # [M]
    bias,  # [V]
    row_max_out,  # [M]
    row_sum_out,  # [M]
    logp_out,  # [M]
    loss_out,  # [M]
    logits_stride,
    out_stride,
    V,
    inner,
    outer,
    slope,
    label_smoothing,
    z_loss,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_EXTRAS: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row: statistics on the first visit, the residual on the second.

    The second visit goes backwards and lets go of what it has read: what is in the cache of a row then shrinks as
    fast as it grew, and where rows do not all fit, what was read last is what is still there.
    """
    m = tl.program_id(0).to(tl.int64)
    row = logits + m * logits_stride
    out_row = out + m * out_stride
    label = tl.load(labels + m)

    if label < 0:
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(out_row + cols, tl.zeros([BLOCK], out.dtype.element_ty), mask=cols < V)
        tl.store(row_max_out + m, 0.0)
        tl.store(row_sum_out + m, 1.0)
        tl.store(logp_out + m, 0.0)
        if HAS_LOSS:
            tl.store(loss_out + m, 0.0)
    else:
        tl.device_assert(label < V, "label is outside [0, vocabulary)")
        # Read before the first visit: its reductions are the barriers that keep this ahead of the in-place writes.
        label_logit = load_label_logit(row, bias, label, label < V, inner, outer, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP)
        row_max, row_sum, logit_sum, _, _, _ = row_statistics(
            row, bias, V, 0, inner, outer,
            HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, HAS_EXTRAS and HAS_LOSS, False, BLOCK, "evict_last",
        )  # fmt: skip
        logp = (label_logit - finite_shift(row_max)) - tl.log(row_sum)
        inv_vocab = 1.0 / V
        tl.store(row_max_out + m, row_max)
        tl.store(row_sum_out + m, row_sum)
        tl.store(logp_out + m, logp)
        if HAS_LOSS:
            loss = -logp
            if HAS_EXTRAS:
                lse = finite_shift(row_max) + tl.log(row_sum)
                loss = (1.0 - label_smoothing) * loss + z_loss * lse * lse
                # A -inf logit makes the mean -inf: it may count only where smoothing is on.
                if label_smoothing != 0.0:
                    loss += label_smoothing * (lse - logit_sum * inv_vocab)
            tl.store(loss_out + m, loss)

        terms = row_terms(
            row_max, row_sum, logp, slope, 0.0, 0.0, label_smoothing, z_loss, inv_vocab, HAS_EXTRAS, False
        )
        column = label.to(tl.int32)
        HAS_GAIN: tl.constexpr = HAS_SCALE or HAS_EXTRAS
        blocks = V // BLOCK
        if blocks * BLOCK < V:
            write_residual(
                row, out_row, bias, blocks * BLOCK, V, column, terms, inner, outer,
                HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, HAS_GAIN, False, BLOCK, True, "evict_first",
            )  # fmt: skip
        for i in range(0, blocks):
            write_residual(
                row, out_row, bias, (blocks - 1 - i) * BLOCK, V, column, terms, inner, outer,
                HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, HAS_GAIN, False, BLOCK, False, "evict_first",
            )  # fmt: skip


@triton.jit
def logits_stats_kernel(
    logits,  # [M, V]
    labels,  # [M]
    bias,  # [V]
    row_max_out,  # [M]
    row_sum_out,  # [M]
    label_logit_out,  # [M]
    logit_sum_out,  # [M]
    centred_sum_out,  # [M]
    square_sum_out,  # [M]
    max_before_out,  # [M]
    logits_stride,
    V,
    col_offset,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LOGIT_SUM: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row: statistics of the columns [col_offset, col_offset + V) of the vocabulary."""
    m = tl.program_id(0).to(tl.int64)
    row = logits + m * logits_stride
    label = tl.load(labels + m)
    column = label - col_offset
    is_here = (label >= 0) & (column >= 0) & (column < V)
    label_logit = load_label_logit(row, bias, column, is_here, inner, outer, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP)
    label_logit = tl.where(is_here, label_logit, 0.0)
    # A negative label has no columns before it, whatever the offset.
    before = tl.minimum(tl.maximum(column, 0), V).to(tl.int32)
    row_max, row_sum, logit_sum, centred, square, max_before = row_statistics(
        row, bias, V, before, inner, outer,
        HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, HAS_LOGIT_SUM, HAS_MOMENTS, BLOCK, "",
    )  # fmt: skip
    if MERGE:
        old_max, old_sum = tl.load(row_max_out + m), tl.load(row_sum_out + m)
        if HAS_MOMENTS:
            shift = finite_shift(tl.maximum(old_max, row_max))
            _, old_centred, old_square = shifted_moments(
                old_max, old_sum, tl.load(centred_sum_out + m), tl.load(square_sum_out + m), shift
            )
            _, centred, square = shifted_moments(row_max, row_sum, centred, square, shift)
            centred += old_centred
            square += old_square
            max_before = tl.maximum(tl.load(max_before_out + m), max_before)
        row_max, row_sum = merge_softmax(old_max, old_sum, row_max, row_sum)
        label_logit += tl.load(label_logit_out + m)
        if HAS_LOGIT_SUM:
            logit_sum += tl.load(logit_sum_out + m)
    tl.store(row_max_out + m, row_max)
    tl.store(row_sum_out + m, row_sum)
    tl.store(label_logit_out + m, label_logit)
    if HAS_LOGIT_SUM:
        tl.store(logit_sum_out + m, logit_sum)
    if HAS_MOMENTS:
        tl.store(centred_sum_out + m, centred)
        tl.store(square_sum_out + m, square)
        tl.store(max_before_out + m, max_before)


@triton.jit
def residual_from_stats_kernel(
    logits,  # [M, V]
    out,  # [M, V]
    labels,  # [M]
    bias,  # [V]
    row_max_in,  # [M]
    row_sum_in,  # [M]
    logp_in,  # [M]
    row_scale,  # [M]
    entropy_in,  # [M]
    entropy_scale,  # [M]
    logits_stride,
    out_stride,
    V,
    col_offset,
    vocab_size,
    inner,
    outer,
    slope,
    label_smoothing,
    z_loss,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_EXTRAS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of a row: the statistics are known, so blocks of a row need not meet."""
    blocks = tl.cdiv(V, BLOCK)
    m = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    row = logits + m * logits_stride
    out_row = out + m * out_stride
    label = tl.load(labels + m)

    if label < 0:
        cols = start + tl.arange(0, BLOCK)
        tl.store(out_row + cols, tl.zeros([BLOCK], out.dtype.element_ty), mask=cols < V)
    else:
        tl.device_assert(label < vocab_size, "label is outside [0, vocabulary)")
        factor = slope
        if HAS_ROW_SCALE:
            factor *= tl.load(row_scale + m)
        entropy = 0.0
        entropy_gain = 0.0
        if HAS_ENTROPY:
            entropy = tl.load(entropy_in + m)
            entropy_gain = slope * tl.load(entropy_scale + m)
        # As softmax_residual forms them, so that both give the same bits.
        terms = row_terms(
            tl.load(row_max_in + m),
            tl.load(row_sum_in + m),
            tl.load(logp_in + m),
            factor,
            entropy,
            entropy_gain,
            label_smoothing,
            z_loss,
            1.0 / vocab_size,
            HAS_EXTRAS,
            HAS_ENTROPY,
        )
        HAS_GAIN: tl.constexpr = HAS_SCALE or HAS_EXTRAS or HAS_ROW_SCALE
        write_residual(
            row, out_row, bias, start, V, (label - col_offset).to(tl.int32), terms, inner, outer,
            HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, HAS_GAIN, HAS_ENTROPY, BLOCK, True, "",
        )  # fmt: skip


def softmax_residual(
    logits: Any,  # [M, V]
    out: Any,  # [M, V]
    labels: Any,  # [M]
    bias: Any,  # [V] or None
    row_max: Any,  # [M]
    row_sum: Any,  # [M]
    logp: Any,  # [M]
    loss: Any,  # [M] or None
    *,
    scale: float,
    softcap: float | None,
    temperature: float = 1.0,
    label_smoothing: float,
    z_loss: float,
    config: RowConfig,
) -> None:
    """Launch `softmax_residual_kernel`; M > 0."""
    factors = head_factors(scale, softcap, temperature)
    softmax_residual_kernel[(logits.shape[0],)](
        logits, out, labels, bias, row_max, row_sum, logp, loss,
        logits.stride(0), out.stride(0), logits.shape[1], *factors, label_smoothing, z_loss,
        HAS_BIAS=bias is not None,
        HAS_SCALE=factors[2] != 1.0,
        HAS_SOFTCAP=softcap is not None,
        HAS_EXTRAS=label_smoothing != 0.0 or z_loss != 0.0,
        HAS_LOSS=loss is not None,
        BLOCK=config.block_for(logits.shape[1]),
        num_warps=config.num_warps,
        **CHECKED_LAUNCH,
    )  # fmt: skip


def logits_stats(
    logits: Any,  # [M, V]
    labels: Any,  # [M]
    bias: Any,  # [V] or None
    row_max: Any,  # [M]
    row_sum: Any,  # [M]
    label_logit: Any,  # [M]
    logit_sum: Any,  # [M] or None
    centred_sum: Any = None,  # [M] or None
    square_sum: Any = None,  # [M] or None
    max_before: Any = None,  # [M] or None
    *,
    scale: float,
    softcap: float | None,
    temperature: float = 1.0,
    col_offset: int,
    merge: bool,
    config: RowConfig,
) -> None:
    """Launch `logits_stats_kernel`; M > 0. The last three tensors are all given or all None."""
    factors = head_factors(scale, softcap, temperature)
    logits_stats_kernel[(logits.shape[0],)](
        logits, labels, bias, row_max, row_sum, label_logit, logit_sum, centred_sum, square_sum, max_before,
        logits.stride(0), logits.shape[1], col_offset, *factors[:2],
        HAS_BIAS=bias is not None,
        HAS_SCALE=factors[2] != 1.0,
        HAS_SOFTCAP=softcap is not None,
        HAS_LOGIT_SUM=logit_sum is not None,
        HAS_MOMENTS=centred_sum is not None,
        MERGE=merge,
        BLOCK=config.block_for(logits.shape[1]),
        num_warps=config.num_warps,
        **LAUNCH,
    )  # fmt: skip


def residual_from_stats(
    logits: Any,  # [M, V]
    out: Any,  # [M, V]
    labels: Any,  # [M]
    bias: Any,  # [V] or None
    row_max: Any,  # [M]
    row_sum: Any,  # [M]
    logp: Any,  # [M]
    row_scale: Any,  # [M] or None
    entropy: Any = None,  # [M] or None
    entropy_scale: Any = None,  # [M] or None
    *,
    scale: float,
    softcap: float | None,
    temperature: float = 1.0,
    label_smoothing: float,
    z_loss: float,
    col_offset: int,
    vocab_size: int,
    config: RowConfig = STREAM_CONFIG,
) -> None:
    """Launch `residual_from_stats_kernel`; M > 0. The entropy and its scale are both given or both None."""
    rows, cols = logits.shape
    factors = head_factors(scale, softcap, temperature)
    block = config.block_for(cols)
    residual_from_stats_kernel[(rows * triton.cdiv(cols, block),)](
        logits, out, labels, bias, row_max, row_sum, logp, row_scale, entropy, entropy_scale,
        logits.stride(0), out.stride(0), cols, col_offset, vocab_size, *factors, label_smoothing, z_loss,
        HAS_BIAS=bias is not None,
        HAS_SCALE=factors[2] != 1.0,
        HAS_SOFTCAP=softcap is not None,
        HAS_EXTRAS=label_smoothing != 0.0 or z_loss != 0.0,
        HAS_ROW_SCALE=row_scale is not None,
        HAS_ENTROPY=entropy is not None,
        BLOCK=block,
        num_warps=config.num_warps,
        **CHECKED_LAUNCH,
    )  # fmt: skip
