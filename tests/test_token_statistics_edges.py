"""Token statistics of logits that are hard: equal, infinite, huge, all the same, under any transform and dtype."""

from __future__ import annotations

from dataclasses import replace
from math import log

import pytest
import torch

import slime_fused as sf
from slime_fused import reference
from tests.statistics_support import (
    assert_as_exact,
    workspace_of,
)
from tests.support import BACKENDS, DTYPES, Batch, make_batch, require_backend


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


def exact_batch(logits: list[list[float]], labels: list[int], dtype: torch.dtype) -> Batch:
    """Logits that no product rounds, where the dtype holds them: row n is column n of the weight."""
    values = torch.tensor(logits, dtype=torch.float64)
    return Batch(torch.eye(len(logits), dtype=dtype), values.t().contiguous().to(dtype), torch.tensor(labels))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_first_of_equal_maxima_is_the_likeliest(dtype, backend):
    logits = [[1.0, 7.0, 7.0, 0.0]] * 4 + [[2.0, 2.0, 2.0, 2.0]] * 2 + [[-1.0, -2.0, -1.0, -3.0]]
    batch = exact_batch(logits, [1, 2, 0, -100, 0, 3, 2], dtype)
    for options in ({}, {"logit_scale": 0.3, "logit_softcap": 5.0, "temperature": 3.0}):
        out = batch.call(sf.linear_logprobs, return_stats=["is_top1"], backend=backend, **options)
        assert out.is_top1.tolist() == [True, False, False, False, True, False, False]
    negative = batch.call(sf.linear_logprobs, return_stats=["is_top1"], backend=backend, logit_scale=-1.0)
    assert negative.is_top1.tolist() == [False, False, False, False, True, False, False]


@pytest.mark.parametrize("rows", [1000, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_tokens_of_no_probability(dtype, rows, backend):
    """p log p is 0 where a bias of -inf makes p 0: values and gradients as with the others alone."""
    batch = make_batch((4, 3, 5), dtype=dtype)
    is_out = torch.arange(37) % 3 == 1
    labels = torch.where(batch.labels % 3 == 1, batch.labels - 1, batch.labels).where(batch.labels >= 0, -100)
    bias = torch.zeros(37, dtype=dtype).masked_fill(is_out, -torch.inf)
    masked = replace(batch, labels=labels, bias=bias)
    wanted = ("hidden", "weight")
    names = ("entropy", "sum_sq_probs", "is_top1", "lse")
    workspace = workspace_of(rows, masked)
    got = assert_as_exact(masked, wanted=wanted, statistics=names, backend=backend, workspace=workspace)
    assert (got.grads["weight"][is_out] == 0).all()
    told = masked.call(sf.linear_logprobs, return_stats=["mean_logit"], backend=backend).mean_logit
    assert (told[labels >= 0] == -torch.inf).all()


def test_a_row_of_nothing(backend):
    """All logits -inf: not a number, as in PyTorch, and log-sum-exp of nothing is -inf."""
    batch = replace(make_batch((2, 1)), bias=torch.full((37,), -torch.inf, dtype=torch.float64))
    got, plain = (
        batch.call(f, return_stats=["lse", "entropy"], **how)
        for f, how in ((sf.linear_logprobs, {"backend": backend}), (reference.linear_logprobs, {}))
    )
    assert torch.equal(got.lse, plain.lse)
    assert got.entropy.isnan().sum() == got.logps.isnan().sum() == plain.entropy.isnan().sum() == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_logits_of_fifty_thousand(dtype, backend):
    """Sums of e^z z would cancel; nothing is lost where they are formed from differences to the maximum."""
    high = 49152.0  # whose neighbours in bfloat16 are 256 apart
    logits = [
        [high, high, high, high - 256],
        [high - 256, high, -high, 0.0],
        [-high, -high, -high, -high],
        [high, -high, 0.0, 1.0],
        [high, high - 1, high - 3, high - 4],
    ]
    batch = exact_batch(logits, [0, 0, 1, 0, 1], dtype)
    # In 16 bits the last row's logits are equal, and all that is left of a gradient is rounding.
    wanted = ("hidden", "weight") if dtype.itemsize > 2 else ()
    got = assert_as_exact(batch, wanted=wanted, backend=backend)
    entropy = got.outputs["entropy"].double()
    expected = torch.tensor([log(3), 0.0, log(4), 0.0], dtype=torch.float64)
    torch.testing.assert_close(entropy[:4], expected, rtol=1e-6, atol=1e-6)
    assert 0.7 < entropy[4] < log(4) + 1e-6


HARD = {
    "cold": {"temperature": 0.01},
    "hot": {"temperature": 100.0, "logit_softcap": 3.0},
    "zero": {"logit_scale": 0.0},
    "negative": {"logit_scale": -0.7, "logit_softcap": 5.0},
}


@pytest.mark.parametrize("rows", [1000, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", HARD)
def test_transforms_at_their_ends(case, dtype, rows, backend):
    """Logits a hundred times as large or as small; all the same; in the other order."""
    batch = make_batch((4, 3, 5), dtype=dtype, has_bias=True)
    # A logit rounded to float16 is one of 200 here: a cold softmax decides by its last bits.
    roundings = 200 if case == "cold" else 2
    got = assert_as_exact(
        batch, options=HARD[case], roundings=roundings, backend=backend, workspace=workspace_of(rows, batch)
    )
    if case == "zero":
        assert all((grad == 0).all() for grad in got.grads.values())
        labelled = batch.labels >= 0
        expected = torch.full((12,), log(37), dtype=torch.float64)
        torch.testing.assert_close(got.outputs["entropy"][labelled].double(), expected, rtol=1e-6, atol=0)
        assert torch.equal(got.outputs["is_top1"], batch.labels == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_one_column(dtype, backend):
    got = assert_as_exact(make_batch((4, 3), vocab_size=1, dtype=dtype, has_bias=True), backend=backend)
    assert all((grad == 0).all() for grad in got.grads.values())
    assert got.outputs["is_top1"].sum() == 7
