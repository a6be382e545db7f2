"""What `distributed_worker.py` checks of statistics, where a group holds the vocabulary or the tokens together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import slime_fused as sf
from slime_fused.autograd.token_losses import STATISTICS
from slime_fused.backends.base import HeadTransform, LogitsBlock, Moments, VocabStats
from slime_fused.backends.torch import TorchBackend
from slime_fused.engine.distributed import VocabShard
from tests.statistics_support import assert_as_exact, assert_told
from tests.support import Batch, make_batch, pack


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


def check_unit_statistics(call: Callable[..., sf.PreferenceOutput], batch: Batch) -> None:
    """Those that come beside a loss of pairs, on every plan."""
    for workspace in ("1MiB", 3000, 1500):
        out = batch.leaves().call(call, loss=sf.losses.SimPO(), return_stats=STATISTICS, workspace=workspace)
        assert out.stats is not None
        assert_told(out.stats, batch)


def check_statistics_of_own_tokens(group: dist.ProcessGroup) -> None:
    """A process that holds every other token of each sequence is told of these."""
    whole, rank = pack(make_batch(prompt=0, padding=0, has_bias=True), drop=0), dist.get_rank(group)
    assert whole.cu_seqlens is not None
    own = slice(rank, None, 2)
    bounds = (whole.cu_seqlens + 1 - rank) // 2

    def call(*head: Tensor, cu_seqlens: Tensor, **options: Any) -> sf.PreferenceOutput:
        return sf.preference_loss(*head, cu_seqlens=bounds, cp_group=group, **options)

    batch = Batch(whole.hidden[own], whole.weight, whole.labels[own], whole.bias, bounds)
    check_unit_statistics(call, batch)


def statistics_checks(
    shard_vocabulary: Callable[..., Callable[..., Any]],
    bounds: tuple[int, ...],
    dtypes: Mapping[str, torch.dtype],
    workspaces: Mapping[str, Any],
) -> dict[str, Callable[[Any], None]]:
    """By name, given the groups."""

    def whole(dtype: torch.dtype) -> Batch:
        return make_batch(vocab_size=bounds[-1], dtype=dtype, has_bias=True)

    def of_tokens(groups: Any, dtype: torch.dtype, workspace: Any) -> None:
        """All of `TokenStatistics`, and gradients of log-prob and entropy together."""
        call = shard_vocabulary(sf.linear_logprobs, groups.all, bounds)
        assert_as_exact(whole(dtype), call=call, options={"temperature": 0.7}, workspace=workspace)

    return {
        "vocabulary-stats": lambda groups: check_merged_stats(groups.all, bounds, with_moments=False),
        "vocabulary-moments": lambda groups: check_merged_stats(groups.all, bounds, with_moments=True),
        **{
            f"vocabulary-token_statistics-{name}-{size}": lambda groups, d=dtype, w=workspace: of_tokens(
                groups, d, w
            )
            for name, dtype in dtypes.items()
            for size, workspace in workspaces.items()
        },
        "vocabulary-unit_statistics": lambda groups: check_unit_statistics(
            shard_vocabulary(sf.preference_loss, groups.all, bounds), whole(torch.float32)
        ),
        "tokens-unit_statistics": lambda groups: check_statistics_of_own_tokens(groups.row),
    }
