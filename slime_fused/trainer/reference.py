"""The reference model's log-probs: computed once, before training, with the head that trains.

The reference is the policy as it is before training, or the model without its adapter where it carries one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from slime_fused.model.calls import naive_logps
from slime_fused.model.reference import REFERENCE_COLUMNS
from slime_fused.trainer.pair_metrics import REFERENCE


def naive_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``logps`` (S,), sums, from materialised ``logits`` (S, T, V)."""
    return {"logps": naive_logps(logits, labels)[0].sum(-1)}


def adapter_changes(model: Any) -> bool:
    """Whether a LoRA adapter of ``model`` changes it already: then the model is not its own reference."""
    return any("lora_B" in name and bool(weight.detach().any()) for name, weight in model.named_parameters())


class LateReference(torch.utils.data.Dataset[dict[str, Any]]):
    """A prepared dataset whose reference log-probs come when training has begun.

    A sharded model can run only once it is prepared for training, when the batches' source is chosen already.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.table: Tensor | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.table is None:
            raise RuntimeError("LateReference: expected the reference's log-probs by now; call train() first")
        return {**self.dataset[index], **dict(zip(REFERENCE_COLUMNS, self.table[index].tolist(), strict=True))}


@dataclass(frozen=True)
class ReferenceCollator:
    """Adds `REFERENCE` to the batches of another collator where the rows have `REFERENCE_COLUMNS`."""

    collator: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See `PreferenceCollator`."""
        batch = self.collator(list(rows))
        if all(set(REFERENCE_COLUMNS) <= set(row) for row in rows):
            values = [row[name] for name in REFERENCE_COLUMNS for row in rows]
            batch[REFERENCE] = torch.tensor(values, dtype=torch.float64, device="cpu")
        return batch
