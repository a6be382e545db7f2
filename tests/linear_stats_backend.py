"""Backends with `linear_stats` that need neither a GPU nor Triton's interpreter: "torch" and "cpu" with it added.

What they return is the contract's: statistics of products that were rounded as stored ones are. Logits are formed
in tiles, and forgotten.
"""

from __future__ import annotations

import pytest
import torch

import slime_fused.backends as registry
from slime_fused.backends.base import Backend, LinearStatsBackend, LogitsBlock, Moments, VocabStats
from slime_fused.backends.cpu import CpuBackend
from slime_fused.backends.torch import TorchBackend
from slime_fused.engine import products

TILE_ROWS, TILE_COLS = 128, 512


class TiledLinearStats:
    """`base.LinearStatsBackend` over the `logits_stats` of the class it is mixed into."""

    calls = 0

    def linear_stats_row_bytes(self, weight, *, with_moments=False):
        if weight.stride(1) != 1:
            return 0
        return (24 if with_moments else 12) * -(-weight.shape[0] // TILE_COLS)

    def linear_stats(self, block, stats):
        hidden, weight = block.hidden, block.weight
        assert hidden.stride(1) == weight.stride(1) == 1
        self.calls += 1
        for a in range(0, hidden.shape[0], TILE_ROWS):
            rows = slice(a, a + TILE_ROWS)
            for begin in range(0, weight.shape[0], TILE_COLS):
                cols = slice(begin, begin + TILE_COLS)
                logits = hidden.new_empty(hidden[rows].shape[0], weight[cols].shape[0], dtype=block.logits_dtype)
                products.write_logits(hidden[rows], weight[cols], logits)
                bias = None if block.bias is None else block.bias[cols]
                tile = LogitsBlock(logits, block.labels[rows], bias, block.transform, begin, weight.shape[0])
                self.logits_stats(tile, rows_of(stats, rows), merge=begin > 0)


def rows_of(stats, rows):
    """Views of some rows."""
    moments = None if stats.moments is None else Moments(*(values[rows] for values in vars(stats.moments).values()))
    logit_sum = None if stats.logit_sum is None else stats.logit_sum[rows]
    return VocabStats(stats.row_max[rows], stats.row_sum[rows], stats.label_logit[rows], logit_sum, moments)


class TorchWithLinearStats(TiledLinearStats, TorchBackend):
    """Plain PyTorch."""


class CpuWithLinearStats(TiledLinearStats, CpuBackend):
    """The native kernels, which work in place."""


@pytest.fixture(params=["torch", "cpu"])
def linear_stats_backend(request, monkeypatch) -> Backend:
    """The backend that calls get under its plain name, "torch" or "cpu", during a test."""
    backend = {"torch": TorchWithLinearStats, "cpu": CpuWithLinearStats}[request.param]()
    assert isinstance(backend, LinearStatsBackend)
    original = registry.get_backend
    monkeypatch.setattr(registry, "get_backend", lambda name: backend if name == backend.name else original(name))
    is_available, reason = backend.available()
    assert is_available, reason
    assert backend.supports(torch.device("cpu"), torch.float32)[0]
    return backend
