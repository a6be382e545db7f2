"""KTO (arXiv 2402.01306): desirable and undesirable responses that need no partner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slime_fused.engine.units import Sequences, Unit, UnitTerms
from slime_fused.losses.base import Formula
from slime_fused.losses.hyperparameters import require_choice, require_number


@dataclass(frozen=True)
class KTO(Formula):
    """Kahneman-Tversky Optimization. Unit: a sequence. Needs the reference's log-probs and ``desirable`` (s,) bool.

    With ``d`` the summed log-prob of a response minus the reference's and the baseline ``z`` (arXiv 2402.01306,
    section 4; TRL's ``loss_type="kto"``)::

        desirable     desirable_weight   * (1 - sigma(beta * (d - z)))
        undesirable   undesirable_weight * (1 - sigma(beta * (z - d)))

    ``z`` estimates the KL divergence from the reference, is at least 0 and carries no gradient. ``baseline`` says
    where it comes from:

    * "given": the caller's ``kl_baseline``, a 0-dimensional tensor. The authors, and TRL, take prompts with the
      responses of others, and the mean of what policy and reference differ by: `mismatched_baseline`. The loss then
      streams sequence by sequence.
    * "batch": the mean of ``d`` over the batch's own sequences, the estimate where these were sampled from the
      policy. It needs the whole batch, which costs a fourth product where its logits do not fit; each process
      takes its own.
    * "zero": none, which is TRL's ``loss_type="apo_zero_unpaired"``.

    A batch of one kind only is no special case: its mean is over that kind, and the other adds nothing, as in the
    authors' code and in TRL.

    Terms: ``desirable`` and ``undesirable``. Metrics: ``rewards/desirable`` and ``rewards/undesirable``, the sum of
    ``beta d`` over that kind divided by all sequences (divide by the kind's share for its mean),
    ``share/desirable``, and ``kl``, the baseline.

    Raises TypeError for a hyperparameter of the wrong kind, ValueError for one out of its range.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    baseline: Literal["given", "batch", "zero"] = "given"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_number(self, "desirable_weight", least=0)
        require_number(self, "undesirable_weight", least=0)
        require_choice(self, "baseline", ("given", "batch", "zero"))
        super().__post_init__()

    @staticmethod
    def mismatched_baseline(policy_sum_logps: Tensor, ref_sum_logps: Tensor) -> Tensor:
        """The ``kl_baseline`` of mismatched responses: the mean of policy minus reference, at least 0, detached.

        Both (m,): summed log-probs of responses that follow prompts that are not theirs. Where several processes
        share a batch, average their results; TRL does so before it takes the maximum with 0.
        """
        return (policy_sum_logps - ref_sum_logps).detach().mean().clamp(min=0)

    @property
    def unit(self) -> Unit:
        """See `Loss.unit`."""
        return "sequence"

    @property
    def needs_batch(self) -> bool:
        """See `Loss.needs_batch`."""
        return self.baseline == "batch"

    @property
    def term_names(self) -> tuple[str, ...]:
        """See `Loss.term_names`."""
        return ("desirable", "undesirable")

    @property
    def metric_names(self) -> tuple[str, ...]:
        """See `Loss.metric_names`."""
        return ("rewards/desirable", "rewards/undesirable", "share/desirable", "kl")

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Formula.needs`."""
        return ("ref_logps", "desirable", *(("kl_baseline",) if self.baseline == "given" else ()))

    def values(self, units: Sequences) -> UnitTerms:
        """See `Formula.values`."""
        ratios = units.sum_logps - units.ref_sum_logps
        is_desirable = units.given["desirable"].bool()
        baseline = self._baseline(units, ratios)
        # 1 - sigma(x) = sigma(-x), which does not cancel.
        below = self.beta * torch.where(is_desirable, baseline - ratios, ratios - baseline)
        # Written into the log-probs' dtype: of two Python numbers torch.where makes float32.
        weight = torch.full_like(ratios, self.undesirable_weight).masked_fill(is_desirable, self.desirable_weight)
        loss = weight * torch.sigmoid(below)
        rewards, share = self.beta * ratios.detach(), is_desirable.to(ratios.dtype)
        zero = torch.zeros_like(ratios)
        terms = {
            "desirable": torch.where(is_desirable, loss, zero),
            "undesirable": torch.where(is_desirable, zero, loss),
        }
        metrics = {
            "rewards/desirable": torch.where(is_desirable, rewards, zero),
            "rewards/undesirable": torch.where(is_desirable, zero, rewards),
            "share/desirable": share,
            "kl": baseline.expand_as(ratios),
        }
        return UnitTerms(loss, terms, metrics)

    def _baseline(self, units: Sequences, ratios: Tensor) -> Tensor:
        if self.baseline == "given":
            return units.given["kl_baseline"].detach().to(ratios.dtype).clamp(min=0)
        return ratios.detach().mean().clamp(min=0) if self.baseline == "batch" else ratios.new_zeros(())
