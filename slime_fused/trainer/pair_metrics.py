"""What is logged of a batch of preference pairs.

``logps/chosen`` and ``logps/rejected`` are mean log-probs per token; ``logps_sum/*`` are sums over the response,
which TRL calls ``logps/*``. ``rewards/*`` are implicit rewards as the loss compares them: beta times the log-ratio
to the reference for DPO and KTO, beta times the mean log-prob for SimPO and ORPO, ...; for SLIME, and for a loss of
your own that tells none, the mean log-prob itself. ``entropy`` and ``mean_token_accuracy`` are means over response
tokens. Terms of the loss come as ``dpo/preference``, ``slime/anchor``, ...
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from slime_fused.losses import KTO, Formula, Slime
from slime_fused.model.items import PairCounts
from slime_fused.model.terms import logged_term

REFERENCE = "ref_sum_logps"
"""Of a batch and of its outputs: (2P,) a reference's summed log-probs, of the chosen responses first."""

_SIDES = ("chosen", "rejected")


def unit_means(loss: Formula, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Means over the loss's units: its value, its terms, and what else it tells, but for rewards."""
    means = {"loss": outputs["loss"].detach().double()}
    if "aux_loss" in outputs:
        means["aux_loss"] = outputs["aux_loss"].detach().double()
        means["loss"] = means["loss"] + means["aux_loss"]
    means |= {logged_term(loss, name): outputs[f"terms/{name}"] for name in loss.term_names}
    others = [name for name in loss.metric_names if not name.startswith(("rewards/", "share/"))]
    return means | {f"{loss.name.lower()}/{name}": outputs[f"metrics/{name}"] for name in others}


def pair_means(loss: Formula, outputs: Mapping[str, Tensor], counts: PairCounts) -> dict[str, Tensor]:
    """Means over pairs: log-probs and rewards."""
    means = outputs["mean_logps"].double()
    sums = means * counts.lengths
    told: dict[str, Tensor] = {}
    for prefix, values in (("logps", means), ("logps_sum", sums)):
        told |= {f"{prefix}/{side}": x.mean() for side, x in zip(_SIDES, values.chunk(2), strict=True)}
    if "rewards/chosen" in loss.metric_names:
        told |= {name: outputs[f"metrics/{name}"] for name in loss.metric_names if name.startswith("rewards/")}
        told["rewards/margins"] = told["rewards/chosen"].double() - told["rewards/rejected"].double()
        return told
    rewards = loss.beta * (sums - outputs[REFERENCE].double()) if isinstance(loss, KTO) else means
    chosen, rejected = rewards.chunk(2)
    margins = chosen - rejected
    told |= {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).double().mean(),
    }
    if isinstance(loss, Slime):
        # Beyond the hard margin only anchor and stabilizer act.
        told["slime/active_fraction"] = (margins < loss.margin_hard).double().mean()
    return told


def token_means(outputs: Mapping[str, Tensor], counts: PairCounts) -> dict[str, Tensor]:
    """Means over response tokens, where the loss was asked for statistics of tokens."""
    if "stats/entropy" not in outputs:
        return {}
    num_tokens = counts.lengths.sum().clamp(min=1)
    return {
        "entropy": outputs["stats/entropy"].double().sum() / num_tokens,
        "mean_token_accuracy": outputs["stats/is_top1"].double().sum() / num_tokens,
    }
