"""The shared grid on every backend that runs on this machine's CPU."""

from __future__ import annotations

import pytest
import torch

from slime_fused.backends import get_backend
from slime_fused.backends.base import LogitsBlock, RowStats
from tests import backend_grid as grid
from tests import moment_grid, token_grid

CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    backend = get_backend(request.param)
    is_available, reason = backend.available()
    assert is_available, f"{request.param}: {reason}"
    return backend


@pytest.mark.parametrize("case", grid.row_cases(), ids=lambda c: c.name)
def test_softmax_residual(backend, case):
    grid.check_softmax_residual(backend, case, CPU)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", grid.row_cases(), ids=lambda c: c.name)
def test_stats_then_residual(backend, case, shards):
    grid.check_stats_then_residual(backend, case, CPU, shards)


@pytest.mark.parametrize("dtype", grid.DTYPES)
def test_extreme_logits(backend, dtype):
    grid.check_extreme_logits(backend, dtype, CPU)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", grid.DTYPES)
def test_extreme_scales(backend, dtype, softcap):
    grid.check_extreme_scales(backend, dtype, CPU, softcap)


@pytest.mark.parametrize("dtype", grid.DTYPES)
def test_target_does_not_cancel(backend, dtype):
    grid.check_target_does_not_cancel(backend, dtype, CPU)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", moment_grid.moment_cases(), ids=lambda c: c.name)
def test_moments(backend, case, shards):
    moment_grid.check_moments(backend, case, CPU, shards)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", moment_grid.moment_cases(), ids=lambda c: c.name)
def test_entropy_residual(backend, case, shards):
    moment_grid.check_entropy_residual(backend, case, CPU, shards)


@pytest.mark.parametrize("dtype", grid.DTYPES)
def test_extreme_moments(backend, dtype):
    moment_grid.check_extreme_moments(backend, dtype, CPU)


@pytest.mark.parametrize("dtype", grid.DTYPES)
def test_label_rank(backend, dtype):
    moment_grid.check_label_rank(backend, dtype, CPU)


@pytest.mark.parametrize("lengths", token_grid.SEGMENTS, ids=lambda s: f"{len(s)}x{max(s)}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_sum(backend, lengths, dtype):
    token_grid.check_segment_sum(backend, lengths, dtype, CPU)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slime_terms(backend, reduction, dtype):
    token_grid.check_slime_terms(backend, token_grid.WEIGHTS[reduction], dtype, CPU)


def test_margin_at_the_hinge(backend):
    token_grid.check_margin_at_the_hinge(backend, CPU)


@pytest.mark.parametrize("dtype", grid.DTYPES)
def test_scale(backend, dtype):
    token_grid.check_scale(backend, dtype, CPU)


def test_label_beyond_the_vocabulary_is_refused_before_anything_is_written(backend):
    logits = torch.zeros(3, 8)
    labels = torch.tensor([1, 8, 2])
    out = torch.full_like(logits, 7.0)
    stats = RowStats(*torch.full((3, 3), 7.0).unbind())
    with pytest.raises(ValueError, match=r"8"):
        backend.softmax_residual(LogitsBlock(logits, labels, None, grid.PLAIN_HEAD), out, grid.NLL, stats)
    assert (out == 7).all()
