"""The matrix products: 90 to 97 % of the time, all of them the vendor's (cuBLAS, oneDNN) through PyTorch.

Each function writes into, or adds to, a buffer that its caller owns where PyTorch can, and says where it cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime_fused.engine.plan import WEIGHT_GRAD_BLOCK_BYTES

_LOW_PRECISION = (torch.bfloat16, torch.float16)

_ADDS_TO_FLOAT32 = torch.__version__ >= "2.10"  # a TorchVersion: compared as numbers
"""Whether CUDA's ``addmm`` adds a 16-bit product to a float32 matrix. PyTorch 2.8 and 2.9 have an overload of the
same schema, whose checks do not provide for a float32 ``self``: the version is all that tells."""

_CACHED_BYTES = 128 << 10
"""A float32 copy that stays in one core's cache. Its 32768 elements are the most that PyTorch leaves to one thread:
starting several costs as much as such a block."""


def write_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out`` (M, V) = ``hidden`` (M, D) @ ``weight`` (V, D)^T. ``out`` may have padded rows.

    It may be float32 where the operands are not: the product is then not rounded to their dtype. No CPU product
    does that, so there the operands are upcast, ``weight`` by blocks: it runs at the float32 rate.
    """
    is_wide = out.dtype != hidden.dtype
    if is_wide and hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    elif is_wide or _is_slow_on_cpu(hidden):
        hidden32 = hidden.float()
        for cols in _blocks(weight.shape[0], sum(hidden.shape) * 4):
            if is_wide:
                torch.mm(hidden32, weight[cols].float().t(), out=out[:, cols])
            else:
                out[:, cols] = hidden32 @ weight[cols].float().t()
    else:
        torch.mm(hidden, weight.t(), out=out)


def residual_times_weight(residual: Tensor, weight: Tensor) -> Tensor:
    """R W: (M, V) @ (V, D) -> (M, D), in float32 where the product can round once at the end, after the scaling."""
    if _is_slow_on_cpu(residual):
        total = torch.zeros(residual.shape[0], weight.shape[1], dtype=torch.float32, device=residual.device)
        for cols in _blocks(weight.shape[0], sum(total.shape) * 4):
            total.addmm_(residual[:, cols].float(), weight[cols].float())
        return total
    if residual.is_cuda and residual.dtype in _LOW_PRECISION:
        return torch.mm(residual, weight, out_dtype=torch.float32)
    return residual @ weight


def add_hidden_grad(total: Tensor, residual: Tensor, weight: Tensor) -> None:
    """``total`` (M, D) acc += ``residual`` (M, B) @ ``weight`` (B, D)."""
    if total.dtype == residual.dtype:
        total.addmm_(residual, weight)
    elif total.is_cuda:
        _add_product(total, residual, weight)
    else:
        # bfloat16 on the CPU rounds each block's product before it is added: no mixed product exists there.
        for rows in _blocks(total.shape[0], total.shape[1] * total.element_size()):
            total[rows].add_(residual_times_weight(residual[rows], weight))


def add_weight_grad(d_weight: Tensor, residual: Tensor, scaled_hidden: Tensor, *, is_first: bool) -> None:
    """``d_weight`` (V, D) [+]= ``residual`` (M, V)^T @ ``scaled_hidden`` (M, D); ``is_first`` overwrites.

    ``d_weight`` is float32 (float64) where several chunks are summed, else it has the dtype of the operands.
    """
    is_mixed = d_weight.dtype != residual.dtype
    if residual.is_cuda and is_mixed:
        if is_first:
            torch.mm(residual.t(), scaled_hidden, out_dtype=torch.float32, out=d_weight)
        else:
            _add_product(d_weight, residual.t(), scaled_hidden)
    elif is_mixed or _is_slow_on_cpu(residual):
        # No CPU product takes 16-bit operands into a float32 result: go through blocks of the vocabulary.
        upcast = _is_slow_on_cpu(residual)
        scaled = scaled_hidden.float() if upcast else scaled_hidden
        # A block and its float32 copy, or a block and its float32 residual.
        row_bytes = 4 * sum(scaled.shape) if upcast else (scaled.element_size() + 4) * scaled.shape[1]
        for cols in _blocks(d_weight.shape[0], row_bytes):
            block = (residual[:, cols].float() if upcast else residual[:, cols]).t() @ scaled
            if is_first:
                d_weight[cols] = block
            else:
                d_weight[cols] += block
    elif is_first:
        torch.mm(residual.t(), scaled_hidden, out=d_weight)
    else:
        d_weight.addmm_(residual.t(), scaled_hidden)


def scale_rows(
    rows: Tensor,
    coefficient: Tensor,
    *,
    owns: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``rows`` (M, D) times ``coefficient`` (M,), rounded once: to ``out``, or a tensor of ``dtype`` (else theirs).

    ``owns`` allows the result to lie where ``rows`` do. One pass on a GPU, where dtypes may differ within it.
    """
    if out is None:
        dtype = dtype or rows.dtype
        out = rows if owns and dtype == rows.dtype else torch.empty_like(rows, dtype=dtype)
    if rows.device.type != "cpu" or rows.dtype == coefficient.dtype == out.dtype:
        return torch.mul(rows, coefficient[:, None], out=out)
    # On the CPU mixed dtypes go through float32 copies: keep those in the cache and out of fresh pages.
    for block in _blocks(rows.shape[0], rows.shape[1] * coefficient.element_size(), _CACHED_BYTES):
        out[block] = rows[block] * coefficient[block, None]
    return out


def scaled_to(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` (K, D) or (K,) times a 0-dim ``factor``, rounded once to ``dtype``, as a new tensor."""
    out = torch.empty_like(values, dtype=dtype, memory_format=torch.contiguous_format)
    if values.device.type != "cpu":
        return torch.mul(values, factor, out=out)
    for block in _blocks(values.shape[0], values[:1].numel() * values.element_size(), _CACHED_BYTES):
        out[block] = values[block] * factor
    return out


def add_bias_grad(d_bias: Tensor, residual: Tensor, coefficient: Tensor) -> None:
    """``d_bias`` (V,) acc += ``residual`` (M, V)^T @ ``coefficient`` (M,), accumulated in float32 (float64)."""
    for cols in _blocks(d_bias.shape[0], residual.shape[0] * d_bias.element_size()):
        d_bias[cols].addmv_(residual[:, cols].to(d_bias.dtype).t(), coefficient)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total`` (I, J) float32 += ``a`` (I, K) @ ``b`` (K, J), both of 16 bits, on a GPU."""
    if _ADDS_TO_FLOAT32:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    # In blocks: a second float32 matrix of this size is what chunks must not cost.
    for rows in _blocks(total.shape[0], total.shape[1] * total.element_size()):
        total[rows].add_(torch.mm(a[rows], b, out_dtype=total.dtype))


def _is_slow_on_cpu(operand: Tensor) -> bool:
    """Half-precision products on a CPU run at a hundredth of the float32 rate: go through float32 blocks."""
    return operand.dtype == torch.float16 and operand.device.type == "cpu"


def _blocks(size: int, row_bytes: int, block_bytes: int = WEIGHT_GRAD_BLOCK_BYTES) -> list[slice]:
    rows = max(1, block_bytes // max(1, row_bytes))  # a chunk of no rows takes no bytes
    return [slice(i, min(i + rows, size)) for i in range(0, size, rows)]
