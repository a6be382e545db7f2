"""The terms of a loss: the names under which they are reported, and which of them depends on how a step is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from slime_fused.losses import Formula, Slime
from slime_fused.losses.pairwise import PairFormula

_SHORT = {"margin_loss": "margin"}
"""Terms that are logged under another name than the loss's own."""


def logged_term(loss: Formula, term: str) -> str:
    """The name under which a term of ``loss`` is logged, such as ``slime/margin``."""
    return f"{loss.name.lower()}/{_SHORT.get(term, term)}"


@dataclass(frozen=True)
class TokenMean:
    """A term of a loss that is a mean over all tokens of one side of the batch."""

    term: str
    """Its name among the loss's terms."""
    weight: str
    """The loss's hyperparameter that multiplies it."""
    reduction: str
    """That which makes it such a mean, with the value "token"."""
    side: Literal["chosen", "rejected"]


def find_token_mean(loss: Formula) -> TokenMean | None:
    """That of ``loss``, if it has one."""
    if isinstance(loss, Slime) and loss.stabilizer_reduction == "token":
        return TokenMean("stabilizer", "lambda_l", "stabilizer_reduction", "rejected")
    if isinstance(loss, PairFormula) and loss.nll_weight and loss.nll_reduction == "token":
        return TokenMean("nll", "nll_weight", "nll_reduction", "chosen")
    return None


def reweighted(loss: Formula, shares: Tensor) -> Any:
    """``loss`` for a micro-batch that has those ``shares`` (4,) of its step, in the order of `PairCounts.by_unit`.

    Weighted by its share of the pairs, the micro-batches' losses add up to the step's.
    """
    mean = find_token_mean(loss)
    if mean is None:
        return loss
    of_tokens = shares[2] if mean.side == "chosen" else shares[3]
    weighed: Any = loss
    return replace(weighed, **{mean.weight: getattr(loss, mean.weight) * float(of_tokens / shares[1])})
