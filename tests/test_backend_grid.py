"""The shared grid on every backend that runs on this machine's CPU."""

from __future__ import annotations

import pytest
import torch

from slime_fused.backends import get_backend
from slime_fused.backends.base import LogitsBlock, RowStats
from tests import backend_grid as grid

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


@pytest.mark.parametrize("lengths", grid.SEGMENTS, ids=lambda s: f"{len(s)}x{max(s)}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_sum(backend, lengths, dtype):
    grid.check_segment_sum(backend, lengths, dtype, CPU)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slime_terms(backend, reduction, dtype):
    grid.check_slime_terms(backend, grid.WEIGHTS[reduction], dtype, CPU)


def test_margin_at_the_hinge(backend):
    grid.check_margin_at_the_hinge(backend, CPU)


@pytest.mark.parametrize("dtype", grid.DTYPES)
def test_scale(backend, dtype):
    grid.check_scale(backend, dtype, CPU)


def test_label_beyond_the_vocabulary_is_refused_before_anything_is_written(backend):
    logits = torch.zeros(3, 8)
    labels = torch.tensor([1, 8, 2])
    out = torch.full_like(logits, 7.0)
    stats = RowStats(*torch.full((3, 3), 7.0).unbind())
    with pytest.raises(ValueError, match=r"8"):
        backend.softmax_residual(LogitsBlock(logits, labels, None, grid.PLAIN_HEAD), out, grid.NLL, stats)
    assert (out == 7).all()
