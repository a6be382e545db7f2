"""The reference model's log-probs: computed once, before training, with the head that trains.

The reference is the policy as it is before training, or the model without its adapter where it carries one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from slime_fused.model.calls import naive_logps
from slime_fused.trainer.formats import REFERENCE_COLUMNS
from slime_fused.trainer.pair_metrics import REFERENCE


def naive_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``logps`` (S,), sums, from materialised ``logits`` (S, T, V)."""
    return {"logps": naive_logps(logits, labels)[0].sum(-1)}


@contextlib.contextmanager
def as_reference(model: Any, adapted: Any) -> Iterator[None]:
    """``model`` without gradients, dropout and the adapter of ``adapted``, the PEFT model inside it, if any."""
    was_training = model.training
    model.eval()
    _reshard(model)
    try:
        with torch.no_grad(), _without_adapter(adapted):
            yield
            _reshard(model)
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    if not hasattr(model, "peft_config"):
        yield
    elif hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:  # one that `transformers` has added itself
        model.disable_adapters()
        try:
            yield
        finally:
            model.enable_adapters()


def _reshard(model: Any) -> None:
    """Switching an adapter off and on switches ``requires_grad`` of its weights. Of an FSDP2 unit that is gathered
    these are copies, and the real ones would keep what they had: no gradient from then on.
    """
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()


def adapter_changes(model: Any) -> bool:
    """Whether a LoRA adapter of ``model`` changes it already: then the model is not its own reference."""
    return any("lora_B" in name and bool(weight.detach().any()) for name, weight in model.named_parameters())


def reference_table(
    dataset: Any,
    sums_of: Callable[[list[Any]], Tensor],
    *,
    batch_size: int,
    accelerator: Any,
    is_quiet: bool,
) -> Tensor:
    """(N, 2) float64 on the host: ``sums_of(rows)``, (2P,) for P rows, of all rows of ``dataset``.

    The processes share the rows and all get the table. Rows of like length go together; the order, and so each
    number, is the same whenever this is called.
    """
    lengths = [max(len(a), len(b)) for a, b in zip(dataset["chosen_ids"], dataset["rejected_ids"], strict=True)]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    num_turns = -(-len(batches) // accelerator.num_processes)
    table = torch.zeros(len(order), 2, dtype=torch.float64, device=accelerator.device)
    show = is_quiet or not accelerator.is_local_main_process
    for turn in tqdm(range(num_turns), desc="Reference log-probs", disable=show):
        # A process without a batch of its own runs the first one again: others may wait for its shards.
        rows = mine[turn] if turn < len(mine) else batches[0]
        sums = sums_of([dataset[i] for i in rows])
        if turn < len(mine):
            table[rows] = torch.stack(sums.double().chunk(2), dim=1)
    return accelerator.reduce(table, reduction="sum").cpu()


def with_columns(dataset: Dataset, table: Tensor) -> Dataset:
    """``dataset`` with its `REFERENCE_COLUMNS`."""
    for name, values in zip(REFERENCE_COLUMNS, table.T.tolist(), strict=True):
        dataset = dataset.add_column(name, values)
    return dataset


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
