"""The cross-entropy of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from slime_fused.engine.units import Tokens, Unit, UnitTerms
from slime_fused.losses.base import Formula


@dataclass(frozen=True)
class SFT(Formula):
    """Negative log-likelihood: ``-logp``, the mean over the batch's labelled tokens. Unit: a token.

    ``loss_weights`` weighs tokens; the mean stays one over all labelled tokens. No term is named beside the loss.
    """

    @property
    def unit(self) -> Unit:
        """See `Loss.unit`."""
        return "token"

    def values(self, units: Tokens) -> UnitTerms:
        """See `Formula.values`."""
        return UnitTerms(-units.logps)
