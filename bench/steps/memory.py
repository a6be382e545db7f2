"""What fits: telling an exhausted memory from other errors, limiting the CPU's, and searching the largest size."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bench.measure import status_bytes

# What PyTorch's CPU allocator, oneDNN and C++ say; none of them has a type of its own.
_MESSAGES = ("can't allocate memory", "out of memory", "bad_alloc", "could not create a memory object")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory, of the device or of the process, did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MESSAGES)


def release_memory(device: torch.device) -> None:
    """Collect what cycles (an exception's frames, a graph) still hold, and empty the allocator's cache."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def limited_data(room: int | None) -> Iterator[None]:
    """Let this process allocate ``room`` bytes above what it has now; None sets no limit.

    RLIMIT_DATA counts private writable mappings, which is what allocators take, and neither code nor the address
    space that threads reserve (setrlimit(2), Linux 4.7). An allocation above it fails as on a full machine.
    """
    if room is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@dataclass(frozen=True)
class Found:
    """Result of `largest_fitting`."""

    fits: int
    fails: int | None
    probes: tuple[tuple[int, bool], ...]


def largest_fitting(
    fits: Callable[[int], bool],
    unit: int,
    bound: int,
    resolution: float = 1 / 8,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Found:
    """The largest multiple of ``unit`` up to ``bound`` that fits: doubling from ``unit``, then bisection.

    Bisection ends where the gap is one unit or ``resolution`` of what fits. ``out_of_time`` is asked before every
    probe; the search then ends with what it knows.
    """
    probes: list[tuple[int, bool]] = []
    good, bad, size = 0, None, unit
    while not out_of_time():
        probes.append((size, fits(size)))
        if probes[-1][1]:
            good = size
        else:
            bad = size
        if bad is None:
            if good >= bound:
                break
            size = min(2 * good, bound)
            continue
        if bad - good <= max(unit, resolution * good):
            break
        size = (good + bad) // (2 * unit) * unit
    return Found(good, bad, tuple(probes))
