"""Two gradients of one row of logits in one residual: that of its token loss, and that of its entropy.

With coefficients c = dL/d(token loss) and e = dL/d(entropy) of a row, the larger of |c| and |e| is kept out of the
residual, as c is elsewhere: it meets (rows x hidden) arrays. What stays inside are shares from -1 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slime_fused.backends.base import RowFactors
from slime_fused.engine.row_results import RowResults

LARGEST_TERM = 0.368
"""No p |log p| is larger: 1 / e."""


@dataclass(frozen=True)
class Mix:
    """(M,) shares of the two gradients, in acc dtype."""

    loss: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, d_loss: Tensor, d_entropy: Tensor) -> tuple[Mix, Tensor]:
        """(shares, what they are shares of), from the coefficients (M,)."""
        largest = torch.maximum(d_loss.abs(), d_entropy.abs())
        divisor = torch.where(largest == 0, 1, largest)
        return cls(d_loss / divisor, d_entropy / divisor), largest

    def span(self, begin: int, end: int) -> Mix:
        """Of the rows begin to end."""
        return Mix(self.loss[begin:end], self.entropy[begin:end])

    def factors(self, stats: RowResults, gain: Tensor | None) -> RowFactors:
        """For `Backend.residual_from_stats`, each row times ``gain`` (M,) where there is one."""
        assert stats.distribution is not None
        loss, entropy = (self.loss, self.entropy) if gain is None else (self.loss * gain, self.entropy * gain)
        return RowFactors(loss, stats.distribution.entropy, entropy)

    def bound(self, loss_bound: Tensor, stats: RowResults) -> Tensor:
        """(M,) what no entry of the residual is above, where ``loss_bound`` bounds the token loss's alone."""
        assert stats.distribution is not None
        entropy_bound = stats.distribution.entropy + LARGEST_TERM
        return self.loss.abs() * loss_bound + self.entropy.abs() * entropy_bound
