"""What is reported: the names of TRL's DPOTrainer, and beside them the terms of the loss and mean log-probs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from slime_fused.losses import KTO, Formula, Slime
from slime_fused.model.terms import logged_term

STATISTICS = ("entropy", "mean_logit", "is_top1")
"""Per token, for TRL's ``entropy``, ``logits/*`` and ``mean_token_accuracy``."""

Fraction = tuple[Tensor | float, Tensor | float]
"""A sum and what it is divided by, once both are summed over batches and processes."""


class WeightedMeans:
    """Sums of fractions by name, on the device; `flush` brings the means to the host."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None

    def __bool__(self) -> bool:
        return self._sums is not None

    def add(self, values: Mapping[str, Fraction], num_tokens: Tensor | None) -> None:
        """Add a batch: the fractions, always of the same names, and how many tokens it has."""
        device = next(x.device for pair in values.values() for x in pair if isinstance(x, Tensor))
        rows = [*values.values(), (0.0 if num_tokens is None else num_tokens, 0.0)]
        flat = [torch.as_tensor(x, dtype=torch.float64, device=device) for pair in rows for x in pair]
        sums = torch.stack(flat).view(-1, 2)
        self._names = tuple(values)
        self._sums = sums if self._sums is None else self._sums + sums

    def flush(self, reduce_sum: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], int]:
        """(means by name, tokens) since the last call. Collective: ``reduce_sum`` adds up over processes."""
        assert self._sums is not None
        *rows, (num_tokens, _) = reduce_sum(self._sums).tolist()
        self._sums = None
        means = {
            name: part / whole if whole else 0.0 for name, (part, whole) in zip(self._names, rows, strict=True)
        }
        return means, int(num_tokens)


def measured(
    outputs: Mapping[str, Tensor],
    labels: Tensor,
    loss: Formula,
    given: Mapping[str, Tensor],
    weight: float,
) -> dict[str, Fraction]:
    """The fractions of one batch: ``outputs`` of a `FusedLoss` with `STATISTICS`, its ``labels`` (S, T).

    ``weight`` is how many of its pairs count: all or none.
    """
    counts = (labels[:, 1:] != -100).sum(1)  # (S,)
    chosen_means, rejected_means = outputs["mean_logps"].chunk(2)
    is_counted = float(weight > 0)
    num_pairs = chosen_means.numel()
    values: dict[str, Fraction] = {}

    def mean_of_pairs(name: str, value: Tensor) -> None:
        values[name] = (value.double().sum() * is_counted, num_pairs * is_counted)

    def mean_of_tokens(name: str, statistic: str, rows: slice) -> None:
        tokens = counts[rows].sum() * is_counted
        values[name] = (outputs[f"stats/{statistic}"][rows].double().sum() * is_counted, tokens)

    both, chosen, rejected = slice(None), slice(0, num_pairs), slice(num_pairs, None)
    mean_of_tokens("entropy", "entropy", both)
    mean_of_tokens("logits/chosen", "mean_logit", chosen)
    mean_of_tokens("logits/rejected", "mean_logit", rejected)
    mean_of_tokens("mean_token_accuracy", "is_top1", chosen)
    sums = outputs["mean_logps"] * counts
    mean_of_pairs("logps/chosen", sums[chosen])
    mean_of_pairs("logps/rejected", sums[rejected])
    mean_of_pairs("mean_logps/chosen", chosen_means)
    mean_of_pairs("mean_logps/rejected", rejected_means)
    prefix = loss.name.lower()
    for name in loss.term_names:
        values[logged_term(loss, name)] = (outputs[f"terms/{name}"] * weight, weight)
    if isinstance(loss, Slime):
        mean_of_pairs("slime/active_fraction", (chosen_means - rejected_means) < loss.margin_hard)
    own = [name for name in loss.metric_names if not name.startswith("rewards/")]
    for name in own:
        values[f"{prefix}/{name}"] = (outputs[f"metrics/{name}"] * weight, weight)
    if "rewards/chosen" in loss.metric_names:
        for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies"):
            values[name] = (outputs[f"metrics/{name}"] * weight, weight)
    else:
        rewards = outputs["mean_logps"]
        if isinstance(loss, KTO):
            rewards = loss.beta * (sums - given["ref_sum_logps"].to(sums.dtype))
        mean_of_pairs("rewards/chosen", rewards[chosen])
        mean_of_pairs("rewards/rejected", rewards[rejected])
        mean_of_pairs("rewards/accuracies", rewards[chosen] > rewards[rejected])
    better, worse = values["rewards/chosen"], values["rewards/rejected"]
    values["rewards/margins"] = (better[0] - worse[0], better[1])
    return values
