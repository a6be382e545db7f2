# ruff: noqa: ANN001, ANN201 -- what Triton passes to a kernel has no Python type
"""The head's product with softmax statistics in its epilogue: the logits live in registers and are never stored.

    z = transform(round(hidden weight^T) + bias)
    row_max = max_v z_v,   row_sum = sum_v exp(z_v - row_max),   label_logit = z_label,   logit_sum = sum_v z_v
    centred_sum = sum_v exp(z_v - row_max) (z_v - row_max),   square_sum = sum_v exp(z_v - row_max)^2
    max_before = max of z_v over the columns v before the label's

| tensor | shape | dtype | |
|---|---|---|---|
| hidden | [M, D], rows `hidden_stride` apart | f32, bf16, f16 | read once per `block_n` columns, mostly from L2 |
| weight | [V, D], rows `weight_stride` apart | as hidden | read once per `group_m * block_m` rows |
| labels | [M] | i64 | read; a label outside [col_offset, col_offset + V) has label_logit 0 |
| bias | [V] or None | that of the logits: as hidden, or f32 | read |
| partials of all statistics but label_logit | [tiles of V, M] | f32 | written, then merged by the second kernel |
| row_max, row_sum, label_logit | [M] | f32 | written |
| logit_sum | [M] or None | f32 | written |
| centred_sum, square_sum, max_before | [M], all or none | f32 | written |

FLOPs: 2 M V D. Bytes beyond the operands: 8 M V / block_n for each statistic but label_logit (two to six).
Accumulation: float32. The product is rounded once to the dtype of its operands, as one that is stored: a backward
pass forms the logits again and subtracts this log-sum-exp. Were they not rounded alike, a row's probabilities would
not sum to 1 (bfloat16, logits of standard deviation 5: gradients 2.4 times further from float64; 10: 3.8 times).
Where backward forms float32 logits, the product is not rounded at all.
Limits: float32 operands use full precision ("ieee"), which has no tensor cores.
Deterministic: every partial and every label logit has one writer, and the merge runs in a fixed order.
Model: the linear cross-entropy of Cut Your Losses in Large-Vocabulary Language Models (arXiv 2411.09009).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import LAUNCH, MERGE_ROWS, MERGE_TILES, LinearConfig, linear_config
from .numerics import (
    NEG_INF,
    exp,
    exp_and_moments,
    finite_shift,
    head_factors,
    head_logit,
    round_product,
    shifted_moments,
)


@triton.jit
def tile_product(
    hidden,  # [M, D]: a descriptor or a pointer
    weight,  # [V, D]: a descriptor or a pointer
    first_row,
    first_col,
    M,
    V,
    D,
    hidden_stride,
    weight_stride,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden[rows] @ weight[cols]^T, [BLOCK_M, BLOCK_N] float32; entries outside [M, V] are unspecified."""
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DESCRIPTORS:
        for k in range(0, D, BLOCK_K):
            x = hidden.load([first_row, k])
            w = weight.load([first_col, k])
            product = tl.dot(x, w.T, product, input_precision="ieee")
    else:
        # Clamped, not masked: repeating the last row costs nothing, a mask would cost registers at every step.
        rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
        cols = tl.minimum(first_col + tl.arange(0, BLOCK_N), V - 1).to(tl.int64)
        depth = tl.arange(0, BLOCK_K)
        x_block = hidden + rows[:, None] * hidden_stride + depth[None, :]
        w_block = weight + cols[None, :] * weight_stride + depth[:, None]
        for k in range(0, D, BLOCK_K):
            if EVEN_D:
                x = tl.load(x_block)
                w = tl.load(w_block)
            else:
                x = tl.load(x_block, mask=depth[None, :] < D - k, other=0.0)
                w = tl.load(w_block, mask=depth[:, None] < D - k, other=0.0)
            product = tl.dot(x, w, product, input_precision="ieee")
            x_block += BLOCK_K
            w_block += BLOCK_K
    return product


