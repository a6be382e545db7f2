"""Losses with a mean over the batch's tokens inside: right however a batch is cut up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from slime_fused.losses import KTO
from slime_fused.losses.base import Formula
from slime_fused.model.terms import TokenMean


def check_needs(loss: Formula) -> None:
    """Refuse, with a ValueError, a loss that needs what pairs do not give."""
    if isinstance(loss, KTO) and loss.baseline == "given":
        raise ValueError(
            "loss: KTO(baseline='given') expected a kl_baseline from responses to prompts that are not their own, "
            "which pairs do not hold; use baseline='batch' (an estimate from the batch) or 'zero'"
        )
    if "ref_token_logps" in loss.needs:
        raise ValueError(
            f"loss: {loss!r} expected a reference's log-prob of every token, and the trainer keeps sums per "
            "response; leave ld_alpha out, or call slime_fused.preference_loss yourself"
        )
    unknown = sorted(set(loss.needs) - {"ref_logps", "desirable"})
    if unknown:
        raise ValueError(
            f"loss: {loss.name} expected {unknown}, which the trainer does not know; override `given` to give it"
        )


def reweighted(loss: Formula, mean: TokenMean | None, pair_share: Tensor, token_share: Tensor) -> Any:
    """``loss`` for a micro-batch with those shares of the step's pairs and of its tokens of that side.

    Weighted by ``pair_share``, the micro-batches' losses add up to the step's.
    """
    if mean is None:
        return loss
    weight = getattr(loss, mean.weight) * float(token_share / pair_share)
    return replace(loss, **{mean.weight: weight})
