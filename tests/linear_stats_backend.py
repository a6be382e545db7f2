"""Backends with `linear_stats` that need neither a GPU nor Triton's interpreter: "torch" and "cpu" with it added.

What they return is the contract's: statistics of products that were rounded as stored ones are. Logits are formed
in tiles, and forgotten.
"""

from __future__ import annotations

import pytest
import torch

import slime_fused.backends as registry
from slime_fused.backends.base import Backend, LinearStatsBackend
from slime_fused.backends.cpu import CpuBackend
from slime_fused.backends.torch import TorchBackend
from slime_fused.engine import products

TILE_ROWS, TILE_COLS = 128, 512


class TiledLinearStats:
    """`base.LinearStatsBackend` over the `logits_stats` of the class it is mixed into."""

    calls = 0

    def linear_stats_row_bytes(self, weight):
        if weight.stride(1) != 1:
            return 0
        return 12 * -(-weight.shape[0] // TILE_COLS)

    def linear_stats(
        self,
        hidden,
        weight,
        labels,
        bias,
        head,
        *,
        col_offset,
        row_max,
        row_sum,
        label_logit,
        logit_sum,
        logits_dtype=None,
    ):
        assert hidden.stride(1) == weight.stride(1) == 1
        self.calls += 1
        for a in range(0, hidden.shape[0], TILE_ROWS):
            rows = slice(a, a + TILE_ROWS)
            for begin in range(0, weight.shape[0], TILE_COLS):
                cols = slice(begin, begin + TILE_COLS)
                logits = hidden.new_empty(hidden[rows].shape[0], weight[cols].shape[0], dtype=logits_dtype)
                products.write_logits(hidden[rows], weight[cols], logits)
                self.logits_stats(
                    logits,
                    labels[rows],
                    None if bias is None else bias[cols],
                    head,
                    col_offset=col_offset + begin,
                    row_max=row_max[rows],
                    row_sum=row_sum[rows],
                    label_logit=label_logit[rows],
                    logit_sum=None if logit_sum is None else logit_sum[rows],
                    merge=begin > 0,
                )


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