@triton.jit
def linear_stats_kernel(
    hidden,  # [M, D]
    weight,  # [V, D]
    labels,  # [M]
    bias,  # [V]
    partial_max,  # [tiles of V, M]
    partial_sum,  # [tiles of V, M]
    partial_logit_sum,  # [tiles of V, M]
    partial_centred,  # [tiles of V, M]
    partial_square,  # [tiles of V, M]
    partial_before,  # [tiles of V, M]
    label_logit,  # [M], zeroed by the caller
    M,
    V,
    D,
    hidden_stride,
    weight_stride,
    col_offset,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LOGIT_SUM: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    HAS_PTX: tl.constexpr,
    ROUNDS_PRODUCT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program per tile, in groups of GROUP_M row tiles that meet the same weight tile in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(V, BLOCK_N)
    group_tiles = GROUP_M * tiles_n
    tile = tl.program_id(0)
    group_first = (tile // group_tiles) * GROUP_M
    group_size = tl.minimum(tiles_m - group_first, GROUP_M)
    tile_m = group_first + (tile % group_tiles) % group_size
    tile_n = (tile % group_tiles) // group_size
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    raw = tile_product(
        hidden,
        weight,
        tile_m * BLOCK_M,
        tile_n * BLOCK_N,
        M,
        V,
        D,
        hidden_stride,
        weight_stride,
        DESCRIPTORS,
        EVEN_D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if ROUNDS_PRODUCT:
        raw = round_product(raw, hidden.dtype if DESCRIPTORS else hidden.dtype.element_ty, HAS_PTX)
    if HAS_BIAS:
        raw += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    z = head_logit(raw, inner, outer, HAS_SCALE, HAS_SOFTCAP)
    out_offset = tile_n.to(tl.int64) * M + rows
    if HAS_LOGIT_SUM:
        # Here, not below with the others: fewest registers are alive.
        tile_logit_sum = tl.sum(tl.where((cols < V)[None, :], z, 0.0), 1)
        tl.store(partial_logit_sum + out_offset, tile_logit_sum, mask=rows < M)
    z = tl.where((cols < V)[None, :], z, NEG_INF)

    tile_max = tl.max(z, 1)
    distance = z - finite_shift(tile_max)[:, None]
    if HAS_MOMENTS:
        exponential, centred, square = exp_and_moments(distance)
        tl.store(partial_centred + out_offset, tl.sum(centred, 1), mask=rows < M)
        tl.store(partial_square + out_offset, tl.sum(square, 1), mask=rows < M)
        tile_sum = tl.sum(exponential, 1)
    else:
        tile_sum = tl.sum(exp(distance), 1)
    tl.store(partial_max + out_offset, tile_max, mask=rows < M)
    tl.store(partial_sum + out_offset, tile_sum, mask=rows < M)

    # An ignored (negative) label stays negative: col_offset and tile_n are not.
    label_col = (tl.load(labels + rows, mask=rows < M, other=-1) - col_offset).to(tl.int32) - tile_n * BLOCK_N
    is_here = (label_col >= 0) & (label_col < BLOCK_N) & (label_col < V - tile_n * BLOCK_N)
    tile_before = tl.where(label_col > 0, tile_max, NEG_INF)
    # Most tiles hold no label of their rows: skip the search.
    if tl.max(is_here.to(tl.int32), 0) > 0:
        tile_cols = tl.arange(0, BLOCK_N)[None, :]
        is_label = tile_cols == label_col[:, None]
        tl.store(label_logit + rows, tl.sum(tl.where(is_label, z, 0.0), 1), mask=is_here & (rows < M))
        if HAS_MOMENTS:
            tile_before = tl.max(tl.where(tile_cols < label_col[:, None], z, NEG_INF), 1)
    if HAS_MOMENTS:
        tl.store(partial_before + out_offset, tile_before, mask=rows < M)


@triton.jit
def merge_partials_kernel(
    partial_max,  # [T, M]
    partial_sum,  # [T, M]
    partial_logit_sum,  # [T, M]
    partial_centred,  # [T, M]
    partial_square,  # [T, M]
    partial_before,  # [T, M]
    row_max,  # [M]
    row_sum,  # [M]
    logit_sum,  # [M]
    centred_sum,  # [M]
    square_sum,  # [M]
    max_before,  # [M]
    M,
    T,
    HAS_LOGIT_SUM: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Merge the T partial statistics of BLOCK_M rows, in order."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    running_max = tl.full([BLOCK_M], NEG_INF, tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    running_logit_sum = tl.zeros([BLOCK_M], tl.float32)
    running_centred = tl.zeros([BLOCK_M], tl.float32)
    running_square = tl.zeros([BLOCK_M], tl.float32)
    running_before = tl.full([BLOCK_M], NEG_INF, tl.float32)
    for start in range(0, T, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        is_valid = (tiles < T)[:, None] & (rows < M)[None, :]
        offsets = tiles.to(tl.int64)[:, None] * M + rows[None, :]
        block_max = tl.load(partial_max + offsets, mask=is_valid, other=NEG_INF)
        block_sum = tl.load(partial_sum + offsets, mask=is_valid, other=0.0)
        new_max = tl.maximum(running_max, tl.max(block_max, 0))
        shift = finite_shift(new_max)
        if HAS_MOMENTS:
            running_sum, running_centred, running_square = shifted_moments(
                running_max, running_sum, running_centred, running_square, shift
            )
            block_sum, centred, square = shifted_moments(
                block_max,
                block_sum,
                tl.load(partial_centred + offsets, mask=is_valid, other=0.0),
                tl.load(partial_square + offsets, mask=is_valid, other=0.0),
                shift[None, :],
            )
            running_sum += tl.sum(block_sum, 0)
            running_centred += tl.sum(centred, 0)
            running_square += tl.sum(square, 0)
            block_before = tl.load(partial_before + offsets, mask=is_valid, other=NEG_INF)
            running_before = tl.maximum(running_before, tl.max(block_before, 0))
        else:
            running_sum = running_sum * exp(running_max - shift) + tl.sum(
                block_sum * exp(block_max - shift[None, :]), 0
            )
        running_max = new_max
        if HAS_LOGIT_SUM:
            running_logit_sum += tl.sum(tl.load(partial_logit_sum + offsets, mask=is_valid, other=0.0), 0)
    tl.store(row_max + rows, running_max, mask=rows < M)
    tl.store(row_sum + rows, running_sum, mask=rows < M)
    if HAS_LOGIT_SUM:
        tl.store(logit_sum + rows, running_logit_sum, mask=rows < M)
    if HAS_MOMENTS:
        tl.store(centred_sum + rows, running_centred, mask=rows < M)
        tl.store(square_sum + rows, running_square, mask=rows < M)
        tl.store(max_before + rows, running_before, mask=rows < M)


def partial_shape(rows: int, cols: int, config: LinearConfig) -> tuple[int, int]:
    """Shape of each float32 scratch tensor of `linear_stats`: one for every statistic but the label's logit."""
    return triton.cdiv(cols, config.block_n), rows


def can_use_descriptors(tensor: Any) -> bool:
    """Whether the tensor memory accelerator can address it: 16-byte aligned rows, contiguous columns."""
    row_bytes = tensor.stride(0) * tensor.element_size()
    return tensor.stride(1) == 1 and row_bytes % 16 == 0 and tensor.data_ptr() % 16 == 0


@cache
def compiles_to_ptx() -> bool:
    """Whether kernels may contain PTX here: an NVIDIA GPU, not an AMD one and not the interpreter."""
    return not triton.knobs.runtime.interpret and driver.active.get_current_target().backend == "cuda"


def choose_config(family: str, hidden: Any, weight: Any, *, has_moments: bool = False) -> LinearConfig:
    """The shipped configuration for these operands on this family of targets (`configs.target_family`).

    `has_moments`: with `centred_sum`, `square_sum` and `max_before`.
    """
    can_use = can_use_descriptors(hidden) and can_use_descriptors(weight)
    return linear_config(family, hidden.element_size(), can_use_descriptors=can_use, has_moments=has_moments)


def linear_stats(
    hidden: Any,  # [M, D]
    weight: Any,  # [V, D]
    labels: Any,  # [M]
    bias: Any,  # [V] or None
    row_max: Any,  # [M]
    row_sum: Any,  # [M]
    label_logit: Any,  # [M]
    logit_sum: Any,  # [M] or None
    partials: Any,  # [2, one more with logit_sum, three more with centred_sum; tiles of V, M]
    centred_sum: Any = None,  # [M] or None
    square_sum: Any = None,  # [M] or None
    max_before: Any = None,  # [M] or None
    *,
    scale: float,
    softcap: float | None,
    temperature: float = 1.0,
    col_offset: int,
    config: LinearConfig,
    rounds_product: bool = True,
) -> None:
    """Launch both kernels; M > 0 and V > 0. Columns of `hidden` and `weight` are contiguous.

    The three optional tensors are all given or all None.
    """
    (rows, depth), cols = hidden.shape, weight.shape[0]
    operands = (hidden, weight)
    if config.uses_descriptors:
        operands = (
            TensorDescriptor(hidden, [rows, depth], [hidden.stride(0), 1], [config.block_m, config.block_k]),
            TensorDescriptor(weight, [cols, depth], [weight.stride(0), 1], [config.block_n, config.block_k]),
        )
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n)
    factors = head_factors(scale, softcap, temperature)
    has_logit_sum, has_moments = logit_sum is not None, centred_sum is not None
    planes = iter(partials)
    partial_max, partial_sum = next(planes), next(planes)
    partial_logit_sum = next(planes) if has_logit_sum else None
    moments = [next(planes) if has_moments else None for _ in range(3)]
    label_logit.zero_()
    linear_stats_kernel[(tiles,)](
        *operands, labels, bias, partial_max, partial_sum, partial_logit_sum, *moments, label_logit,
        rows, cols, depth, hidden.stride(0), weight.stride(0), col_offset, *factors[:2],
        HAS_BIAS=bias is not None,
        HAS_SCALE=factors[2] != 1.0,
        HAS_SOFTCAP=softcap is not None,
        HAS_LOGIT_SUM=has_logit_sum,
        HAS_MOMENTS=has_moments,
        HAS_PTX=compiles_to_ptx(),
        ROUNDS_PRODUCT=rounds_product,
        DESCRIPTORS=config.uses_descriptors,
        EVEN_D=depth % config.block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **LAUNCH,
    )  # fmt: skip
    merge_partials_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
        partial_max, partial_sum, partial_logit_sum, *moments,
        row_max, row_sum, logit_sum, centred_sum, square_sum, max_before,
        rows, partials.shape[1],
        HAS_LOGIT_SUM=has_logit_sum,
        HAS_MOMENTS=has_moments,
        BLOCK_M=MERGE_ROWS,
        BLOCK_T=MERGE_TILES,
        num_warps=4,
        **LAUNCH,
    )  # fmt: skip
