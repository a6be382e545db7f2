"""How time and memory are taken.

Contestants are interleaved (A B A B ...), so that a slow spell of the machine hits all of them, and medians are
reported. On a GPU every timed step starts with a cold L2.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

import slime_fused
from bench.contestants import Step


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one forward and backward pass, in the order in which they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in milliseconds."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median; 0 with fewer than four samples."""
        if len(self.samples) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median

    def rounds(self, repeats: int) -> list[float]:
        """The median of each round of ``repeats`` samples."""
        return [
            statistics.median(self.samples[i : i + repeats]) for i in range(0, len(self.samples), max(1, repeats))
        ]

    def ratios_to(self, other: Timing, repeats: int) -> tuple[float, ...]:
        """Per round, this time over ``other``'s: a slow spell of the machine hits both and cancels."""
        pairs = zip(self.rounds(repeats), other.rounds(repeats), strict=True)
        return tuple(mine / theirs for mine, theirs in pairs)


class Clock(Protocol):
    """Times one step on one kind of device."""

    def milliseconds(self, step: Step) -> float:
        """Time one run of the step."""


class CpuClock:
    """Wall-clock time. Inputs of the benchmarked sizes exceed every cache, so none is flushed."""

    def milliseconds(self, step: Step) -> float:
        """Time one run by the wall clock."""
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)


class CudaClock:
    """CUDA events around the step, after a write of twice the L2 that leaves none of the inputs in it."""

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * l2, dtype=torch.uint8, device=device)

    def milliseconds(self, step: Step) -> float:
        """Time one run on the device; launch gaps count, since users wait for them too."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.fill_(1)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleave(
    clock: Clock,
    steps: dict[str, Step],
    rounds: int,
    repeats: int = 1,
    warm: int = 0,
    on_error: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Time every step ``repeats`` times per round, in turn, after ``warm`` untimed runs of each visit.

    A step that raises is dropped from the result and named to ``on_error``; without one, the error propagates.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name in list(samples):
            try:
                for _ in range(warm):
                    steps[name]()
                samples[name] += [clock.milliseconds(steps[name]) for _ in range(repeats)]
            except Exception as error:
                if on_error is None:
                    raise
                del samples[name]
                on_error(name, error)
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes above what is held before the step, at the step's worst moment; gradients it returns count.

    On the CPU this is the process's resident high-water mark, so the caller gives each step its own process.
    """
    return _cuda_peak(step) if device.type == "cuda" else _resident_peak(step)


def _cuda_peak(step: Step) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident_peak(step: Step) -> int:
    # Writing 5 resets the high-water mark to what is resident now (proc(5), Linux 4.0).
    slime_fused.empty_cache()  # or what an earlier run left would be missing from this one's peak
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    step()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    """A size that the kernel keeps of this process, by its name in proc(5): VmRSS, VmHWM, VmData."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")
