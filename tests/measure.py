"""What a call costs, measured: the matrix products it makes and the memory it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.mm.out: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.addmm.out: (1, 2),
    torch.ops.aten.addmm_.default: (1, 2),
    torch.ops.aten.bmm.default: (0, 1),
}


@dataclass
class Products:
    """The products of rows x vocabulary x hidden that a block made."""

    flops: int = 0
    calls: int = 0
    largest_rows: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.counted = Products()
        self._shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            left, right = (args[i] for i in _PRODUCTS[func])
            rows, inner, cols = left.shape[-2], left.shape[-1], right.shape[-1]
            sizes = [rows, inner, cols]
            assert self.vocab_size in sizes, f"an unexpected product: {sizes}"
            assert self.hidden_size in sizes, f"an unexpected product: {sizes}"
            sizes.remove(self.vocab_size)
            sizes.remove(self.hidden_size)
            self.counted.flops += 2 * rows * inner * cols
            self.counted.calls += 1
            self.counted.largest_rows = max(self.counted.largest_rows, *sizes)
        return func(*args, **(kwargs or {}))


@contextmanager
def count_products(*, vocab_size: int, hidden_size: int) -> Iterator[Products]:
    """Count matrix products; one that is not between rows, vocabulary and hidden fails."""
    with _Counter(vocab_size, hidden_size) as counter:
        yield counter.counted


def memory_of(step: Callable[[], object]) -> tuple[int, int]:
    """(most bytes that ``step`` held at once, bytes held while its result is alive), beyond what was there before.

    By PyTorch's own CPU allocator: unlike the resident size this sees every allocation exactly, those inside
    operators too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = step()
    held = peak = 0
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler recorded no allocation"
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak, held
