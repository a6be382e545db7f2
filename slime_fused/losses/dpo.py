"""DPO (arXiv 2305.18290) and its close relatives: losses of the log-ratio to a reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slime_fused.engine.units import Pairs, UnitTerms
from slime_fused.losses.hyperparameters import require_choice, require_flag, require_number
from slime_fused.losses.pairwise import NllReduction, PairFormula, logistic

_LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust")


@dataclass(frozen=True)
class DPO(PairFormula):
    """Direct Preference Optimization. Unit: a pair. Needs the reference model's log-probs.

    With ``d_w``, ``d_l`` the summed log-probs of the chosen and the rejected response minus the reference's, and
    ``x = beta * (d_w - d_l)``, the values are, by ``loss_type``:

    * "sigmoid": ``-log sigma(x)`` (arXiv 2305.18290, eq. 7). With ``label_smoothing`` eps (cDPO):
      ``-(1 - eps) log sigma(x) - eps log sigma(-x)``.
    * "robust": ``(-(1 - eps) log sigma(x) + eps log sigma(-x)) / (1 - 2 eps)`` (rDPO, arXiv 2403.00409), with
      ``label_smoothing`` eps < 1/2 the probability that a label is flipped.
    * "hinge": ``max(0, 1 - x)`` (SLiC's hinge on the log-ratio: RSO, arXiv 2309.06657).
    * "ipo": ``(d_w / |y_w| - d_l / |y_l| - 1 / (2 beta))^2`` (arXiv 2310.12036, eq. 17, whose authors use means
      over tokens; ``beta`` is their tau).

    ``length_normalised`` divides ``d_w`` and ``d_l`` by the responses' tokens (Tulu 3, arXiv 2411.15124); IPO
    always does.

    ``dpop`` is DPO-Positive's lambda (arXiv 2402.13228): ``max(0, -d_w)`` times it comes off
    the margin. For "sigmoid" alone.

    ``ld_alpha`` in [0, 1] is LD-DPO's alpha (arXiv 2409.06411): tokens past the length of the shorter response of a
    pair weigh that much in the sums, the policy's and the reference's, which must be given per token. None is DPO.

    ``nll_weight`` times the chosen response's negative log-likelihood per token is added (RPO, arXiv 2404.19733,
    eq. 1). ``nll_reduction="sequence"``, as published, takes the mean over each response; "token" the mean over the
    batch's chosen tokens, as TRL does (formerly ``rpo_alpha``, now ``loss_type=["sigmoid", "sft"]``).

    There is no reference-free kind: that is `CPO` with ``nll_weight=0``.

    Terms: ``preference``, and ``nll`` where it has a weight. Metrics: ``rewards/chosen`` and ``rewards/rejected``,
    ``beta`` times ``d_w`` and ``d_l`` as the loss compares them, and ``rewards/accuracies``.

    Raises TypeError for a hyperparameter of the wrong kind, ValueError for one out of its range or of no use.
    """

    beta: float = 0.1
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    label_smoothing: float = 0.0
    length_normalised: bool = False
    dpop: float = 0.0
    ld_alpha: float | None = None
    nll_weight: float = 0.0
    nll_reduction: NllReduction = "sequence"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_choice(self, "loss_type", _LOSS_TYPES)
        require_number(self, "label_smoothing", least=0, below=0.5)
        require_flag(self, "length_normalised")
        require_number(self, "dpop", least=0)
        if self.ld_alpha is not None:
            require_number(self, "ld_alpha", least=0, most=1)
        self.check_nll()
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing: expected 0 for {self.loss_type!r}, got {self.label_smoothing!r}")
        if self.dpop and self.loss_type != "sigmoid":
            raise ValueError(f"dpop: expected 0 for {self.loss_type!r}, got {self.dpop!r}")
        super().__post_init__()

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Formula.needs`."""
        return ("ref_logps",) if self.ld_alpha is None else ("ref_token_logps",)

    def values(self, units: Pairs) -> UnitTerms:
        """See `Formula.values`."""
        ratios = self._log_ratios(units)
        if self.length_normalised or self.loss_type == "ipo":
            ratios = ratios / units.lengths.clamp(min=1)
        chosen, rejected = ratios[: units.count], ratios[units.count :]
        margins = chosen - rejected
        if self.dpop:
            margins = margins - self.dpop * torch.relu(-chosen)
        return self.with_nll(units, self._preference(margins), self.beta * chosen, self.beta * rejected)

    def _preference(self, margins: Tensor) -> Tensor:
        if self.loss_type == "ipo":
            return (margins - 1 / (2 * self.beta)) ** 2
        scaled = self.beta * margins
        if self.loss_type == "hinge":
            return torch.relu(1 - scaled)
        if self.loss_type == "sigmoid":
            return logistic(scaled, self.label_smoothing)
        eps = self.label_smoothing
        flipped = eps * logistic(-scaled) if eps else 0.0
        return ((1 - eps) * logistic(scaled) - flipped) / (1 - 2 * eps)

    def _log_ratios(self, pairs: Pairs) -> Tensor:
        """(2p,) the policy's summed log-probs minus the reference's."""
        if self.ld_alpha is None:
            return pairs.sum_logps - pairs.ref_sum_logps
        differences = pairs.logps - pairs.given["ref_token_logps"]
        shared = torch.minimum(pairs.chosen_lengths, pairs.rejected_lengths).long()
        begins = pairs.bounds[:-1].long()
        places = torch.arange(differences.shape[0], device=differences.device)
        is_tail = places >= pairs.to_tokens(begins + torch.cat([shared, shared]))
        return pairs.sum_over_tokens(torch.where(is_tail, self.ld_alpha * differences, differences))
