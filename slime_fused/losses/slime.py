"""SLIME (arXiv 2602.02383) as a loss among others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from slime_fused.backends.base import Backend, SlimePairs, SlimeWeights
from slime_fused.engine.units import Pairs, Sequences, Tokens, UnitTerms
from slime_fused.losses.base import WEIGHTS, Formula
from slime_fused.losses.config import NUMBERS, SlimeHyperparameters


@dataclass(frozen=True)
class Slime(SlimeHyperparameters, Formula):
    """Stabilized Likelihood Implicit Margin Enforcement: eq. 5 to 10; formula and fields in `SlimeHyperparameters`.

    Unit: a pair. No reference model. Terms: ``anchor``, ``margin_loss``, ``stabilizer``. Log-probs are means over a
    response's tokens. The derivative is the backends' own.
    """

    def __post_init__(self) -> None:
        SlimeHyperparameters.__post_init__(self)
        Formula.__post_init__(self)

    @classmethod
    def of(cls, config: object) -> Slime:
        """The configuration that was meant: None is the paper's.

        Raises TypeError for what is no configuration.
        """
        if config is None:
            return _PAPER
        if not isinstance(config, cls):
            raise TypeError(f"config: expected a SlimeLossConfig or None, got {type(config).__name__}")
        return config

    @property
    def term_names(self) -> tuple[str, ...]:
        """See `Loss.term_names`."""
        return ("anchor", "margin_loss", "stabilizer")

    def values(self, units: Pairs) -> UnitTerms:
        """The formula, in PyTorch's operators."""
        margins = units.chosen_mean_logps - units.rejected_mean_logps
        hinge = torch.relu(self.margin_hard - margins)
        gate = torch.sigmoid(-self.kappa * (margins - self.margin_soft))
        # softplus is the identity above its threshold: at 40 that is exact in float64, too.
        penalties = F.softplus(-units.logps - self.delta, threshold=40.0) ** self.power
        if self.stabilizer_reduction == "sequence":
            penalty = units.mean_over_tokens(penalties)[units.count :]
        else:
            weight = units.batch.pairs / (units.batch.rejected_tokens or 1.0)
            penalty = units.sum_over_tokens(penalties)[units.count :] * weight
        terms = {
            "anchor": -self.lambda_w * units.chosen_mean_logps,
            "margin_loss": self.lambda_d * hinge * gate,
            "stabilizer": self.lambda_l * penalty,
        }
        return UnitTerms(terms["anchor"] + terms["margin_loss"] + terms["stabilizer"], terms)

    def evaluate(
        self, units: Sequences | Tokens, backend: Backend, *, wants_gradient: bool
    ) -> tuple[UnitTerms, Tensor | None]:
        """See `Loss.evaluate`: by the backend's kernel."""
        pairs = cast(Pairs, units)
        logps = pairs.logps
        out = SlimePairs(*(logps.new_empty(pairs.count) for _ in range(5)))
        d_logps = torch.empty_like(logps) if wants_gradient else None
        backend.slime_terms(logps, pairs.bounds, self._weights(pairs), out, d_logps)
        terms = {name: getattr(out, name) for name in self.term_names}
        if WEIGHTS in pairs.given:
            weights = pairs.given[WEIGHTS].to(pairs.logps.dtype)
            terms = {name: term * weights for name, term in terms.items()}
            if d_logps is not None:
                d_logps = d_logps * pairs.to_tokens(torch.cat([weights, weights]))
        return UnitTerms(terms["anchor"] + terms["margin_loss"] + terms["stabilizer"], terms), d_logps

    def _weights(self, pairs: Pairs) -> SlimeWeights:
        is_token = self.stabilizer_reduction == "token"
        token_weight = 1 / (pairs.batch.rejected_tokens or 1.0) if is_token else 0.0
        numbers = {name: getattr(self, name) for name in NUMBERS}
        return SlimeWeights(**numbers, pair_weight=1 / pairs.batch.pairs, token_weight=token_weight)


_PAPER = Slime()
"""Made once: every `slime_loss` without a configuration would check its fields again."""
