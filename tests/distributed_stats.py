"""The statistics of a vocabulary that a group holds together, against those of one process that holds all of it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from slime_fused.backends.base import HeadTransform, LogitsBlock, Moments, VocabStats
from slime_fused.backends.torch import TorchBackend
from slime_fused.engine.distributed import VocabShard


def check_merged_stats(group: dist.ProcessGroup, bounds: tuple[int, ...], *, with_moments: bool) -> None:
    """Maxima in every shard, labels in every shard and none, a shard of -inf alone, and a row of -inf alone."""
    rank, vocab = dist.get_rank(group), bounds[-1]
    generator = torch.Generator().manual_seed(3)
    raw = 4 * torch.randn(12, vocab, generator=generator, dtype=torch.float64)
    raw[0, bounds[1] :] = raw[1, : bounds[2]] = raw[2] = -torch.inf
    raw[3, 7] = raw[3, 90] = 60.0  # equal maxima, of which the label is the second
    labels = torch.randint(0, vocab, (12,), generator=generator)
    labels[3:8] = torch.tensor([90, -1, 0, bounds[1], vocab - 1])

    def stats_of(begin: int, end: int) -> VocabStats:
        columns = torch.full((7, len(raw)), torch.nan, dtype=torch.float64).unbind()
        stats = VocabStats(*columns[:4], Moments(*columns[4:]) if with_moments else None)
        transform = HeadTransform(scale=0.9, temperature=1.5)
        TorchBackend().logits_stats(LogitsBlock(raw[:, begin:end], labels, None, transform, begin, vocab), stats)
        return stats

    whole, own = stats_of(0, vocab), stats_of(bounds[rank], bounds[rank + 1])
    VocabShard(group, bounds[rank], vocab, max(bounds)).merge(own)
    pairs = [
        (getattr(own, name), getattr(whole, name)) for name in ("row_max", "row_sum", "label_logit", "logit_sum")
    ]
    if own.moments is not None and whole.moments is not None:
        pairs += zip(vars(own.moments).values(), vars(whole.moments).values(), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
