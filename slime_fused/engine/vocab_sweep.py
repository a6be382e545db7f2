"""The backward pass by blocks of the vocabulary: logits are recomputed, never held beyond (rows x block_cols).

With the statistics of every row known, a block of columns needs nothing from the others. For the rows of W in
block b, with R the residual d(token loss)/d(logits) and c the coefficients dL/d(token loss) of the rows::

    Z_b = X W_b^T       R_b = residual(Z_b)       dX += R_b W_b       dW_b = R_b^T (c * X)       db_b = R_b^T c

and dX is multiplied by c once, at the end. Each row of dW is written exactly once, in its own dtype: no float32
copy of dW exists, whatever the number of rows. Costs one more product (4 N V D multiply-adds in all, with the
statistics) than keeping the logits. c is kept out of R_b, as small coefficients would underflow in float16; where
it meets X in float16 a power of two keeps the product in range, and dW is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slime_fused.backends.base import acc_dtype
from slime_fused.engine import products
from slime_fused.engine.chunks import Head
from slime_fused.engine.gradients import Gradients, float16_gain, float16_scale
from slime_fused.engine.mix import Mix, row_factors
from slime_fused.engine.problem import padded_cols
from slime_fused.engine.row_results import RowResults


@dataclass(frozen=True)
class VocabBlocks:
    """By how much of the vocabulary the sweep goes, and which gradients it forms."""

    block_cols: int
    """Columns of a block; the logits buffer is (N, block_cols)."""
    wide_rows: int = 0
    """Rows of a block whose logits are formed at once, in acc dtype beside that buffer; 0: all of them, in the
    buffer itself and its dtype."""
    want_hidden: bool = True
    want_weight: bool = True
    want_bias: bool = True


def vocab_sweep_backward(
    head: Head,
    labels: Tensor,
    stats: RowResults,
    coefficient: Tensor,
    blocks: VocabBlocks,
    mix: Mix | None = None,
) -> Gradients:
    """Gradients of sum_n coefficient_n * (token loss)_n; each is None where not wanted.

    Args:
        head: whose ``hidden`` (N, D) holds the rows of ``labels`` alone; not a shard.
        labels: (N,) int64; negative labels mark rows without a gradient.
        stats: (N,) each, over the whole vocabulary.
        coefficient: (N,) acc dtype, dL/d(token loss) of each row.
        blocks: see `VocabBlocks`.
        mix: (N,) shares of each row's token loss and entropy in what ``coefficient`` is for; None: the loss alone.

    Returns:
        d_hidden (N, D), d_weight (V, D) and d_bias (V,) in the dtypes in which ``head``'s gradients wait. d_hidden
        and d_bias are summed over blocks in acc dtype, and rounded once.

    Raises:
        ValueError: ``block_cols`` is not positive, or a label is not below V (CPU).
    """
    if blocks.block_cols < 1:
        raise ValueError(f"block_cols: expected at least 1, got {blocks.block_cols}")
    hidden, weight, dtypes = head.hidden, head.weight, head.waiting_dtypes
    (rows, depth), vocab = hidden.shape, weight.shape[0]
    acc = acc_dtype(hidden.dtype)
    sum_hidden = hidden.new_zeros(rows, depth, dtype=acc) if blocks.want_hidden else None
    d_weight = hidden.new_empty(weight.shape, dtype=dtypes.weight) if blocks.want_weight else None
    d_bias = hidden.new_zeros(vocab, dtype=acc) if blocks.want_bias else None
    scaled_hidden, weight_scale, gain = hidden, None, None
    if hidden.dtype == torch.float16:
        gain = float16_gain(stats, head.transform, head.token_loss, mix)
        coefficient = coefficient / gain
    if blocks.want_weight:
        if hidden.dtype == torch.float16:
            weight_scale = float16_scale(hidden, coefficient)
        factor = coefficient if weight_scale is None else coefficient * weight_scale
        scaled_hidden = products.scale_rows(hidden, factor)

    width, wide_rows = min(blocks.block_cols, vocab), blocks.wide_rows
    buffer = hidden.new_empty(rows, padded_cols(width, hidden.element_size()))
    # As in `ChunkEngine`: a product may read a column beyond an odd width.
    buffer[:, width:].zero_()
    wide = hidden.new_empty(wide_rows, padded_cols(width, acc.itemsize), dtype=acc) if wide_rows else None
    for begin in range(0, vocab, width):
        cols = slice(begin, min(begin + width, vocab))
        residual = buffer[:, : cols.stop - begin]
        for first in range(0, rows, wide_rows or max(rows, 1)):
            part = slice(first, min(first + (wide_rows or rows), rows))
            logits = residual if wide is None else wide[: part.stop - first, : cols.stop - begin]
            products.write_logits(hidden[part], weight[cols], logits)
            known = stats.span(part.start, part.stop)
            factors = row_factors(mix, known, gain, part)
            block = head.block(logits, labels[part], begin)
            head.backend.residual_from_stats(block, residual[part], head.token_loss, known, factors)
        if sum_hidden is not None:
            products.add_hidden_grad(sum_hidden, residual, weight[cols])
        if d_weight is not None:
            products.add_weight_grad(d_weight[cols], residual, scaled_hidden, is_first=True)
        if d_bias is not None:
            products.add_bias_grad(d_bias[cols], residual, coefficient)

    d_hidden = None
    del buffer, wide, residual, scaled_hidden
    if sum_hidden is not None:
        d_hidden = products.scale_rows(sum_hidden, coefficient, dtype=dtypes.hidden, owns=True)
    return Gradients(d_hidden, d_weight, None if d_bias is None else d_bias.to(dtypes.bias), weight_scale)
