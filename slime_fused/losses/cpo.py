"""CPO (arXiv 2401.08417): DPO without a reference model, with a likelihood term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from slime_fused.engine.units import Pairs, UnitTerms
from slime_fused.losses.hyperparameters import require_choice, require_number
from slime_fused.losses.pairwise import NllReduction, PairFormula, logistic

_LOSS_TYPES = ("sigmoid", "hinge", "ipo")


@dataclass(frozen=True)
class CPO(PairFormula):
    """Contrastive Preference Optimization. Unit: a pair. No reference model.

    With ``s_w``, ``s_l`` the summed log-probs of the chosen and the rejected response, and
    ``x = beta * (s_w - s_l)``, the values are, by ``loss_type``:

    * "sigmoid": ``-(1 - eps) log sigma(x) - eps log sigma(-x)`` with eps = ``label_smoothing`` (0 in the paper,
      arXiv 2401.08417, section 3);
    * "hinge": ``max(0, 1 - x)``;
    * "ipo": ``(m_w - m_l - 1 / (2 beta))^2`` of the mean log-probs (arXiv 2310.12036), as TRL has these two.

    ``nll_weight`` times the chosen response's negative log-likelihood is added: TRL's ``cpo_alpha``, 1 in the
    paper. The paper writes that of whole responses; the authors' code and TRL take the mean over the batch's
    chosen tokens (``nll_reduction`` "token"), and so does this. "sequence" takes that over each response.

    Terms: ``preference``, and ``nll`` where it has a weight. Metrics: ``rewards/chosen`` and ``rewards/rejected``,
    ``beta`` times the log-probs as the loss compares them, and ``rewards/accuracies``.

    Raises TypeError for a hyperparameter of the wrong kind, ValueError for one out of its range or of no use.
    """

    beta: float = 0.1
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    nll_weight: float = 1.0
    nll_reduction: NllReduction = "token"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_choice(self, "loss_type", _LOSS_TYPES)
        require_number(self, "label_smoothing", least=0, below=0.5)
        self.check_nll()
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing: expected 0 for {self.loss_type!r}, got {self.label_smoothing!r}")
        super().__post_init__()

    def values(self, units: Pairs) -> UnitTerms:
        """See `Formula.values`."""
        logps = units.mean_logps if self.loss_type == "ipo" else units.sum_logps
        chosen, rejected = logps[: units.count], logps[units.count :]
        if self.loss_type == "ipo":
            preference = (chosen - rejected - 1 / (2 * self.beta)) ** 2
        elif self.loss_type == "hinge":
            preference = torch.relu(1 - self.beta * (chosen - rejected))
        else:
            preference = logistic(self.beta * (chosen - rejected), self.label_smoothing)
        return self.with_nll(units, preference, self.beta * chosen, self.beta * rejected)
