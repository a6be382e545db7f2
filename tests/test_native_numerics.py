"""The vector arithmetic of the native CPU kernels: exp, tanh and the 16-bit conversions, swept on every ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slime_fused.backends.base import (
    HeadTransform,
    LogitsBlock,
    RowFactors,
    RowStats,
    TokenLoss,
    VocabStats,
    acc_dtype,
)
from slime_fused.backends.cpu import CpuBackend
from slime_fused.backends.native import _C

BACKEND = CpuBackend()
if not BACKEND.available()[0]:
    pytest.skip(BACKEND.available()[1], allow_module_level=True)

PLAIN_HEAD, PLAIN_LOSS = HeadTransform(), TokenLoss()
INF = float("inf")


@pytest.fixture(params=_C.cpu.runnable_isas())
def isa(request):
    _C.cpu.use_isa(request.param)
    yield request.param
    _C.cpu.use_isa("")


def exp_of(x, out_dtype):
    """exp(x) of a flat tensor by way of the residual of a block that holds no label, with the statistics (0, 1)."""
    cols = 64
    logits = torch.nn.functional.pad(x, (0, -len(x) % cols)).reshape(-1, cols)
    rows = logits.shape[0]
    zeros = torch.zeros(rows, dtype=acc_dtype(x.dtype))
    out = torch.empty_like(logits)
    block = LogitsBlock(logits, torch.full((rows,), cols), None, PLAIN_HEAD, vocab_size=cols + 1)
    BACKEND.residual_from_stats(block, out, PLAIN_LOSS, RowStats(zeros, torch.ones_like(zeros), zeros))
    return out.flatten()[: len(x)].to(out_dtype)


@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -87.0), (torch.float64, -708.0)])
def test_exp_is_within_two_ulp_and_vanishes_below(isa, dtype, lowest):
    x = torch.cat([torch.linspace(lowest, 0, 200_001, dtype=dtype), -torch.logspace(-12, 0, 2001, dtype=dtype)])
    exact = np.exp(x.numpy().astype(np.longdouble))
    error = np.abs(exp_of(x, dtype).numpy().astype(np.longdouble) - exact)
    ulps = error / np.spacing(exact.astype(x.numpy().dtype))
    assert ulps.max() <= 2, f"{ulps.max():.2f} ulp at {x[int(ulps.argmax())]:.9g}"
    below = exp_of(torch.tensor([lowest - 1.5, -1e4, -1e30, -INF], dtype=dtype), dtype)
    assert (below == 0).all()
    assert exp_of(torch.tensor([float("nan")], dtype=dtype), dtype).isnan().all()


def stats_of_single_columns(x, softcap):
    """z of a flat tensor of logits: the row maximum of rows of one column."""
    stats = VocabStats(*(torch.empty(len(x), dtype=acc_dtype(x.dtype)) for _ in range(3)))
    labels = torch.zeros(len(x), dtype=torch.int64)
    BACKEND.logits_stats(LogitsBlock(x[:, None], labels, None, HeadTransform(1.0, softcap)), stats)
    assert torch.equal(stats.label_logit, stats.row_max)
    return stats.row_max


def test_tanh_is_within_three_ulp(isa):
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.logspace(-30, 1, 2001), torch.tensor([INF, -INF])])
    exact = np.tanh(x.double().numpy())
    ulps = np.abs(stats_of_single_columns(x, 1.0).double().numpy() - exact) / np.spacing(
        np.abs(exact).astype(np.float32)
    )
    assert ulps.max() <= 3, f"{ulps.max():.2f} ulp at {x[int(ulps.argmax())]:.9g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_numbers_load_exactly(isa, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[~x.isnan()]
    assert torch.equal(stats_of_single_columns(x, None), x.float())


@pytest.mark.parametrize("cols", [3, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stores_round_to_nearest_even(isa, dtype, cols):
    """Masked columns get -eps / V * scale * row_scale; powers of two make that exactly -row_scale."""
    bits = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(4))
    values = torch.cat([
        bits.to(torch.int32).view(torch.float32),
        torch.linspace(-1, 1, 4001) * 2.0**-13,  # subnormal f16, with ties
        torch.arange(2040, 2060) / 1024 * 65504 / 2,  # about the largest f16
        torch.tensor([0.0, 65504, 65519.996, 65520, 1 + 2.0**-9, 1 + 3 * 2.0**-9, 1 + 2.0**-12, 2.0**-25]),
    ])  # fmt: skip
    values = values[~(values.abs() >= 2.0**120)]  # scale * row_scale must not overflow
    rows = len(values)
    logits = torch.full((rows, cols), -INF, dtype=dtype)
    zeros = torch.zeros(rows)
    block = LogitsBlock(logits, torch.full((rows,), 100), None, HeadTransform(128.0), vocab_size=128)
    stats = RowStats(zeros, torch.ones_like(zeros), zeros)
    BACKEND.residual_from_stats(block, logits, TokenLoss(1.0), stats, RowFactors(values))
    expected = (-values).to(dtype)
    nan = expected.isnan()
    assert nan.any()
    assert logits[nan].isnan().all()
    assert torch.equal(logits[~nan], expected[~nan][:, None].expand(-1, cols))
