"""The shared backend grid on the Triton kernels: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from tests import backend_grid as grid
from tests import moment_grid, token_grid
from tests.narrow_residual import CASES as NARROW_CASES
from tests.narrow_residual import HALVES, check_narrow_residual
from tests.triton_support import DEVICE, INTERPRETING, skip_unless_kernels_run

skip_unless_kernels_run()

from slime_fused.backends.triton import TritonBackend  # noqa: E402

pytestmark = pytest.mark.gpu

BACKEND = TritonBackend()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_worth_running(case: grid.RowCase) -> bool:
    """Compiled code may differ with the dtype; in the interpreter only the casts do, and 300 rows take a minute."""
    if not INTERPRETING:
        return True
    return case.rows < 300 and (case.dtype == torch.bfloat16 or case.name in ("all-float32", "plain-float16"))


CASES = [case for case in grid.row_cases(DTYPES) if is_worth_running(case)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_softmax_residual(case):
    grid.check_softmax_residual(BACKEND, case, DEVICE)


@pytest.mark.parametrize("shards", [3] if INTERPRETING else [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_stats_then_residual(case, shards):
    grid.check_stats_then_residual(BACKEND, case, DEVICE, shards)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["all-float32", "unaligned_rows-float32", "negative_scale_aligned-float32"])
def test_residual_of_fewer_bits(name, dtype):
    (case,) = [case for case in NARROW_CASES if case.name == name]
    check_narrow_residual(BACKEND, case, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype):
    grid.check_extreme_logits(BACKEND, dtype, DEVICE)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scales(dtype, softcap):
    grid.check_extreme_scales(BACKEND, dtype, DEVICE, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_target_does_not_cancel(dtype):
    grid.check_target_does_not_cancel(BACKEND, dtype, DEVICE)


MOMENT_CASES = [case for case in moment_grid.moment_cases(DTYPES) if is_worth_running(case)]


@pytest.mark.parametrize("shards", [3] if INTERPRETING else [1, 3])
@pytest.mark.parametrize("case", MOMENT_CASES, ids=lambda c: c.name)
def test_moments(case, shards):
    moment_grid.check_moments(BACKEND, case, DEVICE, shards)


@pytest.mark.parametrize("case", MOMENT_CASES, ids=lambda c: c.name)
def test_entropy_residual(case):
    moment_grid.check_entropy_residual(BACKEND, case, DEVICE, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_moments(dtype):
    moment_grid.check_extreme_moments(BACKEND, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETING else DTYPES)
def test_label_rank(dtype):
    moment_grid.check_label_rank(BACKEND, dtype, DEVICE)


@pytest.mark.parametrize("lengths", token_grid.SEGMENTS, ids=lambda s: f"{len(s)}x{max(s)}")
def test_segment_sum(lengths):
    token_grid.check_segment_sum(BACKEND, lengths, torch.float32, DEVICE)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_slime_terms(reduction):
    token_grid.check_slime_terms(BACKEND, token_grid.WEIGHTS[reduction], torch.float32, DEVICE)


def test_margin_at_the_hinge():
    token_grid.check_margin_at_the_hinge(BACKEND, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(dtype):
    token_grid.check_scale(BACKEND, dtype, DEVICE)
