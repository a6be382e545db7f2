"""Losses as values: what a loss of log-probs is, those that ship, and how to write another.

Each is immutable, equal where its hyperparameters are, and says in its docstring what it computes, where that was
published and what it must be given. Pass one to `slime_fused.preference_loss` or `slime_fused.token_policy_loss`;
or a plain function of log-probs (see `Own`).
"""

from slime_fused.engine.units import Pairs, Sequences, Tokens, UnitTerms
from slime_fused.losses.alphapo import AlphaPO
from slime_fused.losses.base import Formula
from slime_fused.losses.cpo import CPO
from slime_fused.losses.dpo import DPO
from slime_fused.losses.kto import KTO
from slime_fused.losses.orpo import ORPO
from slime_fused.losses.own import Own, as_loss
from slime_fused.losses.policy_gradient import PolicyGradient
from slime_fused.losses.sft import SFT
from slime_fused.losses.simpo import SimPO
from slime_fused.losses.slime import Slime

SlimeLossConfig = Slime
"""The name that `slime_loss` knows it by."""

PairTerms = UnitTerms
"""What a loss says of pairs."""

__all__ = [
    "CPO",
    "DPO",
    "KTO",
    "ORPO",
    "SFT",
    "AlphaPO",
    "Formula",
    "Own",
    "PairTerms",
    "Pairs",
    "PolicyGradient",
    "Sequences",
    "SimPO",
    "Slime",
    "SlimeLossConfig",
    "Tokens",
    "UnitTerms",
    "as_loss",
]
