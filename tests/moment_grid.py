"""The part of the grid for every backend that trainers log: entropy, sum p^2, the label's rank; entropy's gradient.

Truth and tolerance: `tests.backend_grid`, and what an error of one rounding in each logit does to the result, to
first order: entropy is of the order of 1 however large the logits are, and plain PyTorch may be lucky.

Why these cases suffice: moments see the logits after bias and transform, and no token loss. So `moment_cases` has
every size, alignment and count of rows, each transform (scale of each sign and none, soft cap, temperature in both
its paths, bias) and ignored rows; and the residual's entropy meets token losses with and without extras. Three
blocks of columns merge statistics whose maximum rises and ones whose maximum stays. In every row with an even index
the label is the likeliest token, in others it hardly ever is. `check_extreme_moments` has what sums of e * z lose:
-inf, rows of it alone, equal maxima near the end of float16, one survivor, NaN. `check_label_rank` has equal maxima
in several blocks, with the label before, on, between and behind them.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from slime_fused.backends.base import (
    Backend,
    HeadTransform,
    LogitsBlock,
    Moments,
    RowFactors,
    RowStats,
    VocabStats,
    acc_dtype,
)
from tests.backend_grid import RowData, assert_as_exact, expected_logits, expected_rows
from tests.row_cases import DTYPES, NLL, PLAIN_HEAD, RowCase, row_cases

_NAMES = (
    "plain",
    "scale_softcap_bias",
    "high_temperature_scale_bias",
    "softcap_temperature",
    "all_temperature",
    "ignored",
    "likely_labels",
    "no_rows",
    "one_column",
    "two_columns",
    "unaligned_rows",
    "aligned",
    "many_rows",
    "negative_scale_unaligned",
    "zero_scale_aligned",
)


def moment_cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[RowCase]:
    """The cases of `_NAMES` in every dtype."""
    return [case for case in row_cases(dtypes) if case.name.rpartition("-")[0] in _NAMES]


def entropy_of(z: Tensor) -> Tensor:
    """(M, V) -> (M,), 0 log 0 being 0."""
    log_p = torch.log_softmax(z, 1)
    return -torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p).sum(1)


def empty_stats(rows: int, dtype: torch.dtype, device: torch.device) -> VocabStats:
    """Poisoned."""
    columns = torch.full((7, rows), torch.nan, dtype=acc_dtype(dtype), device=device).unbind()
    return VocabStats(*columns[:4], Moments(*columns[4:]))


def stats_by_blocks(backend: Backend, data: RowData, shards: int) -> tuple[VocabStats, Moments]:
    """Merged over so many blocks of columns."""
    stats = empty_stats(data.case.rows, data.case.dtype, data.device)
    assert stats.moments is not None
    for cols in data.blocks(shards):
        backend.logits_stats(data.block(cols.start, cols.stop), stats, merge=cols.start > 0)
    return stats, stats.moments


def entropy_from(stats: VocabStats, moments: Moments) -> Tensor:
    """(M,)"""
    return stats.row_sum.log() - moments.centred_sum / stats.row_sum


def is_top1(stats: VocabStats, moments: Moments) -> Tensor:
    """(M,) bool: whether the label is the first of the largest logits."""
    return (stats.label_logit >= stats.row_max) & (stats.label_logit > moments.max_before)


def check_moments(backend: Backend, case: RowCase, device: torch.device, shards: int) -> None:
    """Entropy, sum p^2, the largest logit before the label and the label's rank, merged over blocks of columns."""
    data = RowData(case, device)
    z = _logits(data, torch.float64)
    likeliest = (z == z.amax(1, keepdim=True)).int().argmax(1).to(device)
    data.labels[::2] = torch.where(data.labels[::2] < 0, data.labels[::2], likeliest[::2])
    stats, moments = stats_by_blocks(backend, data, shards)

    acc = acc_dtype(case.dtype)
    unit, plain_z = torch.finfo(acc).eps, _logits(data, acc)
    log_p = torch.log_softmax(z, 1)
    p, entropy = log_p.exp(), entropy_of(z)
    slack = 8 * unit * (p * (log_p + entropy[:, None]).abs() * z.abs()).sum(1)
    assert_as_exact(entropy_from(stats, moments), entropy, entropy_of(plain_z), "entropy", slack)
    collision, plain_p = p.square().sum(1), torch.softmax(plain_z, 1)
    slack = 16 * unit * (p * (p - collision[:, None]).abs() * z.abs()).sum(1)
    got = moments.square_sum / stats.row_sum**2
    assert_as_exact(got, collision, plain_p.square().sum(1), "sum of p^2", slack)

    labels = data.labels.cpu()
    before = torch.arange(case.vocab) < labels[:, None]
    largest, plain_largest = (torch.where(before, x, -torch.inf).amax(1) for x in (z, plain_z))
    assert_as_exact(moments.max_before, largest, plain_largest, "max_before")

    # Which logit is the largest is a matter of rounding where two are near.
    top = torch.cat([z, torch.full_like(z[:, :1], -torch.inf)], 1).topk(2, 1).values
    is_clear = (top[:, 0] - top[:, 1] > 64 * unit * top[:, 0].abs()) | (z == z[:, :1]).all(1)
    hit = (labels == likeliest.cpu()) & (labels >= 0)
    assert torch.equal(is_top1(stats, moments).cpu()[is_clear & (labels >= 0)], hit[is_clear & (labels >= 0)])
    assert torch.equal(stats.label_logit.cpu()[is_clear & hit], stats.row_max.cpu()[is_clear & hit])
    assert is_clear.any() or case.rows == 0


