"""The items of a batch, such as pairs: how many of what, and which are its own where a sampler repeats some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slime_fused.losses import Formula


@dataclass(frozen=True)
class PairCounts:
    """Of one batch of pairs, as float64 scalars on its device."""

    pairs: Tensor
    chosen: Tensor
    """Chosen tokens that are predicted."""
    rejected: Tensor
    """Rejected tokens that are predicted."""
    lengths: Tensor
    """(2P,) predicted tokens of each response."""

    @classmethod
    def of(cls, labels: Tensor) -> PairCounts:
        """From the labels (2P, T), -100 where nothing is predicted."""
        lengths = (labels[:, 1:] != -100).sum(1).double()
        chosen, rejected = lengths.chunk(2)
        return cls(lengths.new_tensor(len(chosen)), chosen.sum(), rejected.sum(), lengths)

    def by_unit(self, loss: Formula) -> Tensor:
        """(4,): units of ``loss``, pairs, chosen and rejected tokens that are predicted."""
        units = self.chosen + self.rejected if loss.unit == "token" else self.pairs
        return torch.stack([units, self.pairs, self.chosen, self.rejected])


def own_items(gradient_state: Any, num_items: int, process_index: int) -> int:
    """How many of this process's ``num_items`` are its own; those after them repeat earlier ones.

    ``gradient_state`` is accelerate's. As in its ``gather_for_metrics``: of the last batches of all processes, one
    behind the other, the first ``remainder`` items are real.
    """
    remainder = gradient_state.remainder
    if not gradient_state.end_of_dataloader or remainder <= 0:
        return num_items
    return max(0, min(num_items, remainder - process_index * num_items))


def first_items(batch: Mapping[str, Any], num_kept: int, num_items: int, rows_per_item: int) -> dict[str, Any]:
    """``batch`` with the first ``num_kept`` of its items alone.

    A tensor has a row per item, or ``rows_per_item`` that lie a whole number of items apart: chosen, rejected.
    """
    result = dict(batch)
    for name, value in batch.items():
        if (
            isinstance(value, Tensor)
            and value.dim() > 0
            and value.shape[0] in (num_items, num_items * rows_per_item)
        ):
            parts = value.reshape(-1, num_items, *value.shape[1:])
            result[name] = parts[:, :num_kept].flatten(0, 1)
    return result
