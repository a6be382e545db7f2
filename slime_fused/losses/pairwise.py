"""What losses of pairs have in common: the logistic loss of a margin, the chosen side's NLL, rewards to log."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slime_fused.engine.units import Pairs, UnitTerms

NllReduction = Literal["sequence", "token"]
NLL_REDUCTIONS = ("sequence", "token")

PREFERENCE = "preference"
NLL = "nll"
REWARD_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies")


def logistic(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(p,) -(1 - eps) log sigma(x) - eps log sigma(-x), the cross-entropy of a label that is right with 1 - eps."""
    loss = -F.logsigmoid(margins)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margins)
    return loss


def chosen_nll(pairs: Pairs, reduction: NllReduction) -> Tensor:
    """(p,) negative log-likelihood of the chosen responses, per token.

    "sequence": the mean over each response, so that the batch's is a mean of means. "token": such that the mean
    over pairs is the mean over all chosen tokens of the batch.
    """
    if reduction == "sequence":
        return -pairs.chosen_mean_logps
    return -pairs.chosen_sum_logps * (pairs.batch.pairs / max(pairs.batch.chosen_tokens, 1.0))


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """The (p,) implicit rewards, and where the chosen response's is higher, under `REWARD_METRICS`."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return dict(zip(REWARD_METRICS, (chosen, rejected, torch.gt(chosen, rejected).to(chosen.dtype)), strict=True))


def sum_of_terms(terms: dict[str, Tensor], metrics: dict[str, Tensor]) -> UnitTerms:
    """The loss that is the sum of these terms."""
    first, *others = terms.values()
    for term in others:
        first = first + term
    return UnitTerms(first, terms, metrics)
