"""Temperature, moments of the logits and the entropy's gradient in the CUDA kernels, on the CPU.

The bindings are called as they are, with addresses, in the emulator of ``tests/test_cuda_emulated.py``, which runs
one case again with the kernels instrumented. The truth is PyTorch in float64.

Why these problems suffice: one and two columns (no vector), 37 and 1003 with rows off alignment, 20,003 (several
visits of a thread, several blocks of the residual); every head that turns, levels, caps or stretches the logits, to
a temperature of 0.01 and 100, and logits near 5e4, where sums that are not centred cancel. Every problem has labels
in the first and the last column, ties at the maximum and an ignored row; where the head leaves -inf as it is, one
row has it in part and one throughout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.cuda_emulator.backend import emulated_module
from tests.cuda_emulator.rows import (
    ALL_MASKED,
    CASES,
    DTYPES,
    FIRST,
    IGNORED,
    LAST,
    MOMENTS,
    TIED_AFTER,
    TIED_BEFORE,
    WITHOUT_MOMENTS,
    Case,
    Rows,
    assert_near,
    d_raw,
    entropy_of,
    moments_of,
    rows_with_probabilities,
    softmax_residual,
)

pytestmark = pytest.mark.slow  # the first run compiles the kernels


@pytest.fixture(scope="module")
def native() -> Any:
    return emulated_module()


@pytest.fixture(autouse=True)
def _fixed_schedule(native):
    native.set_schedule("fixed")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@pytest.mark.parametrize("blocks", [1, 3])
@each_dtype
@each_case
def test_moments(native, case, dtype, blocks):
    """Near the truth, and beside them every other statistic has the bits that it has without them."""
    rows = Rows(case, dtype)
    got = rows.stats(native, blocks)
    truth, plain = (moments_of(rows.z(wide), rows.labels) for wide in (torch.float64, torch.float32))
    got["entropy"] = entropy_of(got)
    for name in ("row_max", "max_before", "label_logit", "entropy", *MOMENTS[:2]):
        assert_near(got[name], truth[name], plain[name], name)
    if rows.has_masks:
        assert got["row_max"][ALL_MASKED] == -torch.inf
        assert got["centred_sum"][ALL_MASKED] == 0
        assert got["square_sum"][ALL_MASKED] == 0
    assert got["max_before"][IGNORED] == -torch.inf
    for name, without in rows.stats(native, blocks, WITHOUT_MOMENTS).items():
        assert torch.equal(got[name], without), name


@pytest.mark.parametrize("blocks", [1, 3])
@each_dtype
@pytest.mark.parametrize("case", [c for c in CASES if c.vocab < 20_000], ids=lambda c: c.name)
def test_a_logit_has_the_same_bits_in_every_statistic(native, case, dtype, blocks):
    """Else a label that is the row's maximum would not compare equal to it. Each logit by itself: a row of one."""
    rows = Rows(case, dtype)
    z = torch.stack(
        [rows.stats_between([(v, v + 1)], native, WITHOUT_MOMENTS)["row_max"] for v in range(case.vocab)], 1
    )
    got = rows.stats(native, blocks)
    expected = moments_of(z, rows.labels)
    for name in ("row_max", "max_before", "label_logit"):
        assert torch.equal(got[name], expected[name]), name
    # By argmax's rule that the first of equals is the largest.
    is_top1 = (got["label_logit"] >= got["row_max"]) & (got["label_logit"] > got["max_before"])
    real = [FIRST, LAST, TIED_BEFORE, TIED_AFTER]
    assert torch.equal(is_top1[real], (z.argmax(1) == rows.labels)[real])
    if case.vocab > 2 and case.scale != 0:
        assert is_top1[[TIED_BEFORE, TIED_AFTER]].tolist() == [False, True]


def test_blocks_on_one_side_of_the_label(native):
    """A block whose columns all come before the label counts whole, one whose columns all come after not at all."""
    rows = Rows(Case("sides", vocab=120), torch.float32)
    rows.labels[:] = torch.tensor([0, 39, 40, 41, 79, 80, 119])
    whole, parts = rows.stats(native), rows.stats(native, 3)
    by_definition = moments_of(rows.z(torch.float32), rows.labels)["max_before"]
    assert torch.equal(whole["max_before"], by_definition)
    assert torch.equal(parts["max_before"], by_definition)


def test_a_block_of_minus_infinity_merges(native):
    """First, between others and last; each with its share of nothing."""
    rows = Rows(Case("masked_blocks", vocab=96), torch.float32)
    rows.raw[:3] = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    for row, (begin, end) in enumerate(((0, 32), (32, 64), (64, 96))):
        rows.raw[row, begin:end] = -torch.inf
    truth, plain = (moments_of(rows.z(wide), rows.labels) for wide in (torch.float64, torch.float32))
    got = rows.stats(native, 3)
    for name in (*MOMENTS, "row_sum"):
        assert_near(got[name], truth[name], plain[name], name)


def test_masked_with_numbers_whose_shift_is_rounded_by_64(native):
    """A finite mask fills whole threads: their squares leave float32, and must count for nothing all the same."""
    masks = -(1e9 + 64 * torch.arange(4000, dtype=torch.float64)).float()
    log2e = torch.tensor(1.4426950408889634).float()
    rounding = masks.double() * log2e.double() - (masks * log2e).double()
    mask = masks[rounding.argmax()]
    assert rounding.max() > 63
    rows = Rows(Case("finite_mask", vocab=1003), torch.float32)
    rows.raw[:, 40:] = mask
    truth, plain = (moments_of(rows.z(wide), rows.labels) for wide in (torch.float64, torch.float32))
    for blocks in (1, 3):
        got = rows.stats(native, blocks)
        for name in ("row_sum", *MOMENTS[:2]):
            real = slice(0, ALL_MASKED)
            assert_near(got[name][real], truth[name][real], plain[name][real], name)


