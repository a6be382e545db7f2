"""Temperature, a row's entropy and what else trainers log, on the Triton row kernels against float64.

Rows: what statistics get wrong first (`hostile_rows`), over a vocabulary of 301 columns in blocks of 128: whole
blocks, a tail and rows off alignment. Heads: every factor alone and together, at both ends. In the interpreter only
the casts differ with the dtype: bfloat16 runs every head there, the others the one with every factor.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.triton_support import (
    DEVICE,
    INTERPRETING,
    assert_derived_match,
    exact_logits,
    exact_statistics,
    skip_unless_kernels_run,
)

skip_unless_kernels_run()

from slime_fused.triton_kernels import rows as kernels  # noqa: E402
from slime_fused.triton_kernels.configs import RowConfig  # noqa: E402

from slime_fused.backends.base import HeadTransform  # noqa: E402

pytestmark = pytest.mark.gpu

SMALL_BLOCKS = RowConfig(block=128, num_warps=4)
COLS = 301
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [
    (HeadTransform(), False),
    (HeadTransform(temperature=0.01), False),
    (HeadTransform(temperature=100.0), True),
    (HeadTransform(scale=0.25, temperature=0.25), False),
    (HeadTransform(scale=-0.7, temperature=0.5), False),
    (HeadTransform(scale=0.0, temperature=3.0), True),
    (HeadTransform(softcap=5.0), False),
    (HeadTransform(softcap=30.0, temperature=0.01), True),
    (HeadTransform(scale=-2.0, softcap=8.0, temperature=1.5), True),
]
MOMENTS = ("centred_sum", "square_sum", "max_before")
INF = torch.inf
CASES = [(dtype, *head) for dtype in DTYPES for head in HEADS]
if INTERPRETING:
    CASES = [case for case in CASES if case[0] == torch.bfloat16 or case[1:] == HEADS[-1]]


def hostile_rows(dtype):
    """Rows and labels; the largest logits are whole numbers, so that a head's factors round as little as can be."""
    torch.manual_seed(3)
    raw = torch.randn(12, COLS).mul(3)
    labels = torch.randint(1, COLS - 1, (12,))
    labels[0], labels[1], labels[2] = 0, COLS - 1, -100
    raw[3] = -INF
    raw[4, 100:] = -INF
    labels[4] = 200  # itself -inf
    raw[5] = 5e4 + torch.randint(-3, 4, (COLS,))
    raw[6] = 1.25  # ties everywhere
    raw[7, labels[7]] = 60.0  # certain
    raw[8, [20, 130, 290]], labels[8] = 20.0, 130  # its equal before it
    raw[9, [130, 290]], labels[9] = 20.0, 130  # and after it
    raw[10, :128] = -INF
    labels[10] = 128  # the first column of a block, of what is finite
    labels[11] = 133  # divides a lane in every dtype
    return raw.to(dtype).to(DEVICE), labels.to(DEVICE)


def bias_for(dtype, has_bias):
    return torch.linspace(-1, 1, COLS, device=DEVICE).to(dtype) if has_bias else None


def run_stats(raw, labels, bias, head, *, splits=(), first=0, moments=True):
    """Statistics merged over blocks that begin at 0 and at each of `splits`, in columns numbered from `first`."""
    names = ("row_max", "row_sum", "label_logit", "logit_sum", *(MOMENTS if moments else ()))
    out = {name: torch.full((raw.shape[0],), 7.0, device=DEVICE) for name in names}
    for begin, end in pairwise([0, *splits, raw.shape[1]]):
        kernels.logits_stats(
            raw[:, begin:end],
            labels,
            None if bias is None else bias[begin:end],
            **out,
            **vars(head),
            col_offset=first + begin,
            merge=begin > 0,
            config=SMALL_BLOCKS,
        )
    return out


def expected_stats(raw, labels, bias, head, first=0):
    """(float64, float32) statistics of the same rows."""
    return tuple(
        exact_statistics(exact_logits(raw.to(dtype), None if bias is None else bias.to(dtype), head), labels, first)
        for dtype in (torch.float64, torch.float32)
    )


@pytest.mark.parametrize(("dtype", "head", "has_bias"), CASES)
def test_statistics(dtype, head, has_bias):
    """One block and merged ones; asking for more changes no bit of the others, and one column is a row."""
    raw, labels = hostile_rows(dtype)
    bias = bias_for(dtype, has_bias)
    exact, plain = expected_stats(raw, labels, bias, head)
    whole = run_stats(raw, labels, bias, head)
    assert_derived_match(whole, exact, plain, "one block")
    assert whole["logit_sum"][0] == pytest.approx(exact["logit_sum"][0].item(), rel=1e-4, abs=1e-2)
    merged = run_stats(raw, labels, bias, head, splits=(1, 129, 200))
    assert_derived_match(merged, exact, plain, "merged")
    for name in ("row_max", "label_logit", "max_before"):
        assert torch.equal(merged[name].nan_to_num(), whole[name].nan_to_num()), name
    fewer = run_stats(raw, labels, bias, head, moments=False)
    assert all(
        torch.equal(fewer[name].nan_to_num(), whole[name].nan_to_num()) for name in ("row_max", "label_logit")
    )
    column = slice(0, 1)
    one = run_stats(raw[:, column], labels, None if bias is None else bias[column], head)
    narrow = expected_stats(raw[:, column], labels, None if bias is None else bias[column], head)
    assert_derived_match(one, *narrow, "one column")


