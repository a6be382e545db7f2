"""Averages over pairs, right across micro-batches of different size, accumulation steps and devices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_PER_PAIR = (
    "loss",
    "slime/anchor",
    "slime/margin",
    "slime/stabilizer",
    "aux_loss",
    "logps/chosen",
    "logps/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "slime/active_fraction",
)
"""Means over pairs. ``logps/*`` are mean log-probs per token; the margin is their difference. A pair is active
while its margin is below the hard margin: beyond it only anchor and stabilizer act."""

_COUNTS = ("num_pairs", "num_tokens", "num_completion_tokens")
"""Sums since the last report; tokens without padding."""


class PairMetrics:
    """Accumulates on the device, without waiting for it; `flush` brings the numbers to the host."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._has_aux = False

    def add(self, outputs: dict[str, Tensor], batch: dict[str, Tensor], margin_hard: float) -> None:
        """Add one micro-batch: ``outputs`` of a loss in `slime_fused.model.calls`, and its ``batch``."""
        chosen, rejected = outputs["mean_logps"].double().chunk(2)
        margins = chosen - rejected
        num_pairs = margins.numel()
        zero = margins.new_zeros(())
        aux = outputs.get("aux_loss", zero).detach().double()
        self._has_aux |= "aux_loss" in outputs
        sums = torch.stack(
            [
                (outputs["loss"].detach().double() + aux) * num_pairs,
                outputs["terms/anchor"].double() * num_pairs,
                outputs["terms/margin_loss"].double() * num_pairs,
                outputs["terms/stabilizer"].double() * num_pairs,
                aux * num_pairs,
                chosen.sum(),
                rejected.sum(),
                margins.sum(),
                (margins > 0).sum().double(),
                (margins < margin_hard).sum().double(),
                zero + num_pairs,
                batch["attention_mask"].sum().double(),
                (batch["labels"][:, 1:] != -100).sum().double(),
            ]
        )
        self._sums = sums if self._sums is None else self._sums + sums

    def flush(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The averages by name, and an empty accumulator. Collective: ``reduce_sum`` adds up over processes.

        Empty if nothing was added since the last call.
        """
        if self._sums is None:
            return {}
        sums = reduce_sum(self._sums).tolist()
        self._sums = None
        num_pairs = sums[len(_PER_PAIR)]
        result = {name: value / num_pairs for name, value in zip(_PER_PAIR, sums, strict=False)}
        if not self._has_aux:
            del result["aux_loss"]
        counts = sums[len(_PER_PAIR) :]
        return result | {name: int(value) for name, value in zip(_COUNTS, counts, strict=True)}
