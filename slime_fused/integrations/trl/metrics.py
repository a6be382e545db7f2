"""What is reported: the names of TRL's DPOTrainer, and beside them the terms of the loss and mean log-probs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from slime_fused.losses import Formula
from slime_fused.model.averages import Averages
from slime_fused.model.items import PairCounts
from slime_fused.model.reports import part_means, reward_means, side_means

STATISTICS = ("entropy", "mean_logit", "is_top1")
"""Per token, for TRL's ``entropy``, ``logits/*`` and ``mean_token_accuracy``."""


def record(
    averages: Averages,
    outputs: Mapping[str, Tensor],
    labels: Tensor,
    loss: Formula,
    given: Mapping[str, Tensor],
    *,
    is_counted: bool,
) -> None:
    """Add one batch: ``outputs`` of a `FusedLoss` with `STATISTICS`, its ``labels`` (S, T).

    One that is not counted tells no more than the names, for the sake of the other processes.
    """
    counts = PairCounts.of(labels)
    means = outputs["mean_logps"].double()
    pairs = side_means("logps", means * counts.lengths) | side_means("mean_logps", means)
    pairs |= part_means(loss, outputs) | reward_means(loss, outputs, counts, given.get("ref_sum_logps"))
    if "aux_loss" in outputs:
        pairs["aux_loss"] = outputs["aux_loss"]
    averages.add("pairs", counts.pairs * float(is_counted), pairs)

    def add_tokens(group: str, num_tokens: Tensor, values: Mapping[str, Tensor]) -> None:
        told = {name: value.double().sum() / num_tokens.clamp(min=1) for name, value in values.items()}
        averages.add(group, num_tokens * float(is_counted), told)

    chosen_logits, rejected_logits = outputs["stats/mean_logit"].chunk(2)
    chosen_top1, _ = outputs["stats/is_top1"].chunk(2)
    add_tokens("tokens", counts.chosen + counts.rejected, {"entropy": outputs["stats/entropy"]})
    add_tokens("chosen", counts.chosen, {"logits/chosen": chosen_logits, "mean_token_accuracy": chosen_top1})
    add_tokens("rejected", counts.rejected, {"logits/rejected": rejected_logits})
