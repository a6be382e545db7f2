"""What `slime_loss` and `slime_terms` return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SlimeOutput:
    """The SLIME loss and what one wants to log beside it. Only ``loss`` carries a gradient.

    Scalars are 0-dimensional tensors; all are float32 (float64 for float64 inputs).
    """

    loss: Tensor
    """The scalar to call ``backward()`` on."""
    anchor: Tensor
    """Scalar, detached. ``anchor + margin_loss + stabilizer == loss``."""
    margin_loss: Tensor
    """Scalar, detached."""
    stabilizer: Tensor
    """Scalar, detached."""
    chosen_logps: Tensor
    """(P,), detached: mean log-prob of each chosen response."""
    rejected_logps: Tensor
    """(P,), detached: mean log-prob of each rejected response."""

    @property
    def margins(self) -> Tensor:
        """(P,): chosen minus rejected mean log-prob."""
        return self.chosen_logps - self.rejected_logps

    @property
    def accuracy(self) -> Tensor:
        """Scalar: share of pairs whose margin is above 0."""
        return (self.margins > 0).to(self.margins.dtype).mean()
