"""SimPO (arXiv 2405.14734): a margin between mean log-probs, no reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from slime_fused.engine.units import Pairs, UnitTerms
from slime_fused.losses.hyperparameters import require_choice, require_number
from slime_fused.losses.pairwise import NllReduction, PairFormula, logistic


@dataclass(frozen=True)
class SimPO(PairFormula):
    """Simple Preference Optimization. Unit: a pair. No reference model.

    With ``m_w``, ``m_l`` the mean log-probs of the chosen and the rejected response, and
    ``x = beta * (m_w - m_l) - gamma`` (arXiv 2405.14734, eq. 6)::

        "sigmoid"   -(1 - eps) log sigma(x) - eps log sigma(-x),   eps = label_smoothing (0 in the paper)
        "hinge"     max(0, 1 - x)

    ``gamma`` is the paper's target reward margin, and TRL's ``simpo_gamma``. The authors' code takes the ratio
    ``gamma_beta_ratio = gamma / beta`` in its place: see `from_ratio`. The defaults are those of their code, whose
    ratio of 0.25 is a ``gamma`` of 0.5.

    ``nll_weight`` times the chosen response's negative log-likelihood is added: their ``sft_weight``; with it the
    loss is CPO-SimPO, TRL's ``cpo_alpha``. Both take the mean over the batch's chosen tokens (``nll_reduction``
    "token"); "sequence" takes that over each response.

    Terms: ``preference``, and ``nll`` where it has a weight. Metrics: ``rewards/chosen`` and ``rewards/rejected``,
    ``beta m_w`` and ``beta m_l``, and ``rewards/accuracies``.

    Raises TypeError for a hyperparameter of the wrong kind, ValueError for one out of its range or of no use.
    """

    beta: float = 2.0
    gamma: float = 0.5
    loss_type: Literal["sigmoid", "hinge"] = "sigmoid"
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    nll_reduction: NllReduction = "token"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_number(self, "gamma", least=0)
        require_choice(self, "loss_type", ("sigmoid", "hinge"))
        require_number(self, "label_smoothing", least=0, below=0.5)
        self.check_nll()
        if self.label_smoothing and self.loss_type == "hinge":
            raise ValueError(f"label_smoothing: expected 0 for 'hinge', got {self.label_smoothing!r}")
        super().__post_init__()

    @classmethod
    def from_ratio(cls, beta: float = 2.0, gamma_beta_ratio: float = 0.25, **options: float | str) -> SimPO:
        """The loss with ``gamma = gamma_beta_ratio * beta``, as the authors' code counts it."""
        return cls(beta, gamma_beta_ratio * beta, **options)  # type: ignore[arg-type]

    def values(self, units: Pairs) -> UnitTerms:
        """See `Formula.values`."""
        chosen, rejected = self.beta * units.chosen_mean_logps, self.beta * units.rejected_mean_logps
        margins = chosen - rejected - self.gamma
        is_hinge = self.loss_type == "hinge"
        preference = torch.relu(1 - margins) if is_hinge else logistic(margins, self.label_smoothing)
        return self.with_nll(units, preference, chosen, rejected)
