"""From a backend's statistics over the vocabulary to each row's log-prob, its loss, and what trainers log."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from slime_fused.backends.base import Backend, LogitsBlock, Moments, TokenLoss, TokenStats, VocabStats, acc_dtype


@dataclass(frozen=True)
class Distribution:
    """What one may want to know of each row's softmax beside the label's log-prob: (M,) each, in acc dtype."""

    entropy: Tensor
    """-sum_v p_v log p_v, in nats."""
    sum_sq_probs: Tensor
    """sum_v p_v^2"""
    is_top1: Tensor
    """1 where the label is the likeliest token (of equals the first), else 0."""
    mean_logit: Tensor
    """mean_v z_v"""


@dataclass(frozen=True)
class RowResults(TokenStats):
    """What a forward pass knows of its rows: (M,) each, in acc dtype."""

    distribution: Distribution | None = None
    """None: not wanted."""

    @classmethod
    def empty(cls, rows: int, hidden: Tensor, *, with_distribution: bool = False) -> RowResults:
        """Uninitialised, for ``rows`` rows of ``hidden``."""
        count, dtype = 8 if with_distribution else 4, acc_dtype(hidden.dtype)
        return cls.of([hidden.new_empty(rows, dtype=dtype) for _ in range(count)])

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> RowResults:
        """From the four, or eight, `tensors`."""
        row_max, row_sum, logp, loss, *rest = tensors
        return cls(row_max, row_sum, logp, loss, Distribution(*rest) if rest else None)

    def tensors(self) -> tuple[Tensor, ...]:
        """Four, or eight, in order."""
        d = self.distribution
        rest = () if d is None else (d.entropy, d.sum_sq_probs, d.is_top1, d.mean_logit)
        return self.row_max, self.row_sum, self.logp, self.loss, *rest

    def span(self, begin: int, end: int) -> RowResults:
        """Views of the rows begin to end."""
        return RowResults.of([values[begin:end] for values in self.tensors()])

    def copy_(self, other: RowResults) -> None:
        """Take over the values of as many rows."""
        for own, value in zip(self.tensors(), other.tensors(), strict=True):
            own.copy_(value)


def empty_vocab_stats(rows: Tensor, token_loss: TokenLoss, *, with_distribution: bool = False) -> VocabStats:
    """Uninitialised, for the (M, ...) ``rows``: what ``token_loss`` needs, and a `Distribution` where wanted."""
    has_sum = with_distribution or token_loss.label_smoothing != 0
    count = 3 + int(has_sum) + (3 if with_distribution else 0)
    every = rows.new_empty((count, rows.shape[0]), dtype=acc_dtype(rows.dtype))
    row_max, row_sum, label_logit, *rest = every.unbind()
    moments = Moments(*rest[1:]) if with_distribution else None
    return VocabStats(row_max, row_sum, label_logit, rest[0] if has_sum else None, moments)


def stats_of_logits(
    backend: Backend, block: LogitsBlock, token_loss: TokenLoss, *, with_distribution: bool = False
) -> VocabStats:
    """Of raw logits, which stay as they are. A row without a label gets numbers too."""
    stats = empty_vocab_stats(block.logits, token_loss, with_distribution=with_distribution)
    backend.logits_stats(block, stats)
    return stats


def finish_stats(stats: VocabStats, token_loss: TokenLoss, vocab_size: int) -> RowResults:
    """Log-probs (written over the label's logits) and losses; ``stats`` are the whole vocabulary's."""
    distribution = None if stats.moments is None else _distribution(stats, stats.moments, vocab_size)
    log_sum = stats.row_sum.log()
    logp = stats.label_logit.sub_(stats.row_max).sub_(log_sum)
    loss = (token_loss.label_smoothing - 1) * logp
    lse = log_sum.add_(stats.row_max)
    if stats.logit_sum is not None and token_loss.label_smoothing:
        loss += token_loss.label_smoothing * (lse - stats.logit_sum / vocab_size)
    if token_loss.z_loss:
        loss += token_loss.z_loss * lse**2
    return RowResults(stats.row_max, stats.row_sum, logp, loss, distribution)


def _distribution(stats: VocabStats, moments: Moments, vocab_size: int) -> Distribution:
    assert stats.logit_sum is not None
    is_top1 = (stats.label_logit >= stats.row_max) & (stats.label_logit > moments.max_before)
    return Distribution(
        # As two terms that are not below 0 each: nothing cancels.
        stats.row_sum.log() - moments.centred_sum / stats.row_sum,
        moments.square_sum / stats.row_sum.square(),
        is_top1.to(stats.row_max.dtype),
        stats.logit_sum / vocab_size,
    )
