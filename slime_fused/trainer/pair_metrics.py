"""What is logged of a batch of preference pairs.

``logps/chosen`` and ``logps/rejected`` are mean log-probs per token; ``logps_sum/*`` are sums over the response,
which TRL calls ``logps/*``. ``entropy`` and ``mean_token_accuracy`` are means over response tokens. ``rewards/*``
are those of `slime_fused.model.reports`. Terms of the loss come as ``dpo/preference``, ``slime/anchor``, ...
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from slime_fused.losses import Formula
from slime_fused.model.items import PairCounts
from slime_fused.model.reports import part_means, reward_means, side_means

REFERENCE = "ref_sum_logps"
"""Of a batch and of its outputs: (2P,) a reference's summed log-probs, of the chosen responses first."""


def unit_means(loss: Formula, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Means over the loss's units: its value, and `part_means`."""
    means = {"loss": outputs["loss"].detach().double()}
    if "aux_loss" in outputs:
        means["aux_loss"] = outputs["aux_loss"].detach().double()
        means["loss"] = means["loss"] + means["aux_loss"]
    return means | part_means(loss, outputs)


def pair_means(loss: Formula, outputs: Mapping[str, Tensor], counts: PairCounts) -> dict[str, Tensor]:
    """Means over pairs: log-probs and rewards."""
    means = outputs["mean_logps"].double()
    told = side_means("logps", means) | side_means("logps_sum", means * counts.lengths)
    return told | reward_means(loss, outputs, counts, outputs.get(REFERENCE))


def token_means(outputs: Mapping[str, Tensor], counts: PairCounts) -> dict[str, Tensor]:
    """Means over response tokens, where the loss was asked for statistics of tokens."""
    if "stats/entropy" not in outputs:
        return {}
    num_tokens = counts.lengths.sum().clamp(min=1)
    return {
        "entropy": outputs["stats/entropy"].double().sum() / num_tokens,
        "mean_token_accuracy": outputs["stats/is_top1"].double().sum() / num_tokens,
    }
