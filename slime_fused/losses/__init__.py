"""Losses as values: what a loss of log-probs is, those that ship, and how to write another.

Each is immutable, equal where its hyperparameters are, and says in its docstring what it computes, where that was
published and what it must be given. Pass one to `slime_fused.preference_loss` or `slime_fused.token_policy_loss`;
or a plain function of log-probs (see `Own`).
"""

from slime_fused.engine.units import Pairs, Sequences, Tokens, UnitTerms
from slime_fused.losses.base import Formula
from slime_fused.losses.config import SlimeLossConfig
from slime_fused.losses.dpo import DPO
from slime_fused.losses.simpo import SimPO
from slime_fused.losses.slime import Slime

PairTerms = UnitTerms
"""What a loss says of pairs."""

__all__ = [
    "DPO",
    "Formula",
    "PairTerms",
    "Pairs",
    "Sequences",
    "SimPO",
    "Slime",
    "SlimeLossConfig",
    "Tokens",
    "UnitTerms",
]