def check_entropy_residual(backend: Backend, case: RowCase, device: torch.device, shards: int) -> None:
    """The residual of ``row_scale * token loss + entropy_scale * entropy``, in place, block by block."""
    for has_scale in (False, True):
        data = RowData(case, device)
        wide, acc = torch.float64, acc_dtype(case.dtype)
        entropy_scale = data.row_scale().flip(0)
        row_scale = data.row_scale() if has_scale else None
        truth, plain = (_expected_gradient(data, dtype, row_scale, entropy_scale) for dtype in (wide, acc))
        slack = _gradient_slack(data, entropy_scale)
        entropy = entropy_of(_logits(data, wide)).to(acc).to(device)
        stats = VocabStats(*data.empty_rows(4))
        for cols in data.blocks(shards):
            backend.logits_stats(data.block(cols.start, cols.stop), stats, merge=cols.start > 0)
        logp = stats.label_logit - stats.row_max - stats.row_sum.log()
        known = RowStats(stats.row_max, stats.row_sum, logp)
        factors = RowFactors(row_scale, entropy, entropy_scale)
        for cols in data.blocks(shards):
            block = data.block(cols.start, cols.stop)
            backend.residual_from_stats(block, block.logits, case.token_loss, known, factors)
        assert_as_exact(data.raw, truth, plain, f"residual, row_scale {has_scale}", slack)


