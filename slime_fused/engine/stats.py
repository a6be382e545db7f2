"""From a backend's statistics over the vocabulary to each row's log-prob and loss."""

from __future__ import annotations

from torch import Tensor

from slime_fused.backends.base import Backend, LogitsBlock, TokenLoss, TokenStats, VocabStats, acc_dtype


def empty_vocab_stats(rows: Tensor, token_loss: TokenLoss) -> VocabStats:
    """Uninitialised, for the (M, ...) ``rows``: what ``token_loss`` needs."""
    shape = (4 if token_loss.label_smoothing else 3, rows.shape[0])
    row_max, row_sum, label_logit, *logit_sum = rows.new_empty(shape, dtype=acc_dtype(rows.dtype)).unbind()
    return VocabStats(row_max, row_sum, label_logit, logit_sum[0] if logit_sum else None)


def stats_of_logits(backend: Backend, block: LogitsBlock, token_loss: TokenLoss) -> VocabStats:
    """Of raw logits, which stay as they are. A row without a label gets numbers too."""
    stats = empty_vocab_stats(block.logits, token_loss)
    backend.logits_stats(block, stats)
    return stats


def finish_stats(stats: VocabStats, token_loss: TokenLoss, vocab_size: int) -> TokenStats:
    """Log-probs (written over the label's logits) and losses; ``stats`` are the whole vocabulary's."""
    log_sum = stats.row_sum.log()
    logp = stats.label_logit.sub_(stats.row_max).sub_(log_sum)
    loss = (token_loss.label_smoothing - 1) * logp
    lse = log_sum.add_(stats.row_max)
    if stats.logit_sum is not None:
        loss += token_loss.label_smoothing * (lse - stats.logit_sum / vocab_size)
    if token_loss.z_loss:
        loss += token_loss.z_loss * lse**2
    return TokenStats(stats.row_max, stats.row_sum, logp, loss)
