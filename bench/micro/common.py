"""What the micro-benchmarks share: timing on a GPU or a CPU, and a result file that grows with every case."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import slime_fused
from bench.clocks import read_clocks
from bench.results import NOT_FINISHED_CODE, describe_machine, write_json

GIB = 1 << 30


class Report:
    """The result file of one command: the machine, the build, and results, rewritten whenever some are added.

    A command that is cut leaves what it had measured; `finished` says whether it came to its end.
    """

    def __init__(self, path: Path | None, device: torch.device, **settings: Any) -> None:
        self.path = path
        self.begun = time.perf_counter()
        self.payload: dict[str, Any] = {
            "machine": describe_machine(device),
            "build": slime_fused.build_info(),
            "settings": settings,
            "finished": False,
            "results": [],
        }
        self._write()

    @property
    def results(self) -> list[Any]:
        """What was added so far, as JSON objects."""
        return self.payload["results"]

    @property
    def seconds(self) -> float:
        """Since the report was begun."""
        return time.perf_counter() - self.begun

    def add(self, *results: Any) -> None:
        """Append results (dataclasses or JSON objects) and rewrite the file."""
        for result in results:
            is_record = is_dataclass(result) and not isinstance(result, type)
            self.payload["results"].append(asdict(result) if is_record else result)
        self._write()

    def put(self, **entries: Any) -> None:
        """Set entries beside the results and rewrite the file."""
        self.payload |= entries
        self._write()

    def finish(self, *, has_failed: bool = False) -> int:
        """Note the clocks at the end; the exit code: 1 for a failure, else 3 where cases were left out, else 0."""
        is_whole = "left_out" not in self.payload
        self.put(finished=is_whole, seconds=round(self.seconds, 1), clocks_at_end=read_clocks())
        return 1 if has_failed else 0 if is_whole else NOT_FINISHED_CODE

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.payload)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every micro-benchmark takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="JSON file for all numbers, rewritten after every case")
    made.add_argument("--device", default="cuda", help="cpu: toy sizes and stand-in kernels, to try the machinery")
    made.add_argument("--seconds", type=float, default=1e9, help="begin no further case after this many")
    return made


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_ms(
    device: torch.device,
    run: Callable[[], object],
    *,
    repeats: int,
    launches: int = 1,
    prepare: Callable[[], object] | None = None,
    warm: int = 2,
) -> tuple[float, float]:
    """Median milliseconds of one ``run`` and (slowest - fastest) / median. ``prepare`` is not timed.

    ``launches`` runs follow one another inside a reading: their launches hide behind the first.
    """
    times = []
    for attempt in range(repeats + warm):
        if prepare is not None:
            prepare()
        elapsed = _elapsed_ms(device, run, launches)
        if attempt >= warm:
            times.append(elapsed / launches)
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def _elapsed_ms(device: torch.device, run: Callable[[], object], launches: int) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        for _ in range(launches):
            run()
        return 1e3 * (time.perf_counter() - begun)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(launches):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_rate(device: torch.device, size: int) -> float:
    """GB/s of a copy of ``size`` bytes on the device, counting bytes read and bytes written."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    ms, _ = time_ms(device, lambda: target.copy_(source), repeats=11)
    return 2 * size / ms / 1e6


def fill_with_logits(buffer: Tensor, seed: int, spread: float = 2.5) -> None:
    """Normal logits of the spread of a trained model's, a few rows at a time."""
    generator = torch.Generator(buffer.device).manual_seed(seed)
    for rows in buffer.split(256):
        rows.copy_(torch.randn(rows.shape, generator=generator, device=buffer.device).mul_(spread))


def first_line(error: Exception) -> str:
    """What a candidate that cannot run says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def within(seconds: float, report: Report, cases: Iterable[Any]) -> Iterable[Any]:
    """The cases, until the time is over; says how many are left out."""
    waiting = list(cases)
    for i, case in enumerate(waiting):
        if report.seconds > seconds:
            print(f"out of time: {len(waiting) - i} cases left out")
            report.put(left_out=len(waiting) - i)
            return
        yield case