@pytest.mark.parametrize("where", [0, 18, 36, slice(None)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@each_dtype
def test_nan_reaches_the_moments(native, dtype, value, where):
    rows = Rows(Case("nan"), dtype)
    rows.raw[FIRST, where] = value
    for blocks in (1, 3):
        got = rows.stats(native, blocks)
        assert got["row_sum"][FIRST].isnan()
        assert got["centred_sum"][FIRST].isnan()
        assert got["square_sum"][FIRST].isnan()
        assert not got["square_sum"][LAST].isnan()


@each_dtype
@each_case
def test_entropy_in_the_residual(native, case, dtype):
    """With the loss's own gradient, scaled by row or not, and alone; of logits' dtype and of fewer bits."""
    rows = rows_with_probabilities(case, dtype)
    stats = rows.stats(native)
    entropy = entropy_of(stats)
    entropy_scale = torch.linspace(3, -1, 7)
    for row_scale in (None, torch.linspace(-2, 3, 7), torch.zeros(7)):
        truth, plain = (d_raw(rows, wide, row_scale, entropy_scale) for wide in (torch.float64, torch.float32))
        scales = {"row_scale": row_scale, "entropy": entropy, "entropy_scale": entropy_scale}
        for out_dtype in DTYPES if dtype == torch.float32 else (dtype,):
            got = rows.residual(native, stats, out_dtype, **scales)
            assert_near(got, truth, plain, f"residual in {out_dtype}")
            assert torch.equal(got[IGNORED], torch.zeros_like(got[IGNORED]))
            assert torch.equal(rows.residual(native, stats, out_dtype, blocks=3, **scales), got)


@each_dtype
@each_case
def test_no_entropy_is_the_plain_residual(native, case, dtype):
    rows = rows_with_probabilities(case, dtype)
    stats, row_scale = rows.stats(native), torch.linspace(-2, 3, 7)
    plain = rows.residual(native, stats, dtype, row_scale=row_scale)
    none = torch.zeros(7)
    got = rows.residual(native, stats, dtype, row_scale=row_scale, entropy=entropy_of(stats), entropy_scale=none)
    assert torch.equal(got, plain)


PLANS = ({"threads": 64, "shared_vectors": 3}, {"cluster": 2, "threads": 96, "shared_vectors": 2}, {"cluster": 8})


@pytest.mark.parametrize("plan", PLANS, ids=str)
@each_dtype
@each_case
def test_softmax_residual(native, case, dtype, plan):
    rows = rows_with_probabilities(case, dtype)
    got, logp, _ = softmax_residual(native, rows, native.cuda.RowPlan(**plan))
    none = torch.zeros(7)
    truth, plain = (d_raw(rows, wide, None, none) for wide in (torch.float64, torch.float32))
    assert_near(got, truth, plain, "residual")
    keep = rows.labels >= 0
    logps = [
        torch.log_softmax(rows.z(wide), 1).gather(1, rows.labels.clamp(min=0)[:, None])[:, 0] * keep
        for wide in (torch.float64, torch.float32)
    ]
    assert_near(logp, *logps, "logp")


@each_dtype
def test_a_temperature_without_a_cap_is_a_scale(native, dtype):
    """So that it costs nothing; and one that undoes the scale leaves a plain head, with the plain kernel's bits."""
    plan = native.cuda.RowPlan(threads=64, shared_vectors=3)
    for warm, scaled in (
        (Case("t", scale=0.75, temperature=0.3), Case("s", scale=0.75 / 0.3)),
        (Case("t", scale=0.3, temperature=0.3), Case("plain")),
    ):
        for vocab in (37, 1003):
            one, other = (Rows(replace(case, vocab=vocab), dtype) for case in (warm, scaled))
            other.raw, other.labels = one.raw, one.labels
            for got, want in zip(
                softmax_residual(native, one, plan), softmax_residual(native, other, plan), strict=True
            ):
                assert torch.equal(got.nan_to_num(), want.nan_to_num())
            mine, theirs = one.stats(native), other.stats(native)
            for name, got in mine.items():
                assert torch.equal(got, theirs[name]), name


@each_dtype
def test_no_schedule_changes_a_bit_of_the_moments(native, dtype):
    rows = Rows(Case("schedules", vocab=5003, has_bias=True, softcap=9.0, temperature=0.7), dtype)
    expected = rows.stats(native, 2)
    scales = {"entropy": entropy_of(expected), "entropy_scale": torch.ones(7), "row_scale": None}
    residual = rows.residual(native, expected, dtype, **scales)
    for order, seed in (("reversed", 0), *(("random", seed) for seed in range(4))):
        native.set_schedule(order, seed)
        for name, got in rows.stats(native, 2).items():
            assert torch.equal(got, expected[name]), f"{name} {order} {seed}"
        assert torch.equal(rows.residual(native, expected, dtype, **scales), residual)


def test_halves_of_an_option_are_refused(native):
    rows = Rows(Case("plain"), torch.float32)
    for missing in MOMENTS:
        names = WITHOUT_MOMENTS + tuple(name for name in MOMENTS if name != missing)
        with pytest.raises(ValueError, match="centred_sum, square_sum and max_before must all be given or all be"):
            rows.stats(native, 1, names)
    stats = rows.stats(native)
    for name in ("entropy", "entropy_scale"):
        with pytest.raises(ValueError, match="entropy and entropy_scale must both be given or both be null"):
            rows.residual(native, stats, torch.float32, row_scale=None, **{name: torch.zeros(7)})
