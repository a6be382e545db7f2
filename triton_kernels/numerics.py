# ruff: noqa: ANN001, ANN201 -- what Triton passes to a kernel has no Python type
"""Device functions shared by the kernels: the head transform, the online softmax and stable special functions.

    y = scale * (raw + bias),   z = y / temperature  or  softcap / temperature * tanh(y / softcap)
    dz/draw = scale / temperature * (1 - tanh(y / softcap)^2)
    d(token loss)/dz_v = (1 - eps) * (p_v - [v = label]) + eps * (p_v - 1/V) + 2 * z_loss * lse * p_v

Launched without fusion (`configs.LAUNCH`): were `raw * scale` fused with the subtraction of a maximum, it would not
be the product whose maximum was taken (at z = 5e4, a probability of 1 would come out as 0.998). Where one
instruction is wanted, `tl.fma` says so.

Everything is float32. But for `round_product` only `tl` operations are used (no libdevice), so the same source
compiles for NVIDIA and AMD and runs in Triton's interpreter. Exponentials are base 2, as the hardware's are.

`-inf` is a legal logit (a masked token). A maximum of `-inf` is therefore replaced by 0 before it is subtracted
(`finite_shift`): exp2(-inf - 0) is 0, whereas exp2(-inf - -inf) would be NaN. NaN inputs do reach the results.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))
LEAST_LOG = tl.constexpr(-1000.0)
"""exp is 0 here already. What multiplies an exponential stops at it: 0 * -inf would be NaN."""


def head_factors(scale: float, softcap: float | None, temperature: float) -> tuple[float, float, float]:
    """What kernels take of a head transform, (inner, outer, slope).

    z = inner * raw without a soft cap; z = outer * tanh(inner * raw) and dz/draw = slope (1 - tanh^2) with one.
    Formed in double and rounded once each, so that a temperature costs nothing beside a scale.
    """
    slope = scale / temperature
    return (slope, 0.0, slope) if softcap is None else (scale / softcap, softcap / temperature, slope)


@triton.jit
def exp(x):
    """exp(x); 0 at -inf."""
    return tl.exp2(x * LOG2E)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0 (a log-probability) without cancellation near 0.

    Above -0.5 the series to x^9: the first term left out is 5e-10 of the result. Below, 1 - exp(x) >= 0.39 keeps
    the error of the subtraction under 2 ulp.
    """
    series = 1.0 / 40320 + x * (1.0 / 362880)
    series = 1.0 / 5040 + x * series
    series = 1.0 / 720 + x * series
    series = 1.0 / 120 + x * series
    series = 1.0 / 24 + x * series
    series = 1.0 / 6 + x * series
    series = 0.5 + x * series
    series = x * (1.0 + x * series)
    return tl.where(x > -0.5, series, exp(x) - 1.0)


@triton.jit
def log1p_unit(t):
    """log(1 + t) for t in [0, 1]: log(w) * t / (w - 1), w = 1 + t rounded, undoes the rounding of w."""
    w = 1.0 + t
    is_tiny = w == 1.0
    return tl.where(is_tiny, t, tl.log(w) * (t / tl.where(is_tiny, 1.0, w - 1.0)))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) for any x."""
    return tl.maximum(x, 0.0) + log1p_unit(exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exactly 0 and 1 at the infinities."""
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def nonnegative_power(x, exponent):
    """x^exponent for x >= 0, exponent >= 0, with 0^0 = 1."""
    return tl.where(exponent == 0.0, 1.0, tl.exp2(exponent * tl.log2(x)))


@triton.jit
def softcap_tanh(x):
    """tanh(x) and 1 - tanh(x)^2, both to a few ulp for every x, infinities included."""
    t = exp(-2.0 * tl.abs(x))
    quotient = (1.0 - t) / (1.0 + t)
    x2 = x * x
    series = tl.fma(x2, 62.0 / 2835, -17.0 / 315)
    series = tl.fma(x2, series, 2.0 / 15)
    series = tl.fma(x2, series, -1.0 / 3)
    series = tl.fma(x2 * x, series, x)
    # (1 - t) cancels for small x: below 1/4 the series is exact to 1e-8.
    value = tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -quotient, quotient))
    return value, 4.0 * t / ((1.0 + t) * (1.0 + t))


@triton.jit
def head_logit(raw, inner, outer, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """z of a raw product with its bias already added; for the factors see `head_factors`."""
    z = raw
    if HAS_SOFTCAP:
        tanh, _ = softcap_tanh(raw * inner)
        z = outer * tanh
    elif HAS_SCALE:
        z = raw * inner
    return z


@triton.jit
def head_logit_and_slope(raw, inner, outer, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """z of a raw product with its bias already added, and dz/draw divided by the slope of `head_factors`."""
    z = raw
    slope = 1.0
    if HAS_SOFTCAP:
        tanh, slope = softcap_tanh(raw * inner)
        z = outer * tanh
    elif HAS_SCALE:
        z = raw * inner
    return z, slope


@triton.jit
def round_product(x, dtype: tl.constexpr, HAS_PTX: tl.constexpr):
    """x rounded to `dtype`, in float32; bfloat16 two numbers at a time on NVIDIA.

    One at a time is a conversion instruction for each (F2F, slower than arithmetic); float16 is packed by the
    compiler. Of the packed conversion the second operand becomes the lower half.
    """
    if HAS_PTX and dtype == tl.bfloat16:
        rounded = tl.inline_asm_elementwise(
            "{ .reg .b32 pair; cvt.rn.bf16x2.f32 pair, $3, $2;"
            " shl.b32 $0, pair, 16; and.b32 $1, pair, 0xffff0000; }",
            "=r,=r,r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        rounded = x.to(dtype).to(tl.float32)
    return rounded


@triton.jit
def finite_shift(maximum):
    """The maximum to subtract before exponentials: itself, or 0 where nothing but -inf has been seen."""
    return tl.where(maximum == NEG_INF, 0.0, maximum)


@triton.jit
def merge_softmax(max_a, sum_a, max_b, sum_b):
    """The (max, sum of exp(z - max)) of two disjoint sets of columns. Exact where one of them is empty."""
    maximum = tl.maximum(max_a, max_b)
    shift = finite_shift(maximum)
    return maximum, sum_a * exp(max_a - shift) + sum_b * exp(max_b - shift)


@triton.jit
def exp_and_moments(distance):
    """exp(d), exp(d) d and exp(d)^2 of the distance d <= 0 to a maximum; 0 at -inf."""
    exponential = exp(distance)
    return exponential, exponential * tl.maximum(distance, LEAST_LOG), exponential * exponential


@triton.jit
def shifted_moments(old_max, old_sum, centred, square, shift):
    """(sum, centred sum, sum of squares) about `shift` instead of `old_max` <= shift.

    All terms of the centred sum are <= 0: nothing cancels, however large the logits are.
    """
    distance = old_max - shift
    share = exp(distance)
    centred = share * tl.fma(old_sum, tl.maximum(distance, LEAST_LOG), centred)
    return share * old_sum, centred, share * share * square


@triton.jit
def label_entry(logp, lse, label_smoothing, z_loss, inv_vocab, HAS_EXTRAS: tl.constexpr):
    """d(token loss)/dz of the label: p - 1 as expm1(logp), for a rounded p - 1 loses all of a likely token."""
    entry = expm1(logp)
    if HAS_EXTRAS:
        p = exp(logp)
        entry = (1.0 - label_smoothing) * entry + label_smoothing * (p - inv_vocab) + 2.0 * z_loss * lse * p
    return entry