@pytest.mark.parametrize("splits", [(), (1, 128, 200)])
def test_rows_of_minus_infinity_have_empty_sums(splits):
    """As their maximum and sum say: nothing was seen. A later block then counts as if it were the first."""
    raw, labels = hostile_rows(torch.float32)
    nothing = run_stats(raw[3:4], labels[3:4], None, HeadTransform(), splits=splits)
    assert nothing["row_max"] == nothing["max_before"] == -INF
    assert nothing["row_sum"] == nothing["centred_sum"] == nothing["square_sum"] == 0


@pytest.mark.parametrize("first", [0, 250, 1000])
def test_columns_elsewhere_in_the_vocabulary(first):
    """Labels before, in and after a shard's columns: none, some and all of them precede a label."""
    raw, _ = hostile_rows(torch.float32)
    labels = torch.tensor([0, 1, -100, 249, 250, 251, 383, 550, 551, 999, 1000, 5000], device=DEVICE)
    exact, plain = expected_stats(raw, labels, None, HeadTransform(), first)
    got = run_stats(raw, labels, None, HeadTransform(), first=first)
    assert_derived_match(got, exact, plain, first)
    assert torch.equal(got["max_before"].double(), exact["max_before"])


def test_nan_reaches_every_sum():
    raw, labels = hostile_rows(torch.float32)
    raw[0, 290] = torch.nan
    got = run_stats(raw[:2], labels[:2], None, HeadTransform(), splits=(129,))
    for name in ("row_sum", "centred_sum", "square_sum"):
        assert torch.isnan(got[name]).tolist() == [True, False], name


def test_large_logits_do_not_cancel():
    """At 5e4 a sum of e z would be as large: its float32 error alone is 100 times the entropy's allowed one."""
    torch.manual_seed(0)
    near = torch.randint(-4, 5, (4, COLS), device=DEVICE).double()
    labels = torch.tensor([3, 0, 300, 77], device=DEVICE)
    exact, _ = expected_stats(near, labels, None, HeadTransform())
    got = run_stats((near + 5e4).float(), labels, None, HeadTransform(), splits=(50, 170))
    entropy = got["row_sum"].log() - got["centred_sum"] / got["row_sum"]
    truth = exact["row_sum"].log() - exact["centred_sum"] / exact["row_sum"]
    torch.testing.assert_close(entropy.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "head", "has_bias"), CASES)
def test_the_label_at_the_maximum_has_the_bits_of_the_maximum(dtype, head, has_bias):
    """Callers compare them: rank 1 is label_logit >= row_max and label_logit > max_before, argmax's rule."""
    torch.manual_seed(7)
    raw = torch.randn(10, COLS, device=DEVICE).mul(2).to(dtype)
    bias = bias_for(dtype, has_bias)
    z = exact_logits(raw.double(), None if bias is None else bias.double(), head)
    first = z.argmax(1)
    at_label = run_stats(raw, first, bias, head, splits=(129,))
    assert torch.equal(at_label["label_logit"], at_label["row_max"])
    if head.scale:
        assert (at_label["label_logit"] > at_label["max_before"]).all()
    # A copy of the maximum behind it and, for the label there, before it.
    again = (first + 140) % COLS
    raw.scatter_(1, again[:, None], raw.gather(1, first[:, None]))
    if bias is not None:
        bias = torch.full_like(bias, 0.5)
        z = exact_logits(raw.double(), bias.double(), head)
        first = z.argmax(1)
    for labels in (first, again, (first + 1) % COLS):
        got = run_stats(raw, labels, bias, head)
        is_top1 = (got["label_logit"] >= got["row_max"]) & (got["label_logit"] > got["max_before"])
        plain = exact_logits(raw.float(), None if bias is None else bias.float(), head)
        assert torch.equal(is_top1, plain.argmax(1) == labels)


