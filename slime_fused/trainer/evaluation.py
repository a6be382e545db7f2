"""Exact evaluation: what a sampler repeats, so that all processes have batches of one size, must not count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def own_items(gradient_state: Any, num_items: int, process_index: int) -> int:
    """How many of this process's ``num_items`` are its own; those after them repeat earlier ones.

    ``gradient_state`` is accelerate's. As in its ``gather_for_metrics``: of the last batches of all processes, one
    behind the other, the first ``remainder`` items are real.
    """
    remainder = gradient_state.remainder
    if not gradient_state.end_of_dataloader or remainder <= 0:
        return num_items
    return max(0, min(num_items, remainder - process_index * num_items))


def first_items(batch: Mapping[str, Any], num_kept: int, rows_per_item: int) -> dict[str, Any]:
    """``batch`` with its first items alone. An item's rows lie a whole number of items apart: chosen, rejected."""
    num_rows = batch["labels"].shape[0]
    num_items = num_rows // rows_per_item
    result = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == num_rows:
            parts = value.reshape(rows_per_item, num_items, *value.shape[1:])
            result[name] = parts[:, :num_kept].reshape(rows_per_item * num_kept, *value.shape[1:])
    result.pop("layout", None)  # the loss makes it again, of the labels
    return result


def filled_up(values: Any, num_items: int) -> Any:
    """Tensors of as many rows as ``num_items``, zeros at the end: all processes gather the same shapes."""
    if isinstance(values, Mapping):
        return {name: filled_up(value, num_items) for name, value in values.items()}
    missing = num_items - values.shape[0]
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values
