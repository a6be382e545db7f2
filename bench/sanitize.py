"""A small run of every row and segment kernel, for compute-sanitizer: `python -m bench.sanitize [--backend NAME]`.

It calls the backend alone, without matrix products, so that whatever the sanitizer reports is this package's.
Sizes are small and awkward: one column, an odd and an aligned vocabulary, padded rows, an ignored label.
Results are compared with `slime_fused.reference`'s arithmetic, so a run that computes nonsense fails too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from slime_fused.backends import get_backend
from slime_fused.backends.base import (
    Backend,
    HeadTransform,
    LogitsBlock,
    Moments,
    RowFactors,
    RowStats,
    SlimePairs,
    SlimeWeights,
    TokenLoss,
    VocabStats,
    acc_dtype,
)

_ROWS = 5
# The last takes clusters of blocks on compute capability 9.x and 10.x: two in 16 bits, four in float32.
_COLUMNS = (1, 257, 4096, 5003, 33001)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Padding elements after each row, so that rows start at addresses of every alignment.
_PITCHES = (0, 3)
_LENGTHS = (3, 1, 4, 2)  # two pairs
_PAPER = SlimeWeights(0.1, 0.1, 1.0, 1.25, 1.5, 1.0, 2.5, 2.5, pair_weight=0.5, token_weight=0.0)


def _require_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((actual.double() - expected).abs().max())
    if not error <= tolerance:
        raise SystemExit(f"bench.sanitize: {name}: error {error:.3g} exceeds {tolerance:.3g}")


def check_rows(backend: Backend, device: torch.device, columns: int, dtype: torch.dtype, pitch: int) -> None:
    """Residuals at once, and through statistics of two column blocks, against float64."""
    gen = torch.Generator(device=device).manual_seed(columns + pitch)
    storage = torch.randn(_ROWS, columns + pitch, generator=gen, device=device).mul_(3).to(dtype)
    logits = storage[:, :columns]
    labels = torch.randint(columns, (_ROWS,), generator=gen, device=device)
    labels[1] = -1
    acc = acc_dtype(dtype)
    stats = RowStats(*torch.full((3, _ROWS), float("nan"), dtype=acc, device=device).unbind())
    head, plain = HeadTransform(), TokenLoss()
    block = LogitsBlock(logits, labels, None, head)

    keep = (labels >= 0).double()
    truth_lse = torch.logsumexp(logits.double(), 1)
    truth_logp = (logits.double().gather(1, labels.clamp(min=0)[:, None])[:, 0] - truth_lse) * keep
    truth = torch.softmax(logits.double(), 1)
    truth[torch.arange(_ROWS, device=device), labels.clamp(min=0)] -= 1
    truth *= keep[:, None]
    unit = torch.finfo(dtype).eps

    out = torch.full_like(storage, float("nan"))[:, :columns]
    if dtype == torch.float32:
        # The residual of 16-bit operands whose logits are float32.
        for narrow in (torch.bfloat16, torch.float16):
            residual = torch.full_like(storage, float("nan"), dtype=narrow)[:, :columns]
            backend.softmax_residual(block, residual, plain, stats)
            _require_close("softmax_residual, narrow", residual, truth, torch.finfo(narrow).eps + 1e-5)
    backend.softmax_residual(block, out, plain, stats)
    _require_close("softmax_residual lse", stats.row_max + stats.row_sum.log(), truth_lse * keep, 1e-4)
    _require_close("softmax_residual logp", stats.logp, truth_logp, 1e-4)
    _require_close("softmax_residual", out, truth, unit + 1e-5)

    split = columns // 2
    known = torch.zeros(7, _ROWS, dtype=acc, device=device).unbind()
    moments = Moments(*known[4:])
    row_max, row_sum, label_logit, logit_sum = known[:4]
    for wanted in (None, moments):
        vocab_stats = VocabStats(row_max, row_sum, label_logit, logit_sum, wanted)
        for begin, end in ((0, split), (split, columns)):
            if begin == end:
                continue
            part = LogitsBlock(logits[:, begin:end], labels, None, head, begin, columns)
            backend.logits_stats(part, vocab_stats, merge=begin > 0)
        _require_close("logits_stats lse", known[0] + known[1].log(), truth_lse, 1e-4)
        _require_close("logits_stats sum", known[3], logits.double().sum(1), 1e-2)
    log_p = torch.log_softmax(logits.double(), 1)
    truth_entropy = -(log_p.exp() * log_p).sum(1)
    entropy = known[1].log() - moments.centred_sum / known[1]
    _require_close("logits_stats entropy", entropy, truth_entropy, 1e-4)
    scale = torch.linspace(-1, 1, _ROWS, dtype=acc, device=device)
    slant = truth - keep[:, None] * log_p.exp() * (log_p + truth_entropy[:, None])
    backend.residual_from_stats(block, out, plain, stats, RowFactors(scale, entropy, scale))
    _require_close("residual_from_stats, entropy", out, slant * scale.double()[:, None], 4 * unit + 1e-4)
    backend.residual_from_stats(block, logits, plain, stats, RowFactors(scale))
    _require_close("residual_from_stats", logits, truth * scale.double()[:, None], unit + 1e-5)


def check_segments(backend: Backend, device: torch.device) -> None:
    """Segment sums, the loss terms and the in-place scale."""
    cu_seqlens = torch.tensor([0, *torch.tensor(_LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=device)
    n, pairs = sum(_LENGTHS), len(_LENGTHS) // 2
    logp = -torch.rand(n, device=device, generator=torch.Generator(device=device).manual_seed(1)).mul_(4)
    sums = torch.empty(len(_LENGTHS), device=device)
    truth = torch.stack([part.sum() for part in logp.double().split(_LENGTHS)])
    backend.segment_sum(logp, cu_seqlens, sums, mean=False)
    _require_close("segment_sum", sums, truth, 1e-5)
    spread = torch.empty(n, device=device)
    backend.segment_sum_backward(sums, cu_seqlens, spread, mean=True)
    lengths = torch.tensor(_LENGTHS, device=device)
    _require_close("segment_sum_backward", spread, (truth / lengths).repeat_interleave(lengths), 1e-5)

    terms = SlimePairs(*torch.empty(5, pairs, device=device).unbind())
    d_logp = torch.empty(n, device=device)
    backend.slime_terms(logp, cu_seqlens, _PAPER, terms, d_logp)
    means = truth / lengths
    _require_close("slime_terms chosen", terms.chosen_logps, means[:pairs], 1e-5)
    _require_close("slime_terms rejected", terms.rejected_logps, means[pairs:], 1e-5)
    _require_close("slime_terms anchor", terms.anchor.sum(), -0.1 * means[:pairs].mean(), 1e-5)
    backend.scale_(d_logp, torch.tensor(2.0, device=device))


def main(argv: Sequence[str] | None = None) -> int:
    """Run every check once on one backend."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    backend, device = get_backend(args.backend), torch.device(args.device)
    available, reason = backend.available()
    if not available:
        print(f"bench.sanitize: backend {args.backend} cannot run here: {reason}", file=sys.stderr)
        return 2
    checked = 0
    for dtype in _DTYPES:
        if not backend.supports(device, dtype)[0]:
            continue
        for columns in _COLUMNS:
            for pitch in _PITCHES:
                check_rows(backend, device, columns, dtype, pitch)
                checked += 1
    check_segments(backend, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"bench.sanitize: {checked} row problems and the segment kernels are right on backend {args.backend}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
