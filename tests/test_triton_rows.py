"""The Triton row kernels against the float64 oracle, over everything their launch can vary.

Sizes: one column, a tail inside one block, and one tail after whole blocks (a block is at most 8192 columns).
Tolerance: twice the error of the plain PyTorch backend in the same dtype, plus a few float32 roundings.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.triton_support import DEVICE, INTERPRETING, skip_unless_kernels_run

skip_unless_kernels_run()

from slime_fused.backends.base import (  # noqa: E402
    HeadTransform,
    LogitsBlock,
    RowFactors,
    RowStats,
    TokenLoss,
    TokenStats,
    VocabStats,
)
from slime_fused.backends.torch import TorchBackend  # noqa: E402
from slime_fused.backends.triton import TritonBackend  # noqa: E402

pytestmark = pytest.mark.gpu

TRITON = TritonBackend()
PLAIN = TorchBackend()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN_HEAD, CAPPED_HEAD = HeadTransform(), HeadTransform(scale=0.5, softcap=30.0)
NLL, FULL_LOSS = TokenLoss(), TokenLoss(label_smoothing=0.1, z_loss=1e-3)
WIDTHS = [1, 1000, 20011]


def make_logits(rows, cols, dtype, *, pitch=None):
    torch.manual_seed(rows * 1000 + cols)
    storage = torch.randn(rows, pitch or cols, device=DEVICE).mul(4).to(dtype)
    return storage[:, :cols]


def make_labels(rows, cols):
    labels = torch.randint(0, cols, (rows,), device=DEVICE)
    labels[0], labels[1], labels[2] = 0, cols - 1, -100
    return labels


def assert_as_close_as(actual, plain, exact, floor=2e-6):
    error = (actual.double() - exact).abs().max()
    plain_error = (plain.double() - exact).abs().max()
    limit = 2 * plain_error + floor * max(1.0, exact.abs().max().item())
    assert error <= limit, f"error {error:.2e}, plain PyTorch {plain_error:.2e}, limit {limit:.2e}"


def residual_of(backend, logits, labels, bias, head, token_loss, *, in_place=False):
    rows, acc = logits.shape[0], torch.float64 if logits.dtype == torch.float64 else torch.float32
    out = logits if in_place else torch.full_like(logits, 7)
    stats = TokenStats(*(torch.full((rows,), 7.0, dtype=acc, device=logits.device) for _ in range(4)))
    backend.softmax_residual(LogitsBlock(logits, labels, bias, head), out, token_loss, stats)
    return out, stats.row_max + stats.row_sum.log(), stats.logp, stats.loss


def stats_of(backend, logits, labels, bias, head, *, splits=(), want_sum=True):
    """Statistics merged over column blocks that begin at 0 and at each of `splits`."""
    rows, cols = logits.shape
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    results = [torch.full((rows,), 7.0, dtype=acc, device=logits.device) for _ in range(4)]
    stats = VocabStats(*results[: 3 + want_sum])
    bounds = [0, *splits, cols]
    for begin, end in pairwise(bounds):
        part = None if bias is None else bias[begin:end]
        backend.logits_stats(LogitsBlock(logits[:, begin:end], labels, part, head, begin), stats, merge=begin > 0)
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize(
    ("head", "token_loss", "has_bias", "in_place"),
    [(PLAIN_HEAD, NLL, False, True), (CAPPED_HEAD, FULL_LOSS, True, False), (CAPPED_HEAD, NLL, False, False)],
)
def test_softmax_residual(dtype, cols, head, token_loss, has_bias, in_place):
    logits, labels = make_logits(5, cols, dtype), make_labels(5, cols)
    bias = torch.randn(cols, device=DEVICE).to(dtype) if has_bias else None
    exact = residual_of(PLAIN, logits.double(), labels, None if bias is None else bias.double(), head, token_loss)
    plain = residual_of(PLAIN, logits, labels, bias, head, token_loss)
    actual = residual_of(TRITON, logits, labels, bias, head, token_loss, in_place=in_place)
    for got, want, truth in zip(actual, plain, exact, strict=True):
        assert_as_close_as(got, want, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_label_entry_does_not_cancel(dtype):
    """Labels of p = 0.999, 0.988 and 0.07: a bfloat16 p - 1 would lose all of the first."""
    logits = torch.zeros(3, 100, device=DEVICE, dtype=dtype)
    logits[:, 7] = torch.tensor([11.5, 9.0, 2.0], device=DEVICE)
    labels = torch.full((3,), 7, device=DEVICE)
    exact = residual_of(PLAIN, logits.double(), labels, None, PLAIN_HEAD, NLL)[0][:, 7]
    actual = residual_of(TRITON, logits, labels, None, PLAIN_HEAD, NLL)[0][:, 7]
    sum_rounding = 1e-6 / exact.abs()  # of 100 float32 exponentials that add up to about 1
    assert (((actual - exact) / exact).abs() <= torch.finfo(dtype).eps + sum_rounding).all()


def test_padded_rows_and_ignored_rows_leave_the_padding_alone():
    storage = torch.full((4, 1024), 5.0, device=DEVICE)
    labels = torch.tensor([3, -1, 999, -100], device=DEVICE)
    before = storage.clone()
    residual_of(TRITON, storage[:, :1000], labels, None, PLAIN_HEAD, NLL, in_place=True)
    assert torch.equal(storage[:, 1000:], before[:, 1000:])
    assert storage[1, :1000].abs().max() == 0
    torch.testing.assert_close(storage[0, :1000].sum().item(), 0.0, atol=1e-5, rtol=0)


def test_minus_infinity_is_a_logit():
    """Masked tokens: whole leading blocks of -inf, a -inf label, and a shard with nothing else."""
    logits = make_logits(3, 20011, torch.float32)
    logits[:, :9000] = -torch.inf
    labels = torch.tensor([12000, 10, 20010], device=DEVICE)
    exact = residual_of(PLAIN, logits.double(), labels, None, PLAIN_HEAD, NLL)
    actual = residual_of(TRITON, logits, labels, None, PLAIN_HEAD, NLL)
    assert torch.isfinite(actual[0]).all()
    assert actual[2][1] == -torch.inf
    assert actual[0][1, 10] == -1
    for got, truth in zip(actual, exact, strict=True):
        torch.testing.assert_close(got.double(), truth, atol=2e-6, rtol=2e-6)
    row_max, row_sum, _, _ = stats_of(TRITON, logits, labels, None, PLAIN_HEAD, splits=(9000,), want_sum=False)
    torch.testing.assert_close((row_max + row_sum.log()).double(), exact[1], atol=2e-6, rtol=2e-6)
    shard_max, shard_sum, _, _ = stats_of(TRITON, logits[:, :9000], labels, None, PLAIN_HEAD, want_sum=False)
    assert (shard_max == -torch.inf).all()
    assert (shard_sum == 0).all()


def test_nan_reaches_the_statistics():
    logits = make_logits(3, 1000, torch.float32)
    logits[1, 500] = torch.nan
    _, lse, _, loss = residual_of(TRITON, logits, torch.tensor([1, 2, 3], device=DEVICE), None, PLAIN_HEAD, NLL)
    assert torch.isnan(lse).tolist() == [False, True, False]
    assert torch.isnan(loss).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head", "has_bias"), [(PLAIN_HEAD, False), (CAPPED_HEAD, True)])
@pytest.mark.parametrize("splits", [(), (1, 777, 9000)])
def test_logits_stats_merge(dtype, head, has_bias, splits):
    cols = 20011
    logits, labels = make_logits(4, cols, dtype, pitch=20016), make_labels(4, cols)
    bias = torch.randn(cols, device=DEVICE).to(dtype) if has_bias else None
    exact = stats_of(PLAIN, logits.double(), labels, None if bias is None else bias.double(), head)
    plain = stats_of(PLAIN, logits, labels, bias, head, splits=splits)
    actual = stats_of(TRITON, logits, labels, bias, head, splits=splits)
    for got, want, truth in zip(actual, plain, exact, strict=True):
        assert_as_close_as(got, want, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head", "token_loss", "has_bias", "has_scale"),
    [(PLAIN_HEAD, NLL, False, False), (CAPPED_HEAD, FULL_LOSS, True, True)],
)
def test_residual_from_stats(dtype, head, token_loss, has_bias, has_scale):
    """Two shards of the vocabulary, in place, against the residual of the whole row."""
    cols, split = 10011, 5008
    logits, labels = make_logits(5, cols, dtype), make_labels(5, cols)
    labels[3], labels[4] = split, split - 1
    bias = torch.randn(cols, device=DEVICE).to(dtype) if has_bias else None
    scale = torch.randn(5, device=DEVICE) if has_scale else torch.ones(5, device=DEVICE)
    wide_bias = None if bias is None else bias.double()
    exact, _, logp, _ = residual_of(PLAIN, logits.double(), labels, wide_bias, head, token_loss)
    row_max, row_sum, _, _ = stats_of(PLAIN, logits.double(), labels, wide_bias, head)
    plain, _, _, _ = residual_of(PLAIN, logits, labels, bias, head, token_loss)
    known, factors = (
        RowStats(row_max.float(), row_sum.float(), logp.float()),
        RowFactors(scale if has_scale else None),
    )
    for begin, end in ((0, split), (split, cols)):
        part = None if bias is None else bias[begin:end]
        block = LogitsBlock(logits[:, begin:end], labels, part, head, begin, cols)
        TRITON.residual_from_stats(block, block.logits, token_loss, known, factors)
    assert_as_close_as(logits, plain * scale[:, None].to(dtype), exact * scale[:, None].double())


def test_no_rows():
    logits, labels = make_logits(5, 8, torch.float32)[:0], torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert residual_of(TRITON, logits, labels, None, PLAIN_HEAD, NLL)[0].shape == (0, 8)
    assert stats_of(TRITON, logits, labels, None, PLAIN_HEAD)[0].shape == (0,)


@pytest.mark.skipif(not INTERPRETING, reason="a device assertion would end this process's CUDA context")
def test_label_beyond_the_vocabulary_is_reported():
    logits = make_logits(3, 10, torch.float32)
    with pytest.raises(ValueError, match=r"labels: expected values below 10, got 10 at row 1"):
        residual_of(TRITON, logits, torch.tensor([3, 10, 9]), None, PLAIN_HEAD, NLL)
