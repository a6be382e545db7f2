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
    def of(cls, d_loss: Tensor, d_entropy: Tensor | None) -> tuple[Mix | None, Tensor]:
        """(shares, what they are shares of), from coefficients (M,); (None, ``d_loss``) where it stands alone."""
        if d_entropy is None:
            return None, d_loss
        largest = torch.maximum(d_loss.abs(), d_entropy.abs())
        divisor = torch.where(largest == 0, 1, largest)
        return cls(d_loss / divisor, d_entropy / divisor), largest

    def span(self, begin: int, end: int) -> Mix:
        """Of the rows begin to end."""
        return Mix(self.loss[begin:end], self.entropy[begin:end])

    def bound(self, loss_bound: Tensor, stats: RowResults) -> Tensor:
        """(M,) what no entry of the residual is above, where ``loss_bound`` bounds the token loss's alone."""
        assert stats.distribution is not None
        entropy_bound = stats.distribution.entropy + LARGEST_TERM
        return self.loss.abs() * loss_bound + self.entropy.abs() * entropy_bound


def row_factors(mix: Mix | None, stats: RowResults, gain: Tensor | None, part: slice) -> RowFactors:
    """For `Backend.residual_from_stats` of the rows of ``part``, each times its ``gain`` where there is one.

    ``stats`` are those rows' alone, ``mix`` and ``gain`` (M,) of all.
    """
    own_gain = None if gain is None else gain[part]
    if mix is None:
        return RowFactors(own_gain)
    assert stats.distribution is not None
    loss, entropy = mix.loss[part], mix.entropy[part]
    if own_gain is not None:
        loss, entropy = loss * own_gain, entropy * own_gain
    return RowFactors(loss, stats.distribution.entropy, entropy)
