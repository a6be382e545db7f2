"""Hyperparameters of the SLIME loss, validated when they are set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from slime_fused.losses.hyperparameters import require_choice, require_number

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on

StabilizerReduction = Literal["sequence", "token"]
_REDUCTIONS = ("sequence", "token")
NUMBERS = ("lambda_w", "lambda_l", "lambda_d", "delta", "margin_hard", "margin_soft", "kappa", "power")
"""Fields that are numbers, in order."""


@dataclass(frozen=True)
class SlimeHyperparameters:
    """Hyperparameters of SLIME (arXiv 2602.02383, eq. 5 to 10), in the paper's names and with its defaults.

    For a pair with mean log-probs ``m_w`` (chosen) and ``m_l`` (rejected) and the margin ``D = m_w - m_l``::

        anchor     = -lambda_w * m_w
        margin     =  lambda_d * max(0, margin_hard - D) * sigmoid(-kappa * (D - margin_soft))
        stabilizer =  lambda_l * mean over rejected tokens of softplus(-logp_t - delta) ** power

    ``stabilizer_reduction="sequence"`` (the paper) averages the stabilizer over the tokens of each rejected
    response and then over pairs; ``"token"`` (the authors' code) takes one mean over all rejected tokens of the
    batch, so that long responses weigh more.

    Raises ValueError for a negative weight, ``kappa <= 0``, ``power < 1``, a non-finite value or an unknown
    reduction, and TypeError for a value that is no number.
    """

    lambda_w: float = 0.1
    lambda_l: float = 0.1
    lambda_d: float = 1.0
    delta: float = 1.25
    margin_hard: float = 1.5
    margin_soft: float = 1.0
    kappa: float = 2.5
    power: float = 2.5
    stabilizer_reduction: StabilizerReduction = "sequence"

    def __post_init__(self) -> None:
        for name in NUMBERS:
            require_number(self, name)
        for name in ("lambda_w", "lambda_l", "lambda_d"):
            require_number(self, name, least=0, kind="weight")
        require_number(self, "kappa", above=0)
        require_number(self, "power", least=1)
        require_choice(self, "stabilizer_reduction", _REDUCTIONS)

    @classmethod
    def authors_code(cls, *, triple: bool = False) -> Self:
        """The values and the reduction of the authors' training script, to match a run of it number for number.

        ``triple=True`` also reproduces that their trainer computes the loss three times and sums it.
        """
        times = 3.0 if triple else 1.0
        return cls(
            lambda_w=0.1 * times,
            lambda_l=0.0005 * times,
            lambda_d=1.0 * times,
            stabilizer_reduction="token",
        )
