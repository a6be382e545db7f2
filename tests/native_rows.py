"""The row kernels of the CPU backend on whole problems, block by block, and the same in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch

from slime_fused.backends.base import (
    NO_FACTORS,
    HeadTransform,
    LogitsBlock,
    Moments,
    RowStats,
    VocabStats,
    acc_dtype,
)
from slime_fused.backends.cpu import CpuBackend
from tests.backend_grid import expected_logits
from tests.moment_grid import empty_stats, entropy_of
from tests.row_cases import NLL

BACKEND = CpuBackend()
INF = float("inf")

HEADS = (
    (HeadTransform(), False),
    (HeadTransform(temperature=0.01), False),
    (HeadTransform(temperature=100.0), False),
    (HeadTransform(-0.7, None, 0.5), True),
    (HeadTransform(0.0, None, 2.0), False),
    (HeadTransform(1.5, 8.0, 0.7), True),
    (HeadTransform(-2.0, 3.0, 0.01), False),
    (HeadTransform(0.5, 30.0, 100.0), False),
)
"""(transform, whether there is a bias): each sign of the scale, both ends of the temperature, the soft cap."""


def make_bias(cols, dtype):
    """Whole numbers, so that coarse logits still tie."""
    return torch.randn(cols, generator=torch.Generator().manual_seed(9)).round().to(dtype)


def make_block(cols, dtype, head, has_bias, *, masked=True):
    """Seven rows off alignment: labels first, last, in between and none; some logits -inf, one row nearly all."""
    generator = torch.Generator().manual_seed(cols)
    logits = (torch.randn(7, cols + 3, generator=generator) * 4).to(dtype)[:, 1 : cols + 1]
    if masked and head.scale > 0:
        logits[1, ::3] = -INF
        logits[2, 1:] = -INF
        logits[1, cols // 2] = logits[2, 0] = 1.0
    labels = torch.tensor([0, cols // 2, 0, cols - 1, cols // 3, -100, 2 * cols // 3])
    return LogitsBlock(logits, labels, make_bias(cols, dtype) if has_bias else None, head)


def columns_of(block, begin, end):
    """The columns begin to end, as a block of their own."""
    bias = None if block.bias is None else block.bias[begin:end]
    return LogitsBlock(
        block.logits[:, begin:end], block.labels, bias, block.transform, begin, block.logits.shape[1]
    )


def stats_of(block, bounds=None):
    """Statistics with moments, from one block of columns or merged from those between ``bounds``."""
    rows, cols = block.logits.shape
    stats = empty_stats(rows, block.logits.dtype, block.logits.device)
    for begin, end in pairwise(bounds or (0, cols)):
        BACKEND.logits_stats(columns_of(block, begin, end), stats, merge=begin > 0)
    return stats


def numbers_of(stats):
    """The seven tensors by name."""
    return {**{k: v for k, v in vars(stats).items() if k != "moments"}, **vars(stats.moments)}


def elementwise(block):
    """z as the kernels round it: the maximum of each row of one column."""
    columns = [stats_of(columns_of(block, v, v + 1)).row_max for v in range(block.logits.shape[1])]
    return torch.stack(columns, 1)


def logits_of(block, dtype):
    """z in plain PyTorch in ``dtype``."""
    bias = None if block.bias is None else block.bias.to(dtype)
    return expected_logits(block.logits.to(dtype), bias, block.transform)


def moments_of(z):
    """Entropy and sum p^2 of rows of logits."""
    return {"entropy": entropy_of(z), "sum_p2": torch.softmax(z, 1).square().sum(1)}


def moments_from(stats):
    """The same from the kernel's statistics."""
    moments: Moments = stats.moments
    return {
        "entropy": stats.row_sum.log() - moments.centred_sum / stats.row_sum,
        "sum_p2": moments.square_sum / stats.row_sum.square(),
    }


def assert_close(got, exact, rounded, name, spread):
    """Within the worst error of plain PyTorch in acc dtype plus 16 roundings; ``spread``: the largest |z|.

    A rounding of z moves all that is derived from it by |z| roundings, in whatever order it was formed.
    """
    worst = (rounded.double() - exact).abs().max()
    eps = torch.finfo(acc_dtype(got.dtype)).eps
    floor = 16 * eps * (1 + spread) * (1 + exact.abs()) + 4 * torch.finfo(got.dtype).eps * exact.abs()
    error = (got.double() - exact).abs()
    assert (error <= worst + floor).all(), f"{name}: error {error.max():.3g}, plain PyTorch {worst:.3g}"


def residual_of(block, stats: VocabStats, out, *, token_loss=NLL, factors=NO_FACTORS, bounds=None):
    """The residual from a row's statistics, written to ``out`` block by block."""
    logp = (stats.label_logit - stats.row_max) - stats.row_sum.log()
    known = RowStats(stats.row_max, stats.row_sum, logp)
    for begin, end in pairwise(bounds or (0, block.logits.shape[1])):
        BACKEND.residual_from_stats(columns_of(block, begin, end), out[:, begin:end], token_loss, known, factors)
    return out


def plain_gradient(block, token_loss, row_scale, entropy_scale, dtype):
    """d(sum of row_scale * token loss + entropy_scale * entropy)/d(raw logits) by autograd in ``dtype``."""
    raw = block.logits.to(dtype).detach().clone().requires_grad_()
    z = logits_of(LogitsBlock(raw, block.labels, block.bias, block.transform), dtype)
    logprobs = torch.log_softmax(z, 1)
    eps = token_loss.label_smoothing
    loss = -(1 - eps) * logprobs.gather(1, block.labels.clamp(min=0)[:, None])[:, 0]
    loss = loss + token_loss.z_loss * z.logsumexp(1) ** 2
    if eps:
        loss = loss - eps * logprobs.mean(1)
    value = loss * row_scale.to(dtype)
    if entropy_scale is not None:
        # Masked before the product, not after it: autograd would make NaN of 0 * -inf.
        entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs == -INF, 0)).sum(1)
        value = value + entropy * entropy_scale.to(dtype)
    (grad,) = torch.autograd.grad(value[block.labels >= 0].sum(), raw)
    return grad
