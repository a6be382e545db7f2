"""Temperature, the entropy's statistics and the entropy's gradient in the native CPU kernels, on every ISA.

Column counts lie around the vector width (16 floats on AVX-512, 4 on the baseline) and the 8-vector step of a
visit: one column, less than a step, one step with a tail, many with one. Heads cover each sign of the scale, both
ends of the temperature and the soft cap; what a caller's trainers log is compared as they derive it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slime_fused.backends.base import acc_dtype
from slime_fused.backends.native import _C, DTYPE_CODES, IMPORT_ERROR
from tests.native_rows import (
    DTYPES,
    HEADS,
    INF,
    MOMENTS,
    STATS,
    Head,
    address,
    assert_close,
    block_args,
    elementwise,
    moments,
    moments_of,
    plain_gradient,
    problem,
    residual_of,
    stats_of,
)

if _C is None:
    pytest.skip(IMPORT_ERROR, allow_module_level=True)

NAN = float("nan")


@pytest.fixture(params=_C.cpu.runnable_isas())
def isa(request):
    _C.cpu.use_isa(request.param)
    yield request.param
    _C.cpu.use_isa("")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 37, 131, 1003])
def test_statistics(isa, dtype, cols, head):
    logits, labels, bias = problem(cols, dtype, head)
    got = stats_of(logits, labels, bias, head)
    z, z_rounded = (head.logits(logits.to(d), bias) for d in (torch.float64, acc_dtype(dtype)))
    spread = z[z.isfinite()].abs().max()
    exact, rounded = moments(z), moments(z_rounded)
    for name, value in moments_of(got).items():
        assert_close(value, exact[name], rounded[name], name, spread)
    assert_close(got["row_max"], z.amax(1), z_rounded.amax(1), "row_max", spread)
    at_label = labels.clamp(min=0)[:, None]
    kept = labels >= 0
    assert_close(
        got["label_logit"][kept], z.gather(1, at_label)[kept, 0], z_rounded.gather(1, at_label)[kept, 0],
        "label_logit", spread,
    )  # fmt: skip
    plain = stats_of(logits, labels, bias, head, names=STATS[:3])
    assert all(torch.equal(plain[name], got[name]) for name in plain)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounds", [(0, 150), (0, 17, 101, 150)])
def test_the_top_logit_is_known_bit_for_bit(isa, dtype, bounds, head):
    """Coarse logits tie at the maximum; labels stand on the first, on a later, and beside the largest."""
    generator = torch.Generator().manual_seed(6)
    raw = torch.randn(64, bounds[-1], generator=generator)
    raw[::2] = (2 * raw[::2]).round()  # ties by equal logits
    raw[1::4] *= 40  # and where the soft cap saturates
    logits, bias = raw.to(dtype), head.bias(bounds[-1], dtype)
    z = elementwise(logits, bias, head)
    is_largest = z == z.amax(1, keepdim=True)
    first = is_largest.int().argmax(1)
    last = bounds[-1] - 1 - is_largest.flip(1).int().argmax(1)
    assert (first < last).any()
    for labels in (
        first,
        last,
        (first + 1) % bounds[-1],
        torch.randint(-1, bounds[-1], (64,), generator=generator),
    ):
        got = stats_of(logits, labels, bias, head, bounds=bounds)
        is_before = torch.arange(bounds[-1]) < labels[:, None]
        kept = labels >= 0
        assert torch.equal(got["row_max"], z.amax(1))
        assert torch.equal(got["label_logit"][kept], z.gather(1, labels.clamp(min=0)[:, None])[kept, 0])
        assert torch.equal(got["max_before"], z.masked_fill(~is_before, -INF).amax(1))
        is_top = (got["label_logit"] >= got["row_max"]) & (got["label_logit"] > got["max_before"])
        assert torch.equal(is_top[kept], (first == labels)[kept])


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_blocks_give_the_statistics_of_the_row(isa, dtype):
    """Blocks whose maxima rise, fall, and are all -inf: the earlier sums are rescaled, kept, or stay 0."""
    logits, labels, _ = problem(517, dtype, HEADS[0])
    logits[0, 201:] += 30  # rises by more than float32's exp has room for below 1 in square_sum
    logits[3, :17] = -INF
    logits[4, 17:] = -INF
    logits[4, :17] = torch.linspace(-1, 1, 17)
    logits[6, :201] += 60
    one = stats_of(logits, labels)
    several = stats_of(logits, labels, bounds=(0, 17, 201, 517))
    exact = moments(logits.double())
    for name, value in moments_of(several).items():
        assert_close(value, exact[name], moments_of(one)[name], name, 0)
    for name in ("row_max", "label_logit", "max_before"):
        assert torch.equal(several[name], one[name])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_count_as_one_each(isa, dtype, head):
    """z - row_max is 0 for the very number that is the maximum: no fused product may leave its rounding there."""
    logits = torch.randn(16, 1, generator=torch.Generator().manual_seed(4)).to(dtype).expand(-1, 203).contiguous()
    got = stats_of(logits, torch.full((16,), 202), None, head)
    assert (got["row_sum"] == 203).all()
    assert (got["centred_sum"] == 0).all()
    assert (got["square_sum"] == 203).all()
    assert torch.equal(got["max_before"], got["label_logit"])


@pytest.mark.parametrize("bounds", [(0, 200), (0, 64, 200)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_softmax(isa, dtype, bounds):
    logits = torch.linspace(-1, 1, 4 * 200).reshape(4, 200).to(dtype)
    logits[0] = -INF
    logits[1, 100] = NAN
    logits[2, 199] = INF
    got = stats_of(logits, torch.tensor([3, 3, 3, 3]), bounds=bounds)
    assert got["row_max"][0] == got["max_before"][0] == -INF
    assert got["row_sum"][0] == got["centred_sum"][0] == got["square_sum"][0] == 0
    for name in ("row_sum", "centred_sum", "square_sum"):
        assert got[name][1:3].isnan().all(), name
        assert got[name][3].isfinite(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bounds", [(0, 1500), (0, 500, 1500)])
def test_the_entropy_does_not_cancel_at_large_logits(isa, dtype, bounds):
    """At 5e4 a sum of exp * z would leave 5e4 roundings, 6e-3 in float32, of an entropy of about 7."""
    logits = 5e4 * torch.tensor([[1.0], [-1.0]]) + torch.rand(2, 1500, generator=torch.Generator().manual_seed(7))
    logits = logits.to(dtype)
    got, exact = moments_of(stats_of(logits, torch.tensor([5, 1499]), bounds=bounds)), moments(logits.double())
    for name in exact:
        np.testing.assert_allclose(got[name], exact[name], rtol=2e-6 if dtype != torch.float64 else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_any_number_of_threads(isa, dtype):
    logits = (torch.randn(77, 5003, generator=torch.Generator().manual_seed(2)) * 4).to(dtype)
    labels = torch.randint(-1, 5003, (77,), generator=torch.Generator().manual_seed(3))
    one, five = (stats_of(logits, labels, threads=count) for count in (1, 5))
    assert all(torch.equal(one[name], five[name]) for name in one)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [*zip(DTYPES, DTYPES, strict=True), (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize(("cols", "bounds"), [(1, None), (131, None), (1003, (0, 200, 1003))])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_residual(isa, dtype, out_dtype, cols, bounds, head, with_entropy):
    """Losses with smoothing and z-loss where no logit is masked, which makes both infinite."""
    acc = acc_dtype(dtype)
    for eps, z_loss in ((0.0, 0.0), (0.1, 1e-3)):
        logits, labels, bias = problem(cols, dtype, head, masked=not eps)
        generator = torch.Generator().manual_seed(8)
        row_scale, entropy_scale = (torch.randn(2, len(labels), generator=generator) + 0.5).to(acc)
        stats = stats_of(logits, labels, bias, head)
        factors = {"row_scale": row_scale}
        if with_entropy:
            factors |= {"entropy": moments_of(stats)["entropy"], "entropy_scale": entropy_scale}
        out = torch.full((len(labels), cols), 7.0, dtype=out_dtype)
        got = residual_of(
            logits, labels, bias, head, stats, out=out, eps=eps, z_loss=z_loss, bounds=bounds, **factors
        )
        exact, rounded = (
            plain_gradient(
                logits, labels, bias, head, eps, z_loss, row_scale, entropy_scale if with_entropy else None, d
            )
            for d in (torch.float64, acc)
        )
        # The derivative multiplies every error of the softmax by scale / temperature.
        z = head.logits(logits.double(), bias)
        spread = (1 + z[z.isfinite()].abs().max()) * max(1.0, abs(head.scale) / head.temperature)
        assert_close(got, exact, rounded, f"residual, eps {eps}", spread)
        assert (got[5] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_entropy_alone(isa, dtype):
    """Without a loss: of rows whose gradient is 0 (one possible token, all equally likely), of a masked label."""
    logits = torch.full((4, 200), -INF, dtype=dtype)
    logits[0, 50] = 2.0
    logits[1] = 3.0
    logits[2:] = torch.linspace(-2, 2, 200)
    logits[3, 7] = -INF
    labels = torch.tensor([50, 7, 7, 7])
    stats, acc = stats_of(logits, labels), acc_dtype(dtype)
    given = {
        "row_scale": torch.zeros(4, dtype=acc),
        "entropy": moments_of(stats)["entropy"],
        "entropy_scale": torch.ones(4, dtype=acc),
    }
    got = residual_of(logits, labels, None, HEADS[0], stats, out=torch.empty_like(logits), **given)
    exact = plain_gradient(
        logits, labels, None, HEADS[0], 0, 0, given["row_scale"], given["entropy_scale"], torch.float64
    )
    floor = 8 * torch.finfo(acc).eps * 8 / 200 + torch.finfo(dtype).eps * exact.abs()
    assert (got[0] == 0).all()
    assert ((got.double() - exact).abs() <= floor).all()
    assert exact[2].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", [Head(2.0, 0.0, 0.3), Head(2.0, 8.0, 0.3, has_bias=True)])
def test_softmax_residual_takes_a_temperature(isa, dtype, head):
    """As the residual from statistics, which are tested above: both read the same rows in the same way."""
    logits, labels, bias = problem(300, dtype, head, masked=False)
    acc, rows = acc_dtype(dtype), len(labels)
    row_max, row_sum, logp, loss = (torch.full((rows,), 7.0, dtype=acc) for _ in range(4))
    out = torch.full((rows, 300), 7.0, dtype=dtype)
    _C.cpu.softmax_residual(
        **block_args(logits, labels, bias, head, 1), out=address(out), out_stride=300, out_dtype=DTYPE_CODES[dtype],
        label_smoothing=0.1, z_loss=1e-3, row_max=address(row_max), row_sum=address(row_sum), logp=address(logp),
        loss=address(loss),
    )  # fmt: skip
    stats = stats_of(logits, labels, bias, head)
    kept = labels >= 0
    assert torch.equal(row_max[kept], stats["row_max"][kept])
    assert torch.equal(row_sum[kept], stats["row_sum"][kept])
    expected = residual_of(logits, labels, bias, head, stats, out=torch.empty_like(out), eps=0.1, z_loss=1e-3)
    np.testing.assert_allclose(
        out.double(), expected.double(), rtol=4 * torch.finfo(dtype).eps, atol=32 * torch.finfo(acc).eps
    )


def test_a_temperature_without_a_soft_cap_is_a_scale(isa):
    logits, labels, bias = problem(300, torch.float32, Head(has_bias=True))
    cooled, scaled = Head(1.5, 0.0, 0.5, has_bias=True), Head(3.0, has_bias=True)
    stats = stats_of(logits, labels, bias, cooled)
    assert all(torch.equal(value, stats[name]) for name, value in stats_of(logits, labels, bias, scaled).items())
    one, other = (
        residual_of(logits, labels, bias, head, stats, out=torch.empty(logits.shape)) for head in (cooled, scaled)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, INF])
def test_a_temperature_that_is_no_positive_number_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0, got"):
        stats_of(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), None, Head(temperature=temperature))


@pytest.mark.parametrize("missing", MOMENTS)
def test_some_of_the_statistics_without_the_others_are_refused(missing):
    names = [name for name in STATS if name != missing]
    with pytest.raises(ValueError, match=f"{missing}: expected a buffer, got a null pointer"):
        stats_of(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), names=names)


@pytest.mark.parametrize(("given", "missing"), [("entropy", "entropy_scale"), ("entropy_scale", "entropy")])
def test_an_entropy_without_its_scale_is_refused(given, missing):
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    stats, out = stats_of(logits, labels), torch.full((2, 3), 7.0)
    with pytest.raises(ValueError, match=f"{missing}: expected a buffer, got a null pointer"):
        residual_of(logits, labels, None, HEADS[0], stats, out=out, **{given: torch.ones(2)})
    assert (out == 7).all()
