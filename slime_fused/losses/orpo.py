"""ORPO (arXiv 2403.07691): likelihood and an odds ratio, no reference model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slime_fused.engine.units import Pairs, UnitTerms
from slime_fused.losses.hyperparameters import require_number
from slime_fused.losses.pairwise import NllReduction, PairFormula, logistic


@dataclass(frozen=True)
class ORPO(PairFormula):
    """Odds Ratio Preference Optimization. Unit: a pair. No reference model.

    With ``m_w``, ``m_l`` the mean log-probs of the chosen and the rejected response and
    ``log_odds(m) = m - log(1 - exp(m))`` (arXiv 2403.07691, eq. 4 to 7)::

        -m_w - beta * log sigma(log_odds(m_w) - log_odds(m_l))

    ``beta`` is the paper's lambda. The first term is the NLL of the chosen response, ``nll_weight`` times. The
    paper takes its mean over each response (``nll_reduction`` "sequence"); its authors' code and TRL take one mean
    over all chosen tokens of the batch ("token"), and count the prompt's among them, which here only labelled
    tokens do.

    A mean log-prob above minus the machine epsilon of its dtype counts as that in the odds, so that a response of
    probability 1 has a finite loss; its derivative is the one at that place.

    Terms: ``preference`` (the odds ratio's) and ``nll``. Metrics: ``rewards/chosen`` and ``rewards/rejected``,
    ``beta m_w`` and ``beta m_l``, and ``rewards/accuracies``.

    Raises TypeError for a hyperparameter of the wrong kind, ValueError for one out of its range.
    """

    beta: float = 0.1
    nll_weight: float = 1.0
    nll_reduction: NllReduction = "sequence"

    def __post_init__(self) -> None:
        require_number(self, "beta", least=0)
        self.check_nll()
        super().__post_init__()

    def values(self, units: Pairs) -> UnitTerms:
        """See `Formula.values`."""
        chosen, rejected = units.chosen_mean_logps, units.rejected_mean_logps
        preference = self.beta * logistic(log_odds(chosen) - log_odds(rejected))
        return self.with_nll(units, preference, self.beta * chosen, self.beta * rejected)


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, with a derivative where p rounds to 1, too.

    expm1 keeps 1 - p exact where p is near 1. Where p is near 0 the logarithm of 1 - p is exact to an absolute
    rounding error, which is all that counts beside log p.

    Log-probs above -eps come of a softmax that rounded. Its residual still holds a 1 - p of up to eps / 2, which
    meets the derivative 1 / (1 - p) there: a larger derivative would make any number of that.
    """
    known = logps.detach()
    below_zero = logps + (known.clamp(max=-torch.finfo(logps.dtype).eps) - known)
    return below_zero - torch.log(-torch.expm1(below_zero))
