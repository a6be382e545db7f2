"""Temperature, the moments of a row and the entropy's gradient in the native CPU kernels, on every ISA.

The grid of the backends runs on the widest instruction set; here are all of them, with column counts around the
vector width (16 floats on AVX-512, 4 on the baseline) and the 8-vector step of a visit (one column, less than a
step, one step with a tail, many with one), and what must hold bit for bit.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slime_fused.backends.base import (
    HeadTransform,
    LogitsBlock,
    RowFactors,
    TokenLoss,
    TokenStats,
    VocabStats,
    acc_dtype,
)
from slime_fused.backends.native import _C, DTYPE_CODES
from tests.native_rows import (
    BACKEND,
    HEADS,
    INF,
    assert_close,
    elementwise,
    logits_of,
    make_bias,
    make_block,
    moments_from,
    moments_of,
    numbers_of,
    plain_gradient,
    residual_of,
    stats_of,
)

if not BACKEND.available()[0]:
    pytest.skip(BACKEND.available()[1], allow_module_level=True)

DTYPES = tuple(DTYPE_CODES)
RESIDUAL_DTYPES = [*zip(DTYPES, DTYPES, strict=True), (torch.float32, torch.bfloat16)]
NAN = float("nan")
PLAIN_HEAD = HeadTransform()


@pytest.fixture(params=_C.cpu.runnable_isas())
def isa(request):
    _C.cpu.use_isa(request.param)
    yield request.param
    _C.cpu.use_isa("")


@pytest.mark.parametrize(("head", "has_bias"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 37, 131, 1003])
def test_statistics(isa, dtype, cols, head, has_bias):
    block = make_block(cols, dtype, head, has_bias)
    stats = stats_of(block)
    z, z_rounded = (logits_of(block, d) for d in (torch.float64, acc_dtype(dtype)))
    spread = z[z.isfinite()].abs().max()
    exact, rounded = moments_of(z), moments_of(z_rounded)
    for name, value in moments_from(stats).items():
        assert_close(value, exact[name], rounded[name], name, spread)
    assert_close(stats.row_max, z.amax(1), z_rounded.amax(1), "row_max", spread)
    kept, at_label = block.labels >= 0, block.labels.clamp(min=0)[:, None]
    at_labels = [x.gather(1, at_label)[kept, 0] for x in (z, z_rounded)]
    assert_close(stats.label_logit[kept], *at_labels, "label_logit", spread)

    without_moments = VocabStats(*(torch.full_like(stats.row_max, 7.0) for _ in range(3)))
    BACKEND.logits_stats(block, without_moments)
    for name in ("row_max", "row_sum", "label_logit"):
        assert torch.equal(getattr(without_moments, name), getattr(stats, name))


@pytest.mark.parametrize(("head", "has_bias"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounds", [(0, 150), (0, 17, 101, 150)])
def test_the_top_logit_is_known_bit_for_bit(isa, dtype, bounds, head, has_bias):
    """Coarse logits tie at the maximum; labels stand on the first, on a later, and beside the largest."""
    cols = bounds[-1]
    generator = torch.Generator().manual_seed(6)
    raw = torch.randn(64, cols, generator=generator)
    raw[::2] = (2 * raw[::2]).round()  # ties by equal logits
    raw[1::4] *= 40  # and where the soft cap saturates
    logits, bias = raw.to(dtype), make_bias(cols, dtype) if has_bias else None
    z = elementwise(LogitsBlock(logits, torch.full((64,), -1), bias, head))
    is_largest = z == z.amax(1, keepdim=True)
    first = is_largest.int().argmax(1)
    last = cols - 1 - is_largest.flip(1).int().argmax(1)
    assert (first < last).any()
    for labels in (first, last, (first + 1) % cols, torch.randint(-1, cols, (64,), generator=generator)):
        stats = stats_of(LogitsBlock(logits, labels, bias, head), bounds)
        is_before, kept = torch.arange(cols) < labels[:, None], labels >= 0
        assert torch.equal(stats.row_max, z.amax(1))
        assert torch.equal(stats.label_logit[kept], z.gather(1, labels.clamp(min=0)[:, None])[kept, 0])
        assert torch.equal(stats.moments.max_before, z.masked_fill(~is_before, -INF).amax(1))
        is_top = (stats.label_logit >= stats.row_max) & (stats.label_logit > stats.moments.max_before)
        assert torch.equal(is_top[kept], (first == labels)[kept])


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_blocks_give_the_statistics_of_the_row(isa, dtype):
    """Blocks whose maxima rise, fall, and are all -inf: the earlier sums are rescaled, kept, or stay 0."""
    block = make_block(517, dtype, PLAIN_HEAD, False)
    logits = block.logits
    logits[0, 201:] += 30
    logits[3, :17] = -INF
    logits[4, 17:] = -INF
    logits[4, :17] = torch.linspace(-1, 1, 17)
    logits[6, :201] += 60
    one, several = stats_of(block), stats_of(block, (0, 17, 201, 517))
    exact, from_one = moments_of(logits.double()), moments_from(one)
    for name, value in moments_from(several).items():
        assert_close(value, exact[name], from_one[name], name, 0)
    numbers, expected = numbers_of(several), numbers_of(one)
    for name in ("row_max", "label_logit", "max_before"):
        assert torch.equal(numbers[name], expected[name])


@pytest.mark.parametrize(("head", "has_bias"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_count_as_one_each(isa, dtype, head, has_bias):
    """z - row_max is 0 for the very number that is the maximum: no fused product may leave its rounding there."""
    logits = torch.randn(16, 1, generator=torch.Generator().manual_seed(4)).to(dtype).expand(-1, 203).contiguous()
    bias = torch.full((203,), 0.3, dtype=dtype) if has_bias else None
    stats = stats_of(LogitsBlock(logits, torch.full((16,), 202), bias, head))
    assert (stats.row_sum == 203).all()
    assert (stats.moments.centred_sum == 0).all()
    assert (stats.moments.square_sum == 203).all()
    assert torch.equal(stats.moments.max_before, stats.label_logit)


@pytest.mark.parametrize("bounds", [(0, 200), (0, 64, 200)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_softmax(isa, dtype, bounds):
    logits = torch.linspace(-1, 1, 4 * 200).reshape(4, 200).to(dtype)
    logits[0] = -INF
    logits[1, 100] = NAN
    logits[2, 199] = INF
    numbers = numbers_of(stats_of(LogitsBlock(logits, torch.full((4,), 3), None, PLAIN_HEAD), bounds))
    assert numbers["row_max"][0] == numbers["max_before"][0] == -INF
    for name in ("row_sum", "centred_sum", "square_sum"):
        assert numbers[name][0] == 0, name
        assert numbers[name][1:3].isnan().all(), name
        assert numbers[name][3].isfinite(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bounds", [(0, 1500), (0, 500, 1500)])
def test_the_entropy_does_not_cancel_at_large_logits(isa, dtype, bounds):
    """At 5e4 a sum of exp * z would leave 5e4 roundings, 6e-3 in float32, of an entropy of about 7."""
    logits = 5e4 * torch.tensor([[1.0], [-1.0]]) + torch.rand(2, 1500, generator=torch.Generator().manual_seed(7))
    block = LogitsBlock(logits.to(dtype), torch.tensor([5, 1499]), None, PLAIN_HEAD)
    got, exact = moments_from(stats_of(block, bounds)), moments_of(block.logits.double())
    for name in exact:
        np.testing.assert_allclose(got[name], exact[name], rtol=2e-6 if dtype != torch.float64 else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_any_number_of_threads(isa, dtype):
    logits = (torch.randn(77, 5003, generator=torch.Generator().manual_seed(2)) * 4).to(dtype)
    labels = torch.randint(-1, 5003, (77,), generator=torch.Generator().manual_seed(3))
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            results.append(numbers_of(stats_of(LogitsBlock(logits, labels, None, PLAIN_HEAD))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize(("head", "has_bias"), HEADS)
@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [*zip(DTYPES, DTYPES, strict=True), (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize(("cols", "bounds"), [(1, None), (131, None), (1003, (0, 200, 1003))])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_residual(isa, dtype, out_dtype, cols, bounds, head, has_bias, with_entropy):
    """Losses with smoothing and z-loss where no logit is masked, which makes both infinite."""
    acc = acc_dtype(dtype)
    for token_loss in (TokenLoss(), TokenLoss(0.1, 1e-3)):
        block = make_block(cols, dtype, head, has_bias, masked=token_loss == TokenLoss())
        generator = torch.Generator().manual_seed(8)
        row_scale, entropy_scale = (torch.randn(2, 7, generator=generator) + 0.5).to(acc)
        stats = stats_of(block)
        entropy = moments_from(stats)["entropy"]
        factors = RowFactors(row_scale, entropy, entropy_scale) if with_entropy else RowFactors(row_scale)
        out = torch.full((7, cols), 7.0, dtype=out_dtype)
        got = residual_of(block, stats, out, token_loss=token_loss, factors=factors, bounds=bounds)
        exact, rounded = (
            plain_gradient(block, token_loss, row_scale, entropy_scale if with_entropy else None, d)
            for d in (torch.float64, acc)
        )
        # The derivative multiplies every error of the softmax by its slope.
        z = logits_of(block, torch.float64)
        spread = (1 + z[z.isfinite()].abs().max()) * max(1.0, head.slope_bound)
        assert_close(got, exact, rounded, f"residual of {token_loss}", spread)
        assert (got[5] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_entropy_alone(isa, dtype):
    """Without a loss: of rows whose gradient is 0 (one possible token, all equally likely), of a masked label."""
    logits = torch.full((4, 200), -INF, dtype=dtype)
    logits[0, 50] = 2.0
    logits[1] = 3.0
    logits[2:] = torch.linspace(-2, 2, 200)
    logits[3, 7] = -INF
    block = LogitsBlock(logits, torch.tensor([50, 7, 7, 7]), None, PLAIN_HEAD)
    stats, acc = stats_of(block), acc_dtype(dtype)
    none, one = torch.zeros(4, dtype=acc), torch.ones(4, dtype=acc)
    factors = RowFactors(none, moments_from(stats)["entropy"], one)
    got = residual_of(block, stats, torch.empty_like(logits), factors=factors)
    exact = plain_gradient(block, TokenLoss(), none, one, torch.float64)
    floor = 8 * torch.finfo(acc).eps * 8 / 200 + torch.finfo(dtype).eps * exact.abs()
    assert (got[0] == 0).all()
    assert ((got.double() - exact).abs() <= floor).all()
    assert exact[2].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head", "has_bias"), [HEADS[3], HEADS[5]])
def test_softmax_residual_takes_a_temperature(isa, dtype, head, has_bias):
    """As the residual from statistics, which are tested above: both read the same rows in the same way."""
    block = make_block(300, dtype, head, has_bias, masked=False)
    out, token_loss = torch.full((7, 300), 7.0, dtype=dtype), TokenLoss(0.1, 1e-3)
    written = TokenStats(*(torch.full((7,), 7.0, dtype=acc_dtype(dtype)) for _ in range(4)))
    BACKEND.softmax_residual(block, out, token_loss, written)
    stats, kept = stats_of(block), block.labels >= 0
    assert torch.equal(written.row_max[kept], stats.row_max[kept])
    assert torch.equal(written.row_sum[kept], stats.row_sum[kept])
    expected = residual_of(block, stats, torch.empty_like(out), token_loss=token_loss)
    rtol, atol = 4 * torch.finfo(dtype).eps, 32 * torch.finfo(acc_dtype(dtype)).eps
    np.testing.assert_allclose(out.double(), expected.double(), rtol=rtol, atol=atol)


def test_a_temperature_without_a_soft_cap_is_a_scale(isa):
    blocks = [make_block(300, torch.float32, HeadTransform(*head), True) for head in ((1.5, None, 0.5), (3.0,))]
    cooled, scaled = map(stats_of, blocks)
    assert all(torch.equal(value, numbers_of(scaled)[name]) for name, value in numbers_of(cooled).items())
    one, other = (residual_of(block, cooled, torch.empty(7, 300)) for block in blocks)
    assert torch.equal(one, other)


SHARED = {
    "logits": 64, "rows": 2, "cols": 8, "logits_stride": 8, "dtype": 0, "labels": 0, "bias": 0, "scale": 1.0,
    "softcap": 0.0, "col_offset": 0, "row_max": 64, "row_sum": 64, "num_threads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0"),
        ({"temperature": -1.0}, "temperature: expected .* got -1"),
        ({"temperature": NAN}, "temperature: expected .* got nan"),
        ({"temperature": INF}, "temperature: expected .* got inf"),
        ({"square_sum": 64, "max_before": 64}, "centred_sum: expected a buffer, got a null pointer"),
        ({"centred_sum": 64, "max_before": 64}, "square_sum: expected a buffer"),
        ({"centred_sum": 64, "square_sum": 64}, "max_before: expected a buffer"),
    ],
)
def test_logits_stats_refuses_what_it_can_see(given, message):
    with pytest.raises(ValueError, match=message):
        _C.cpu.logits_stats(**SHARED | {"labels": 64, "label_logit": 64, "logit_sum": 0, "merge": False} | given)


@pytest.mark.parametrize(("given", "missing"), [("entropy", "entropy_scale"), ("entropy_scale", "entropy")])
def test_an_entropy_without_its_scale_is_refused(given, missing):
    labels = np.zeros(2, dtype=np.int64)  # these are read, the other addresses are not
    more = {
        "labels": labels.ctypes.data, "out": 64, "out_stride": 8, "out_dtype": 0, "vocab_size": 8,
        "label_smoothing": 0.0, "z_loss": 0.0, "logp": 64, "row_scale": 0, given: 64,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"{missing}: expected a buffer, got a null pointer"):
        _C.cpu.residual_from_stats(**SHARED | more)
