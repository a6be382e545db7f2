"""The fused head product against float64: tails in M, V and D, shards, every head transform, both load paths.

The smallest tiles that still give several of each kind, since the interpreter runs programs one after another.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.triton_support import (
    DEVICE,
    assert_derived_match,
    exact_logits,
    exact_statistics,
    skip_unless_kernels_run,
)

skip_unless_kernels_run()

from slime_fused.triton_kernels import linear_stats as kernels  # noqa: E402
from slime_fused.triton_kernels.configs import LinearConfig  # noqa: E402

from slime_fused.backends.base import HeadTransform, LinearBlock, LogitsBlock, Moments, VocabStats  # noqa: E402
from slime_fused.backends.torch import TorchBackend  # noqa: E402
from slime_fused.backends.triton import TritonBackend  # noqa: E402

pytestmark = pytest.mark.gpu

STATISTICS = ("row_max", "row_sum", "label_logit", "logit_sum", "centred_sum", "square_sum", "max_before")
TILE = LinearConfig(16, 32, 16, group_m=2, num_warps=4, num_stages=2)


def make_problem(rows, cols, depth, dtype, *, has_bias):
    """Operands whose 16-bit products float32 holds exactly, in any order of summation: they round in one way."""
    torch.manual_seed(rows + cols + depth)
    hidden = torch.randn(rows, depth, device=DEVICE)
    weight = torch.randn(cols, depth, device=DEVICE).mul(2 / depth**0.5)
    if dtype != torch.float32:
        hidden, weight = hidden.mul(16).round().div(16), weight.mul(16).round().div(16)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    labels = torch.randint(0, cols, (rows,), device=DEVICE)
    labels[0], labels[1], labels[2] = 0, cols - 1, -100
    bias = torch.randn(cols, device=DEVICE).to(dtype) if has_bias else None
    return hidden, weight, labels, bias


def exact_stats(hidden, weight, labels, bias, head, col_offset=0, *, rounded=True):
    """(max, sum, label logit, sum of logits) in float64, of products rounded as stored ones are, or not."""
    product = hidden.double() @ weight.double().T
    product = product.to(hidden.dtype).double() if rounded else product
    out = [torch.empty(hidden.shape[0], dtype=torch.float64, device=hidden.device) for _ in range(4)]
    block = LogitsBlock(product, labels, None if bias is None else bias.double(), head, col_offset)
    TorchBackend().logits_stats(block, VocabStats(*out))
    return out


def run_tile(hidden, weight, labels, bias, head, config, col_offset=0, *, logit_sum=True):
    out = [torch.full((hidden.shape[0],), 7.0, device=hidden.device) for _ in range(3 + logit_sum)]
    shape = kernels.partial_shape(hidden.shape[0], weight.shape[0], config)
    partials = torch.full((2 + logit_sum, *shape), torch.nan, device=hidden.device)
    kernels.linear_stats(
        hidden,
        weight,
        labels,
        bias,
        *out[:3],
        out[3] if logit_sum else None,
        partials,
        scale=head.scale,
        softcap=head.softcap,
        col_offset=col_offset,
        config=config,
    )
    return out


def assert_stats_match(actual, exact, depth):
    """float32 sums of `depth` products: compare what is used, the log-sum-exp, the label's logit and the sum."""
    row_max, row_sum, label_logit, *logit_sum = (x.double() for x in actual)
    floor = 1e-6 * depth**0.5 + 1e-6
    torch.testing.assert_close(row_max + row_sum.log(), exact[0] + exact[1].log(), atol=floor, rtol=1e-6)
    torch.testing.assert_close(label_logit, exact[2], atol=floor, rtol=1e-6)
    if logit_sum:
        torch.testing.assert_close(logit_sum[0], exact[3], atol=30 * floor, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("uses_descriptors", [False, True])
@pytest.mark.parametrize(
    ("rows", "cols", "depth", "head", "has_bias"),
    [
        (32, 64, 32, HeadTransform(), False),
        (41, 75, 40, HeadTransform(scale=0.25, softcap=3.0), True),
        (5, 33, 24, HeadTransform(), True),
        (5, 33, 24, HeadTransform(scale=-0.7), True),
        (41, 75, 40, HeadTransform(scale=0.0), True),
    ],
)
def test_statistics_of_a_product(dtype, uses_descriptors, rows, cols, depth, head, has_bias):
    hidden, weight, labels, bias = make_problem(rows, cols, depth, dtype, has_bias=has_bias)
    config = replace(TILE, uses_descriptors=uses_descriptors)
    actual = run_tile(hidden, weight, labels, bias, head, config)
    assert_stats_match(actual, exact_stats(hidden, weight, labels, bias, head), depth)


@pytest.mark.parametrize(("depth", "uses_descriptors"), [(24, True), (21, False)])
def test_rows_that_descriptors_cannot_address_take_the_other_path(depth, uses_descriptors):
    """Rows of 48 and of 42 bytes, with what ships for an H100."""
    hidden, weight, labels, _ = make_problem(20, 50, depth, torch.bfloat16, has_bias=False)
    config = kernels.choose_config("sm90", hidden, weight)
    assert config.uses_descriptors == uses_descriptors
    actual = run_tile(hidden, weight, labels, None, HeadTransform(), config)
    assert_stats_match(actual, exact_stats(hidden, weight, labels, None, HeadTransform()), depth)


def test_the_sum_of_logits_changes_nothing_else():
    problem = make_problem(41, 75, 40, torch.bfloat16, has_bias=True)
    with_sum, without = (run_tile(*problem, HeadTransform(), TILE, logit_sum=on) for on in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(with_sum[:3], without, strict=True))


def run_moments(hidden, weight, labels, bias, head, config=TILE, col_offset=0):
    """Every statistic, in a scratch that begins as NaN."""
    out = {name: torch.full((hidden.shape[0],), 7.0, device=DEVICE) for name in STATISTICS}
    shape = kernels.partial_shape(hidden.shape[0], weight.shape[0], config)
    partials = torch.full((6, *shape), torch.nan, device=DEVICE)
    kernels.linear_stats(
        hidden,
        weight,
        labels,
        bias,
        **out,
        partials=partials,
        **vars(head),
        col_offset=col_offset,
        config=config,
    )
    return out


def expected_moments(hidden, weight, labels, bias, head, col_offset=0):
    """(float64, float32) statistics of products rounded as stored ones are."""
    product = (hidden.double() @ weight.double().T).to(hidden.dtype)
    return tuple(
        exact_statistics(
            exact_logits(product.to(wide), None if bias is None else bias.to(wide), head), labels, col_offset
        )
        for wide in (torch.float64, torch.float32)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("uses_descriptors", [False, True])
@pytest.mark.parametrize(
    ("head", "has_bias"),
    [
        (HeadTransform(), False),
        (HeadTransform(temperature=0.01), True),
        (HeadTransform(scale=-0.7, temperature=100.0), True),
        (HeadTransform(scale=0.0, temperature=2.0), True),
        (HeadTransform(scale=2.0, softcap=3.0, temperature=0.25), True),
    ],
)
def test_moments_and_temperature(dtype, uses_descriptors, head, has_bias):
    """Labels in each tile, first and last columns among them; a tile of -inf alone; a sum more or less."""
    hidden, weight, labels, bias = make_problem(41, 75, 40, dtype, has_bias=has_bias)
    if has_bias and head.scale > 0:
        bias[32:64] = -torch.inf
    config = replace(TILE, uses_descriptors=uses_descriptors)
    got = run_moments(hidden, weight, labels, bias, head, config)
    exact, plain = expected_moments(hidden, weight, labels, bias, head)
    floor = 2e-6 + (1e-5 / head.temperature if dtype == torch.float32 else 0.0)  # the order of the product's sums
    assert_derived_match(got, exact, plain, "moments", floor)
    if head == HeadTransform():
        fewer = run_tile(hidden, weight, labels, bias, HeadTransform(), config)
        for name, values in zip(STATISTICS[:4], fewer, strict=True):
            torch.testing.assert_close(got[name], values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("head", [HeadTransform(), HeadTransform(0.3, 5.0, 0.7)])
def test_the_label_at_the_maximum_has_the_bits_of_the_maximum(head):
    """And its equal before it is seen as such, in the same tile and in another."""
    hidden, weight, _, bias = make_problem(41, 75, 40, torch.bfloat16, has_bias=True)
    bias.zero_()
    z = exact_logits((hidden.double() @ weight.double().T).to(hidden.dtype).double(), None, head)
    first, rows = z.argmax(1), torch.arange(41, device=DEVICE)
    got = run_moments(hidden, weight, first, bias, head)
    assert torch.equal(got["label_logit"], got["row_max"])
    assert (got["label_logit"] > got["max_before"]).all()
    best = int(first[0])
    for copy in (0, 40, 74):
        if copy == best:
            continue
        doubled = weight.clone()
        doubled[copy] = weight[best]
        wins = (z[rows, best] == z.amax(1)).nonzero().squeeze(1)
        labels = torch.full((41,), copy, device=DEVICE)
        got = run_moments(hidden, doubled, labels, bias, head)
        assert torch.equal(got["label_logit"][wins], got["row_max"][wins])
        assert (got["label_logit"] > got["max_before"])[wins].tolist() == [copy < best] * len(wins)


def test_moments_of_nothing_but_minus_infinity():
    hidden, weight, labels, bias = make_problem(5, 75, 24, torch.bfloat16, has_bias=True)
    got = run_moments(hidden, weight, labels, torch.full_like(bias, -torch.inf), HeadTransform())
    assert (got["row_max"] == -torch.inf).all()
    assert all((got[name] == 0).all() for name in ("row_sum", "centred_sum", "square_sum"))


@pytest.mark.parametrize("family", ["sm90", "sm100"])
def test_moments_take_tiles_of_their_own(family, monkeypatch):
    """What ships for an H100 and a B200, through the backend."""
    monkeypatch.setattr("slime_fused.backends.triton._target_family", lambda device: family)
    configs, shape_of = [], kernels.partial_shape
    monkeypatch.setattr(kernels, "partial_shape", lambda *args: configs.append(args[2]) or shape_of(*args))
    hidden, weight, labels, _ = make_problem(20, 150, 24, torch.bfloat16, has_bias=False)
    out = torch.empty(7, 20, device=DEVICE).unbind()
    head = HeadTransform(temperature=2.0)
    TritonBackend().linear_stats(
        LinearBlock(hidden, weight, labels, None, head), VocabStats(*out[:4], Moments(*out[4:]))
    )
    exact, plain = expected_moments(hidden, weight, labels, None, head)
    assert_derived_match(dict(zip(STATISTICS, out, strict=True)), exact, plain, family)
    assert configs == [kernels.choose_config(family, hidden, weight, has_moments=True)]
    assert configs != [kernels.choose_config(family, hidden, weight)]


def test_shards_of_the_vocabulary():
    """Each shard's own statistics; a label of another shard counts 0 there, and all columns or none precede it."""
    hidden, weight, labels, _ = make_problem(20, 90, 32, torch.float32, has_bias=False)
    for begin, end in ((0, 40), (40, 90)):
        actual = run_tile(hidden, weight[begin:end], labels, None, HeadTransform(), TILE, col_offset=begin)
        assert_stats_match(actual, exact_stats(hidden, weight[begin:end], labels, None, HeadTransform(), begin), 32)
        problem = (hidden, weight[begin:end], labels, None, HeadTransform())
        moments = run_moments(*problem, col_offset=begin)
        assert_derived_match(moments, *expected_moments(*problem, begin), begin, floor=1e-5)


def test_the_same_inputs_give_the_same_bits():
    hidden, weight, labels, bias = make_problem(20, 90, 32, torch.bfloat16, has_bias=True)
    first, second = (run_tile(hidden, weight, labels, bias, HeadTransform(), TILE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backend_method(dtype):
    """The shipped tile sizes, through the backend, with and without the sum of logits; and no rows."""
    hidden, weight, labels, bias = make_problem(70, 300, 50, dtype, has_bias=True)
    head = HeadTransform(softcap=10.0)
    exact = exact_stats(hidden, weight, labels, bias, head)
    for count in (3, 4):
        out = torch.empty(count, 70, device=DEVICE).unbind()
        TritonBackend().linear_stats(LinearBlock(hidden, weight, labels, bias, head), VocabStats(*out))
        assert_stats_match(out, exact, 50)
    none = VocabStats(*torch.empty(3, 0, device=DEVICE).unbind())
    TritonBackend().linear_stats(LinearBlock(hidden[:0], weight, labels[:0], bias, head), none)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_for_float32_logits_are_not_rounded(dtype):
    """The bias is float32 then, as it is where logits are stored."""
    hidden, weight, labels, bias = make_problem(70, 300, 50, dtype, has_bias=True)
    hidden = (1.3 * hidden).to(dtype)  # as they are made, their products fit 16 bits
    wide_bias = bias.float() + 1e-4
    out = torch.empty(4, 70, device=DEVICE).unbind()
    block = LinearBlock(hidden, weight, labels, wide_bias, HeadTransform(), torch.float32)
    TritonBackend().linear_stats(block, VocabStats(*out))
    exact = exact_stats(hidden, weight, labels, wide_bias, HeadTransform(), rounded=False)
    assert_stats_match(out, exact, 50)
    of_rounded = exact_stats(hidden, weight, labels, wide_bias, HeadTransform())
    assert (of_rounded[2] - exact[2]).abs().max() > 1e-4


@pytest.mark.parametrize("cols", [1, 64, 300])
@pytest.mark.parametrize("family", ["small", "sm80", "sm90", "sm100", "hip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_is_at_most_what_is_declared(dtype, family, cols, monkeypatch):
    """For aligned rows, which may take another tile, and for others; moments are three more, and may, too."""
    monkeypatch.setattr("slime_fused.backends.triton._target_family", lambda device: family)
    for depth in (32, 21):
        hidden, weight, *_ = make_problem(7, cols, depth, dtype, has_bias=False)
        for has_moments, count in ((False, 3), (True, 6)):
            config = kernels.choose_config(family, hidden, weight, has_moments=has_moments)
            tiles, rows = kernels.partial_shape(7, cols, config)
            declared = TritonBackend().linear_stats_row_bytes(weight, with_moments=has_moments)
            assert 4 * count * tiles * rows <= 7 * declared
        assert TritonBackend().linear_stats_row_bytes(weight.T.contiguous().T) == 0 or cols == 1