def check_extreme_moments(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    """Masked vocabulary, one survivor, equal maxima at 6e4, certainty, NaN, and nothing but -inf."""
    big = 6e4
    raw = torch.tensor(
        [
            [0.0, 1.0, -torch.inf, 2.0],
            [-torch.inf, -torch.inf, 5.0, -torch.inf],
            [0.0, big, -big, big],
            [big, -big, 0.0, 1.0],
            [-big, -big, -big, -big],
            [-torch.inf, -torch.inf, 0.0, 0.0],
            [0.0, torch.nan, 1.0, 2.0],
            [-torch.inf] * 4,
        ]
    ).to(dtype)
    z, finite, acc = raw.double(), slice(0, 6), acc_dtype(dtype)
    labels = torch.tensor([3, 2, 3, 0, 0, 0, 3, 0], device=device)
    for width in (1, 2, 3, 4):
        stats = empty_stats(len(raw), dtype, device)
        moments = stats.moments
        assert moments is not None
        for a in range(0, 4, width):
            block = LogitsBlock(raw.to(device)[:, a : a + width], labels, None, PLAIN_HEAD, a, 4)
            backend.logits_stats(block, stats, merge=a > 0)
        entropy, truth = entropy_from(stats, moments), entropy_of(z)
        assert_as_exact(entropy[finite], truth[finite], truth[finite].to(acc), "entropy")
        assert truth[2].item() == math.log(2)
        collision = (moments.square_sum / stats.row_sum**2)[finite]
        truth_collision = torch.softmax(z, 1)[finite].square().sum(1)
        assert_as_exact(collision, truth_collision, truth_collision.to(acc), "sum of p^2")
        assert moments.max_before[finite].tolist() == [
            1.0, -torch.inf, raw[2, 1].item(), -torch.inf, -torch.inf, -torch.inf
        ]  # fmt: skip
        assert is_top1(stats, moments)[finite].tolist() == [True, True, False, True, True, False]
        assert entropy[6].isnan()
        assert moments.square_sum[6].isnan()
        assert stats.row_max[7] == -torch.inf
        assert stats.row_sum[7] == moments.centred_sum[7] == moments.square_sum[7] == 0

    scale = torch.linspace(-2, 3, len(raw), dtype=acc, device=device)
    factors = RowFactors(torch.zeros_like(scale), entropy, scale)
    log_sum = stats.row_sum.log()
    known = RowStats(stats.row_max, stats.row_sum, (stats.label_logit - stats.row_max) - log_sum)
    out = torch.full_like(raw, torch.nan, device=device)
    backend.residual_from_stats(LogitsBlock(raw.to(device), labels, None, PLAIN_HEAD), out, NLL, known, factors)
    log_p = torch.log_softmax(z, 1)
    expected = -torch.where(log_p == -torch.inf, 0, log_p.exp() * (log_p + truth[:, None])) * scale.cpu()[:, None]
    assert_as_exact(out[finite], expected[finite], expected[finite], "residual")
    assert out[6].isnan().all()


def check_label_rank(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    """Of equal maxima the first counts, as for argmax, in whichever blocks they lie."""
    vocab, maxima = 1003, (3, 500, 1002)
    generator = torch.Generator().manual_seed(11)
    labels = torch.tensor([0, 3, 4, 499, 500, 501, 1002, -1], device=device)
    raw = torch.randn(len(labels), vocab, generator=generator).clamp(max=3)
    raw[:, list(maxima)] = 4.3
    raw, bias = raw.to(dtype).to(device), torch.full((vocab,), 0.1, device=device).to(dtype)
    for head in (PLAIN_HEAD, HeadTransform(0.3, 7.0, 3.0), HeadTransform(1.7, None, 0.7)):
        for bounds in ((0, vocab), (0, 3, 400, vocab), (0, 4, vocab), (0, 501, 1002, vocab)):
            stats = empty_stats(len(labels), dtype, device)
            moments = stats.moments
            assert moments is not None
            for a, b in pairwise(bounds):
                block = LogitsBlock(raw[:, a:b], labels, bias[a:b].contiguous(), head, a, vocab)
                backend.logits_stats(block, stats, merge=a > 0)
            assert is_top1(stats, moments).tolist() == [label == maxima[0] for label in labels.tolist()]
            at_maximum = [label in maxima for label in labels.tolist()]
            assert torch.equal(stats.label_logit[at_maximum], stats.row_max[at_maximum])
            assert (stats.label_logit <= stats.row_max).all()
            assert moments.max_before[[0, -1]].tolist() == [-torch.inf] * 2


def _logits(data: RowData, dtype: torch.dtype) -> Tensor:
    bias = None if data.bias is None else data.bias.cpu().to(dtype)
    return expected_logits(data.raw.cpu().to(dtype), bias, data.case.head)


def _expected_gradient(
    data: RowData, dtype: torch.dtype, row_scale: Tensor | None, entropy_scale: Tensor
) -> Tensor:
    case, labels = data.case, data.labels.cpu()
    raw, bias = data.raw.cpu().to(dtype), None if data.bias is None else data.bias.cpu().to(dtype)
    gradient = expected_rows(raw, bias, labels, case.head, case.token_loss)["residual"]
    if row_scale is not None:
        gradient = gradient * row_scale.cpu().to(dtype)[:, None]
    leaf = raw.detach().clone().requires_grad_()
    entropy = entropy_of(expected_logits(leaf, bias, case.head))
    (entropy * entropy_scale.cpu().to(dtype) * (labels >= 0)).sum().backward()
    assert leaf.grad is not None
    return gradient + leaf.grad


def _gradient_slack(data: RowData, entropy_scale: Tensor) -> Tensor:
    """What roundings of the logits and of their largest do to each entry of the entropy's gradient."""
    z = _logits(data, torch.float64)
    log_p = torch.log_softmax(z, 1)
    size = log_p.exp() * (log_p.abs() + entropy_of(z)[:, None] + 1) * (1 + z.abs() + z.amax(1, keepdim=True).abs())
    factor = data.case.head.slope_bound * entropy_scale.cpu().double().abs()
    return 2 * torch.finfo(entropy_scale.dtype).eps * size * factor[:, None]
