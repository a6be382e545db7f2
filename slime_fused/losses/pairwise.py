"""What losses of pairs have in common: the logistic loss of a margin, the chosen side's NLL, rewards to log."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from slime_fused.engine.units import Pairs, UnitTerms
from slime_fused.losses.base import Formula
from slime_fused.losses.hyperparameters import require_choice, require_number

NllReduction = Literal["sequence", "token"]

_TERMS = ("preference", "nll")
_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies")


class PairFormula(Formula):
    """A loss of pairs that compares two responses and may add the chosen one's negative log-likelihood.

    A subclass is a frozen dataclass with the two fields below.
    """

    nll_weight: float
    nll_reduction: NllReduction

    def check_nll(self) -> None:
        """Refuse values of the two fields that mean nothing."""
        require_number(self, "nll_weight", least=0)
        require_choice(self, "nll_reduction", ("sequence", "token"))

    @property
    def term_names(self) -> tuple[str, ...]:
        """See `Loss.term_names`."""
        return _TERMS if self.nll_weight else _TERMS[:1]

    @property
    def metric_names(self) -> tuple[str, ...]:
        """See `Loss.metric_names`."""
        return _METRICS

    def with_nll(self, pairs: Pairs, preference: Tensor, chosen: Tensor, rejected: Tensor) -> UnitTerms:
        """The (p,) values of the comparison, with the NLL and, to log, with both sides' implicit rewards."""
        chosen, rejected = chosen.detach(), rejected.detach()
        accuracies = (chosen > rejected).to(chosen.dtype)
        metrics = dict(zip(_METRICS, (chosen, rejected, accuracies), strict=True))
        if not self.nll_weight:
            return UnitTerms(preference, {"preference": preference}, metrics)
        nll = self.nll_weight * chosen_nll(pairs, self.nll_reduction)
        return UnitTerms(preference + nll, {"preference": preference, "nll": nll}, metrics)


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
    return -pairs.chosen_sum_logps * (pairs.batch.pairs / (pairs.batch.chosen_tokens or 1.0))
