"""What trainers report of a batch of pairs, whatever names they have for the rest.

``rewards/*`` are implicit rewards as the loss compares them: beta times the log-ratio to the reference for DPO and
KTO, beta times the mean log-prob for SimPO and ORPO, ...; for SLIME, and for a loss of your own that tells none,
the mean log-prob itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from slime_fused.losses import KTO, Formula, Slime
from slime_fused.model.items import PairCounts
from slime_fused.model.terms import logged_term

SIDES = ("chosen", "rejected")


def part_means(loss: Formula, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Means over the loss's units: its terms, and what else it tells, but for rewards."""
    means = {logged_term(loss, name): outputs[f"terms/{name}"] for name in loss.term_names}
    others = [name for name in loss.metric_names if not name.startswith(("rewards/", "share/"))]
    return means | {f"{loss.name.lower()}/{name}": outputs[f"metrics/{name}"] for name in others}


def side_means(prefix: str, values: Tensor) -> dict[str, Tensor]:
    """Means over pairs of ``values`` (2P,), by name: ``prefix/chosen``, ``prefix/rejected``."""
    return {f"{prefix}/{side}": x.mean() for side, x in zip(SIDES, values.chunk(2), strict=True)}


def reward_means(
    loss: Formula, outputs: Mapping[str, Tensor], counts: PairCounts, ref_sums: Tensor | None
) -> dict[str, Tensor]:
    """Means over pairs: rewards, and SLIME's ``active_fraction``. ``ref_sums`` (2P,): the reference's, for KTO."""
    if "rewards/chosen" in loss.metric_names:
        told = {name: outputs[f"metrics/{name}"] for name in loss.metric_names if name.startswith("rewards/")}
        told["rewards/margins"] = told["rewards/chosen"].double() - told["rewards/rejected"].double()
        return told
    rewards = outputs["mean_logps"].double()
    if isinstance(loss, KTO):
        assert ref_sums is not None  # among what KTO is given
        rewards = loss.beta * (rewards * counts.lengths - ref_sums.double())
    chosen, rejected = rewards.chunk(2)
    margins = chosen - rejected
    told = side_means("rewards", rewards)
    told |= {"rewards/margins": margins.mean(), "rewards/accuracies": (margins > 0).double().mean()}
    if isinstance(loss, Slime):
        # Beyond the hard margin only anchor and stabilizer act.
        told["slime/active_fraction"] = (margins < loss.margin_hard).double().mean()
    return told
