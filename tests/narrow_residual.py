"""Float32 logits whose residual has 16 bits: both functions that write one, on any backend."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slime_fused.backends.base import Backend, RowFactors
from tests.backend_grid import RowData, xfail_unless_taken
from tests.row_cases import RowCase, row_cases

HALVES = (torch.bfloat16, torch.float16)
CASES = [
    *row_cases((torch.float32,)),
    # Several blocks per row, a remainder in every loop, rows at four alignments.
    RowCase("wide", rows=4, vocab=20_003, pitch=20_005, has_bias=True),
]


def check_narrow_residual(backend: Backend, case: RowCase, dtype: torch.dtype, device: torch.device) -> None:
    """The statistics' bits are those beside a float32 residual, and the residual is the truth's, rounded once.

    Output rows begin at 16 bytes and off them; what lies around them stays.
    """
    xfail_unless_taken(backend, device, case.head)
    data = RowData(replace(case, dtype=torch.float32), device)
    block, expected = data.block(), data.token_stats()
    backend.softmax_residual(block, torch.empty_like(data.raw), case.token_loss, expected)
    for offset, pitch in ((0, case.vocab + -case.vocab % 8), (3, case.vocab + 5)):
        stats = data.token_stats()
        whole, out = _framed(case, dtype, device, offset, pitch)
        backend.softmax_residual(block, out, case.token_loss, stats)
        for got, want in zip(vars(stats).values(), vars(expected).values(), strict=True):
            assert torch.equal(got, want)
        data.check("residual", out)
        _check_frame(whole, case, offset, pitch)
        for scale in (None, data.row_scale()):
            whole, out = _framed(case, dtype, device, offset, pitch)
            backend.residual_from_stats(block, out, case.token_loss, stats, RowFactors(scale))
            data.check("residual", out, scale)
            _check_frame(whole, case, offset, pitch)


def _framed(
    case: RowCase, dtype: torch.dtype, device: torch.device, offset: int, pitch: int
) -> tuple[Tensor, Tensor]:
    """(all of a buffer of ones, the rows (M, V) in it, poisoned)."""
    whole = torch.ones(offset + case.rows * pitch + 8, dtype=dtype, device=device)
    out = whole.as_strided((case.rows, case.vocab), (pitch, 1), offset)
    out.fill_(torch.nan)
    return whole, out


def _check_frame(whole: Tensor, case: RowCase, offset: int, pitch: int) -> None:
    whole = whole.clone()
    whole.as_strided((case.rows, case.vocab), (pitch, 1), offset).fill_(1)
    assert torch.equal(whole, torch.ones_like(whole))
