"""The losses that ``slime-train --loss`` knows, and what their hyperparameters are."""

from __future__ import annotations

from dataclasses import fields

from slime_fused.losses import KTO, Formula
from slime_fused.losses.names import PAIR_LOSSES

LOSSES: dict[str, type[Formula]] = {**PAIR_LOSSES, "kto": KTO}

DEFAULTS = {"kto": {"baseline": "batch"}}
"""Defaults of settings that are not those of the loss itself: a KL baseline cannot be given on a command line."""

UNSERVED = ("ld_alpha",)
"""Hyperparameters that no run can have, for the reason that `check_needs` gives: no help speaks of them."""

_HELP = {
    "beta": "Scale of the rewards: of log-probs, or of their ratio to the reference's.",
    "orpo.beta": "Weight of the odds ratio, the paper's lambda.",
    "gamma": "Target margin of the rewards.",
    "alpha": "Shape of the reward; 0 is SimPO.",
    "loss_type": "Function of the margin.",
    "label_smoothing": "Probability that a label is wrong.",
    "length_normalised": "Divide the log-ratios by the responses' tokens.",
    "dpop": "DPO-Positive's lambda: holds the chosen response at the reference's likelihood.",
    "nll_weight": "Weight of the chosen response's negative log-likelihood per token.",
    "nll_reduction": "'sequence': its mean over each response; 'token': over all chosen tokens of the step.",
    "desirable_weight": "Weight of chosen (desirable) responses.",
    "undesirable_weight": "Weight of rejected (undesirable) responses.",
    "baseline": "The KL divergence in the loss: 'batch' estimates it from the batch's own responses; 'zero': none.",
}


def hyperparameters(loss: str) -> dict[str, str]:
    """Names and help texts of the hyperparameters of a loss but for those `UNSERVED`; for SLIME without the texts,
    which its config has.
    """
    names = [field.name for field in fields(LOSSES[loss]) if field.name not in UNSERVED]  # type: ignore[arg-type]
    return {name: _HELP.get(f"{loss}.{name}", _HELP.get(name, "")) for name in names}


def losses_with(name: str) -> list[str]:
    """The losses that have a hyperparameter of that name."""
    return [loss for loss in LOSSES if name in hyperparameters(loss)]
