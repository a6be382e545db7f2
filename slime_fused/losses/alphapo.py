"""AlphaPO (arXiv 2501.03884): SimPO with a reward function of another shape."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slime_fused.engine.units import Pairs, UnitTerms
from slime_fused.losses.base import expm1_within_range
from slime_fused.losses.hyperparameters import require_number
from slime_fused.losses.pairwise import NllReduction, PairFormula, logistic

_LEAST_ALPHA = 1e-9
"""Below it the reward is that of alpha 0 to all digits, and beta / alpha may leave float32."""


@dataclass(frozen=True)
class AlphaPO(PairFormula):
    """Alpha Preference Optimization. Unit: a pair. No reference model.

    With ``m_w``, ``m_l`` the mean log-probs of the chosen and the rejected response and the reward
    ``r(m) = beta * (1 - exp(-alpha m)) / alpha``, or ``beta * m`` for ``alpha=0``, which is SimPO::

        -(1 - eps) log sigma(x) - eps log sigma(-x),   x = r(m_w) - r(m_l) - gamma,   eps = label_smoothing

    (arXiv 2501.03884; eps is 0 there.) ``gamma`` is a margin of rewards, as in `SimPO`; the paper tunes all three
    with the model. TRL has it as its ``loss_type="simpo"`` with ``alpha``. ``nll_weight`` and ``nll_reduction`` are
    those of `SimPO`.

    ``-alpha m`` counts as what the exponential of the dtype holds at most (74 in float32: a mean log-prob of -297
    at alpha 0.25); beyond it the reward, and so the loss, is constant.

    Terms: ``preference``, and ``nll`` where it has a weight. Metrics: ``rewards/chosen`` and ``rewards/rejected``,
    ``r(m_w)`` and ``r(m_l)``, and ``rewards/accuracies``.

    Raises TypeError for a hyperparameter of the wrong kind, ValueError for one out of its range.
    """

    alpha: float = 0.25
    beta: float = 2.0
    gamma: float = 0.5
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    nll_reduction: NllReduction = "token"

    def __post_init__(self) -> None:
        require_number(self, "alpha")
        if 0 < abs(self.alpha) < _LEAST_ALPHA:
            raise ValueError(f"alpha: expected 0, or at least {_LEAST_ALPHA} either way, got {self.alpha!r}")
        require_number(self, "beta", above=0)
        require_number(self, "gamma", least=0)
        require_number(self, "label_smoothing", least=0, below=0.5)
        self.check_nll()
        super().__post_init__()

    def values(self, units: Pairs) -> UnitTerms:
        """See `Formula.values`."""
        chosen, rejected = self._reward(units.chosen_mean_logps), self._reward(units.rejected_mean_logps)
        preference = logistic(chosen - rejected - self.gamma, self.label_smoothing)
        return self.with_nll(units, preference, chosen, rejected)

    def _reward(self, mean_logps: Tensor) -> Tensor:
        if self.alpha == 0:
            return self.beta * mean_logps
        return expm1_within_range(-self.alpha * mean_logps) * (-self.beta / self.alpha)
