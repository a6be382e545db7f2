"""What is known of each row of logits: statistics over the vocabulary, and the log-probs and losses they make."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slime_fused.backends.base import Backend, HeadTransform, TokenLoss, acc_dtype


@dataclass(frozen=True)
class TokenStats:
    """What a forward pass knows of each labelled row: (N,) tensors in acc dtype."""

    row_max: Tensor
    row_sum: Tensor
    """sum_v exp(z_v - row_max): the log-sum-exp is never rounded to one number (`Backend.softmax_residual`)."""
    logp: Tensor
    loss: Tensor

    @classmethod
    def empty(cls, rows: int, hidden: Tensor) -> TokenStats:
        """Uninitialised, for ``rows`` rows of ``hidden``."""
        return cls(*(hidden.new_empty(rows, dtype=acc_dtype(hidden.dtype)) for _ in range(4)))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four, in order."""
        return self.row_max, self.row_sum, self.logp, self.loss

    def span(self, begin: int, end: int) -> TokenStats:
        """Views of the rows begin to end."""
        return TokenStats(*(values[begin:end] for values in self.tensors()))

    def copy_(self, other: TokenStats) -> None:
        """Take over the values of as many rows."""
        for own, value in zip(self.tensors(), other.tensors(), strict=True):
            own.copy_(value)


@dataclass(frozen=True)
class VocabStats:
    """What a backend says of (M,) rows of logits, in acc dtype: see `Backend.logits_stats`."""

    row_max: Tensor
    row_sum: Tensor
    label_logit: Tensor
    logit_sum: Tensor | None
    """None where the loss does not need it."""

    @classmethod
    def empty(cls, rows: Tensor, token_loss: TokenLoss) -> VocabStats:
        """Uninitialised, for the (M, ...) ``rows``."""
        shape = (4 if token_loss.label_smoothing else 3, rows.shape[0])
        row_max, row_sum, label_logit, *logit_sum = rows.new_empty(shape, dtype=acc_dtype(rows.dtype)).unbind()
        return cls(row_max, row_sum, label_logit, logit_sum[0] if logit_sum else None)

    @classmethod
    def of_logits(
        cls,
        backend: Backend,
        logits: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        transform: HeadTransform,
        token_loss: TokenLoss,
        *,
        col_offset: int = 0,
    ) -> VocabStats:
        """Of (M, V) raw logits, which stay as they are. A row without a label gets numbers too."""
        stats = cls.empty(logits, token_loss)
        backend.logits_stats(
            logits,
            labels,
            bias,
            transform,
            col_offset=col_offset,
            row_max=stats.row_max,
            row_sum=stats.row_sum,
            label_logit=stats.label_logit,
            logit_sum=stats.logit_sum,
            merge=False,
        )
        return stats

    def finish(self, token_loss: TokenLoss, vocab_size: int) -> TokenStats:
        """Log-probs (written over the label's logits) and losses; these statistics are the whole vocabulary's."""
        log_sum = self.row_sum.log()
        logp = self.label_logit.sub_(self.row_max).sub_(log_sum)
        loss = (token_loss.label_smoothing - 1) * logp
        lse = log_sum.add_(self.row_max)
        if self.logit_sum is not None:
            loss += token_loss.label_smoothing * (lse - self.logit_sum / vocab_size)
        if token_loss.z_loss:
            loss += token_loss.z_loss * lse**2
        return TokenStats(self.row_max, self.row_sum, logp, loss)
