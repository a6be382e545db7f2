"""Fused linear-head losses for LLM preference training: SLIME (arXiv 2602.02383), cross-entropy, log-probs.

Hidden states and the head's weight go in; the loss and exact gradients come out; the (tokens x vocabulary) logits
never exist whole. See `slime_loss`. `slime_fused.reference` holds every function in plain PyTorch.
"""

from slime_fused import losses, reference
from slime_fused.backends import available_backends
from slime_fused.engine.buffers import empty_cache, set_cache_limit
from slime_fused.engine.layout import TokenLayout
from slime_fused.functional.cross_entropy import cross_entropy
from slime_fused.functional.explain import explain_plan
from slime_fused.functional.policy import token_policy_loss
from slime_fused.functional.preference import preference_loss, slime_loss
from slime_fused.functional.terms import slime_terms
from slime_fused.functional.token_layout import token_layout
from slime_fused.functional.tokens import linear_cross_entropy, linear_logprobs, sequence_logprobs
from slime_fused.info import build_info
from slime_fused.losses import SlimeLossConfig
from slime_fused.modules import LinearCrossEntropyLoss, SlimeLoss
from slime_fused.output import PolicyOutput, PreferenceOutput, SlimeOutput, TokenStatistics

__all__ = [
    "LinearCrossEntropyLoss",
    "PolicyOutput",
    "PreferenceOutput",
    "SlimeLoss",
    "SlimeLossConfig",
    "SlimeOutput",
    "TokenLayout",
    "TokenStatistics",
    "available_backends",
    "build_info",
    "cross_entropy",
    "empty_cache",
    "explain_plan",
    "linear_cross_entropy",
    "linear_logprobs",
    "losses",
    "preference_loss",
    "reference",
    "sequence_logprobs",
    "set_cache_limit",
    "slime_loss",
    "slime_terms",
    "token_layout",
    "token_policy_loss",
]
__version__ = "0.1.0"