def expected_residual(dtype, raw, labels, bias, head, label_smoothing, z_loss, row_scale, entropy_scale):
    """d(row_scale loss + entropy_scale entropy)/d(raw) by autograd in `dtype`; each row's log-prob and entropy."""
    raw, bias, row_scale, entropy_scale = (
        None if x is None else x.to(dtype) for x in (raw, bias, row_scale, entropy_scale)
    )
    raw = raw.detach().requires_grad_()
    z = exact_logits(raw, bias, head)
    logp = torch.log_softmax(z, 1)
    lse = torch.logsumexp(z, 1)
    # p log p is 0 where p is 0.
    entropy = -(logp.exp() * logp.clamp(min=-1e4)).sum(1)
    label_logp = logp.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    loss = -(1 - label_smoothing) * label_logp + z_loss * lse**2
    if label_smoothing:
        loss = loss + label_smoothing * (lse - z.mean(1))
    total = loss if row_scale is None else row_scale * loss
    if entropy_scale is not None:
        total = total + entropy_scale * entropy
    (grad,) = torch.autograd.grad(total[labels >= 0].sum(), raw)
    return grad, label_logp.detach(), entropy.detach()


def assert_residual_matches(got, exact, plain, head, factor=1.0):
    """At most twice the error of float32 PyTorch in the row, and a rounding to the dtype of the result."""
    exact, plain = exact.double(), plain.double()
    usual = exact.isfinite() & plain.isfinite()
    error = (got.double() - exact).abs().where(usual, 0.0)
    assert torch.equal(got.isnan(), exact.isnan())
    own = 2 * (plain - exact).abs().where(usual, 0.0).amax(1, keepdim=True)
    # The kernel's tanh is right to a few units in its last place, PyTorch's to one.
    tanh_error = 0.0 if head.softcap is None else 2.4e-7 * head.softcap / head.temperature
    floor = abs(head.scale) / head.temperature * (4e-6 * factor + tanh_error)
    smallest = torch.finfo(got.dtype).smallest_normal
    limit = own + floor + smallest + 0.51 * torch.finfo(got.dtype).eps * exact.abs().where(usual, 0.0)
    assert (error <= limit).all(), f"{error.max():.2e} where {limit[error > limit][0]:.2e} is allowed"


def ordinary_rows(dtype):
    """Without the row that nothing can normalise and the one whose gradients float16 cannot hold."""
    raw, labels = hostile_rows(dtype)
    keep = [i for i in range(12) if i not in (3, 5)]
    return raw[keep], labels[keep]


@pytest.mark.parametrize(("dtype", "head", "has_bias"), CASES)
def test_residuals_from_statistics(dtype, head, has_bias):
    """Two shards, with and without the gradient of the entropy; smoothing needs finite logits for their mean."""
    ordinary, labels = ordinary_rows(dtype)
    bias = bias_for(dtype, has_bias)
    row_scale = torch.linspace(-2, 3, len(labels), device=DEVICE)
    entropy_scale = torch.linspace(1.5, -1, len(labels), device=DEVICE)
    for raw, label_smoothing, z_loss, *factors in (
        (ordinary, 0.0, 0.0, row_scale, entropy_scale),
        (ordinary, 0.0, 0.0, None, entropy_scale),
        (ordinary.clamp(min=-20), 0.1, 1e-3, row_scale, entropy_scale),
        (ordinary.clamp(min=-20), 0.1, 1e-3, row_scale, None),
    ):
        stats, _ = expected_stats(raw, labels, bias, head)
        (exact, logp, entropy), (plain, _, _) = (
            expected_residual(wide, raw, labels, bias, head, label_smoothing, z_loss, *factors)
            for wide in (torch.float64, torch.float32)
        )
        out = torch.full_like(raw, 7.0)
        for begin, end in ((0, 133), (133, COLS)):
            kernels.residual_from_stats(
                raw[:, begin:end],
                out[:, begin:end],
                labels,
                None if bias is None else bias[begin:end],
                stats["row_max"].float(),
                stats["row_sum"].float(),
                logp.float(),
                factors[0],
                None if factors[1] is None else entropy.float(),
                factors[1],
                **vars(head),
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                col_offset=begin,
                vocab_size=COLS,
                config=SMALL_BLOCKS,
            )
        assert_residual_matches(out, exact, plain, head, factor=4)
        assert (out[labels < 0] == 0).all()


@pytest.mark.parametrize(("dtype", "head", "has_bias"), CASES)
def test_residuals_of_whole_rows(dtype, head, has_bias):
    raw, labels = ordinary_rows(dtype)
    raw, bias = raw.clamp(min=-20), bias_for(dtype, has_bias)
    (exact, logp, _), (plain, _, _) = (
        expected_residual(wide, raw, labels, bias, head, 0.1, 1e-3, None, None)
        for wide in (torch.float64, torch.float32)
    )
    own = [torch.full((len(labels),), 7.0, device=DEVICE) for _ in range(4)]
    out = torch.full_like(raw, 7.0)
    kernels.softmax_residual(
        raw, out, labels, bias, *own, **vars(head), label_smoothing=0.1, z_loss=1e-3, config=SMALL_BLOCKS
    )
    assert_residual_matches(out, exact, plain, head)
    torch.testing.assert_close(own[2][labels >= 0].double(), logp[labels >= 0], rtol=1e-5, atol=2e-6)
