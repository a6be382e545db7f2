"""A reference model: running a model as one, and a dataset's log-probs under it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from datasets import Dataset

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""Of a dataset, here as in TRL: a reference's log-prob of each response, summed over its tokens."""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` without dropout; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def as_reference(model: nn.Module, adapted: Any, adapter: str | None = None) -> Iterator[None]:
    """``model`` without gradients, dropout and the adapter of ``adapted``, the PEFT model inside it, if any.

    With the adapter of the name ``adapter`` in its place, where one is given.
    """
    with torch.no_grad(), evaluating(model):
        _reshard(model)
        with _without_adapter(adapted) if adapter is None else _with_adapter(adapted, adapter):
            yield
            _reshard(model)


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


@contextlib.contextmanager
def _with_adapter(model: Any, name: str) -> Iterator[None]:
    active = model.active_adapter
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(active)


def reference_table(
    dataset: Any,
    lengths: Sequence[int],
    sums_of: Callable[[list[Any]], Tensor],
    *,
    batch_size: int,
    accelerator: Any,
    is_quiet: bool,
) -> Tensor:
    """(N, 2) float64 on the host: ``sums_of(rows)``, (2P,) for P rows, of all rows of ``dataset``.

    The processes share the rows and all get the table. Rows of like ``lengths`` (N,) go together; the order, and so
    each number, is the same whenever this is called.
    """
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
