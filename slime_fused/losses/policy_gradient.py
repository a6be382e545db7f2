"""The clipped policy-gradient loss of PPO (arXiv 1707.06347) as GRPO, DAPO, Dr. GRPO and GSPO take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from slime_fused.engine.units import Sequences, Tokens, Unit, UnitTerms
from slime_fused.losses.base import Formula, exp_within_range, largest_exponent
from slime_fused.losses.hyperparameters import require_choice, require_number


@dataclass(frozen=True)
class PolicyGradient(Formula):
    """A clipped ratio to the policy that sampled, times an advantage. Unit: a token, or a sequence by ``level``.

    For one token, with ``r = exp(logp - old_logp)`` and the advantage ``A``::

        -min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta * kl
        kl = exp(ref_logp - logp) - (ref_logp - logp) - 1

    ``level``:

    * "token": as above (GRPO, arXiv 2402.03300, eq. 3). Given: ``advantages`` per sequence or per token.
    * "sequence": one ratio per sequence, ``r = exp(mean over its tokens of logp - old_logp)``, for all of its
      tokens (GSPO, arXiv 2507.18071, eq. 5). Given: ``advantages`` per sequence.

    ``normalisation``, what the tokens' values are divided by in the loss:

    * "token": the batch's tokens (DAPO, arXiv 2503.14476);
    * "sequence": the tokens of the sequence, then the batch's sequences (GRPO, GSPO);
    * "constant": ``max_length`` times the batch's sequences (Dr. GRPO, arXiv 2503.20783).

    ``epsilon_high`` above ``epsilon_low`` is DAPO's clip-higher. ``delta``, None or above 1 + ``epsilon_high``,
    bounds what a negative advantage counts (dual clip, arXiv 1912.09729; two-sided clipping, TRL's ``delta``).
    ``beta`` weighs the KL divergence from a reference, by the k3 estimator; above 0 it needs ``ref_token_logps``.

    Given ``old_logps`` (per token, no gradient) may be left out where the policy that sampled is this one: the
    ratio is then 1, and the gradient that of ``-A logp``.

    Ratios count as what float32 (or float64) holds at most, and have no derivative beyond.

    Terms: ``policy``, and ``kl`` where it has a weight. Metrics: ``clip_ratio/low`` and ``clip_ratio/high`` (the
    share of units whose ratio is below the range at a negative advantage, above it at a positive one), ``ratio``
    (its mean, before clipping) and, where it has a weight, ``kl`` (its mean over the batch's tokens).

    Raises TypeError for a hyperparameter of the wrong kind, ValueError for one out of its range or of no use.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    level: Literal["token", "sequence"] = "token"
    normalisation: Literal["token", "sequence", "constant"] = "token"
    max_length: int | None = None

    def __post_init__(self) -> None:
        require_number(self, "epsilon_low", least=0, most=1)
        require_number(self, "epsilon_high", least=0)
        if self.delta is not None:
            require_number(self, "delta", above=1 + self.epsilon_high)
        require_number(self, "beta", least=0)
        require_choice(self, "level", ("token", "sequence"))
        require_choice(self, "normalisation", ("token", "sequence", "constant"))
        if self.normalisation == "constant":
            require_number(self, "max_length", least=1)
        elif self.max_length is not None:
            raise ValueError(f"max_length: expected None for {self.normalisation!r}, got {self.max_length!r}")
        super().__post_init__()

    @property
    def unit(self) -> Unit:
        """See `Loss.unit`."""
        return self.level

    @property
    def term_names(self) -> tuple[str, ...]:
        """See `Loss.term_names`."""
        return ("policy", "kl") if self.beta else ("policy",)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """See `Loss.metric_names`."""
        return ("clip_ratio/low", "clip_ratio/high", "ratio", *(("kl",) if self.beta else ()))

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Formula.needs`."""
        return ("advantages", "ref_token_logps") if self.beta else ("advantages",)

    @property
    def takes(self) -> tuple[str, ...]:
        """See `Formula.takes`."""
        return ("old_logps",)

    def values(self, units: Tokens | Sequences) -> UnitTerms:
        """See `Formula.values`."""
        log_ratios = units.logps - units.given.get("old_logps", units.logps).detach()
        if self.level == "sequence":
            log_ratios = cast(Sequences, units).mean_over_tokens(log_ratios)
        advantages = units.given["advantages"].to(log_ratios.dtype)
        ratios = exp_within_range(log_ratios)
        clipped = ratios.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        bounded = ratios if self.delta is None else ratios.clamp(max=self.delta)
        policy = -torch.minimum(bounded * advantages, clipped * advantages)
        policy = policy * self._weights_of_units(units)
        seen = ratios.detach()
        metrics = {
            "clip_ratio/low": ((seen < 1 - self.epsilon_low) & (advantages < 0)).to(seen.dtype),
            "clip_ratio/high": ((seen > 1 + self.epsilon_high) & (advantages > 0)).to(seen.dtype),
            "ratio": seen,
        }
        if not self.beta:
            return UnitTerms(policy, {"policy": policy}, metrics)
        log_to_ref = units.given["ref_token_logps"] - units.logps
        log_to_ref = log_to_ref.clamp(max=largest_exponent(log_to_ref.dtype))
        kl = torch.expm1(log_to_ref) - log_to_ref
        weighted = self.beta * self._weights_of_tokens(units) * kl
        metrics["kl"] = kl.detach()
        if self.level == "sequence":
            sequences = cast(Sequences, units)
            weighted = sequences.sum_over_tokens(weighted)
            per_token = sequences.batch.sequences / (sequences.batch.tokens or 1.0)
            metrics["kl"] = sequences.sum_over_tokens(metrics["kl"]) * per_token
        return UnitTerms(policy + weighted, {"policy": policy, "kl": weighted}, metrics)

    def _weights_of_tokens(self, units: Tokens | Sequences) -> Tensor | float:
        """(n,) or a number: what a token's value counts in its unit's, of which the batch's mean is taken."""
        batch = units.batch
        if self.normalisation == "token":
            return batch.units(self.level) / (batch.tokens or 1.0)
        per_sequence = batch.units(self.level) / batch.sequences
        if self.normalisation == "constant":
            return per_sequence / cast(int, self.max_length)
        return per_sequence / self._lengths_by_token(units).clamp(min=1)

    def _weights_of_units(self, units: Tokens | Sequences) -> Tensor | float:
        """As `_weights_of_tokens`, of all tokens that share a ratio."""
        if isinstance(units, Tokens):
            return self._weights_of_tokens(units)
        if self.normalisation == "sequence":
            return (units.lengths > 0).to(units.logps.dtype)
        return units.lengths * self._weights_of_tokens(units)

    @staticmethod
    def _lengths_by_token(units: Tokens | Sequences) -> Tensor:
        return units.sequence_lengths if isinstance(units, Tokens) else units.to_tokens(units.lengths)
