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

import torch
from torch import Tensor

from slime_fused.backends.base import Backend, HeadTransform, TokenLoss, acc_dtype
from slime_fused.engine import products
from slime_fused.engine.gradients import GradientDtypes, Gradients, float16_gain, float16_scale
from slime_fused.engine.problem import padded_cols


def vocab_sweep_backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    head: HeadTransform,
    token_loss: TokenLoss,
    row_max: Tensor,
    row_sum: Tensor,
    logp: Tensor,
    row_scale: Tensor,
    backend: Backend,
    dtypes: GradientDtypes,
    *,
    block_cols: int,
    wide_rows: int = 0,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> Gradients:
    """Gradients of sum_n row_scale_n * (token loss)_n; each is None where not wanted.

    Args:
        hidden: (N, D), any dtype that ``backend`` supports.
        weight: (V, D), same dtype.
        labels: (N,) int64; negative labels mark rows without a gradient.
        bias: (V,) in the dtype of the logits, or None.
        head: the transform from products to logits.
        token_loss: the loss of one token.
        row_max: (N,) acc dtype, largest logit of each row over the whole vocabulary.
        row_sum: (N,) acc dtype, sum_v exp(z_v - row_max) likewise.
        logp: (N,) acc dtype, log-probability of each label.
        row_scale: (N,) acc dtype, dL/d(token loss) of each row.
        backend: whose ``residual_from_stats`` turns logits into residuals.
        dtypes: of the three gradients.
        block_cols: columns of the vocabulary per step; the logits buffer is (N, block_cols).
        wide_rows: rows of a block whose logits are formed at once, in acc dtype beside that buffer; 0: all of them,
            in the buffer itself and its dtype.
        want_hidden: whether d_hidden is formed.
        want_weight: whether d_weight is formed.
        want_bias: whether d_bias is formed.

    Returns:
        d_hidden (N, D), d_weight (V, D) and d_bias (V,). d_hidden and d_bias are summed over blocks in acc dtype,
        and rounded once.

    Raises:
        ValueError: ``block_cols`` is not positive, or a label is not below V (CPU).
    """
    if block_cols < 1:
        raise ValueError(f"block_cols: expected at least 1, got {block_cols}")
    (rows, depth), vocab = hidden.shape, weight.shape[0]
    acc = acc_dtype(hidden.dtype)
    sum_hidden = hidden.new_zeros(rows, depth, dtype=acc) if want_hidden else None
    d_weight = hidden.new_empty(weight.shape, dtype=dtypes.weight) if want_weight else None
    d_bias = hidden.new_zeros(vocab, dtype=acc) if want_bias else None
    scaled_hidden, weight_scale, gain = hidden, None, None
    if hidden.dtype == torch.float16:
        gain = float16_gain(row_max, row_sum, logp, head, token_loss)
        row_scale = row_scale / gain
    if want_weight:
        if hidden.dtype == torch.float16:
            weight_scale = float16_scale(hidden, row_scale)
        scaled_hidden = products.scale_rows(hidden, row_scale if weight_scale is None else row_scale * weight_scale)

    width = min(block_cols, vocab)
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
            backend.residual_from_stats(
                logits,
                residual[part],
                labels[part],
                None if bias is None else bias[cols],
                head,
                token_loss,
                col_offset=begin,
                vocab_size=vocab,
                row_max=row_max[part],
                row_sum=row_sum[part],
                logp=logp[part],
                row_scale=None if gain is None else gain[part],
            )
        if sum_hidden is not None:
            products.add_hidden_grad(sum_hidden, residual, weight[cols])
        if d_weight is not None:
            products.add_weight_grad(d_weight[cols], residual, scaled_hidden, is_first=True)
        if d_bias is not None:
            products.add_bias_grad(d_bias[cols], residual, row_scale)

    d_hidden = None
    del buffer, wide, residual, scaled_hidden
    if sum_hidden is not None:
        d_hidden = products.scale_rows(sum_hidden, row_scale, dtype=dtypes.hidden, owns=True)
    return Gradients(d_hidden, d_weight, None if d_bias is None else d_bias.to(dtypes.bias), weight_scale)
