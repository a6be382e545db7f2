"""The CPU benchmark: `python -m bench.cpu [--losses] [--quick] [--out DIR]`.

Time: contestants interleaved in one process per case, medians. Memory: the resident high-water mark, one process
per contestant. Errors: every contestant against float64 before it is timed. ``--losses`` measures DPO and SimPO
instead, and writes `losses.json` in place of `cpu.json`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bench.cases import ALL_CASES, CPU_CASES, CPU_MEMORY_CASE, QUICK_CASES, Case
from bench.registry import CONTESTANTS
from bench.report import format_rows
from bench.results import FAILED, RESULTS, Row, describe_machine, machine_slug, write_run
from bench.runner import CPU_PROTOCOL, MEMORY_PROTOCOL, Protocol, run_case
from bench.worker import Job, run_job

# Minutes, not hours: a process that takes longer than this on one case has hung or is swapping.
_PROCESS_LIMIT_S = 1200.0

_ALL = (
    "products",
    "slime_fused",
    "slime_fused-auto",
    "naive",
    "naive-cross-entropy",
    "naive-no-upcast",
    "naive-compiled",
    "torch-linear-ce",
    "slime_fused-logps",
)
_MEAN = ("ce-slime_fused", "ce-naive", "ce-torch-linear")
_FEW = ("products", "slime_fused", "slime_fused-auto", "naive", "naive-no-upcast")
# First what a loss costs beside SLIME, with enough rounds for differences of a percent; then who else has it.
_LOSSES_OURS = ("products", "slime_fused", "dpo-slime_fused", "simpo-slime_fused")
_LOSSES_PEERS = (
    "products",
    *(
        f"{loss}-{name}"
        for loss in ("dpo", "simpo")
        for name in ("naive", "naive-compiled", "trl-fused-head", "liger")
    ),
)
_LOSSES_CASES = ("v32k-fp32", "v32k-bf16", "v32k-fp32-m50")
# Not what is compiled on first use of a shape: the compiler's own memory would count.
_LOSSES_MEMORY = (*_LOSSES_OURS[1:], "dpo-naive", "dpo-trl-fused-head")
_MEMORY = ("slime_fused", "slime_fused-logps", "naive", "naive-cross-entropy", "torch-linear-ce")


@dataclass(frozen=True)
class Batch:
    """One case, who runs it, and whether its time or its memory is taken."""

    case: Case
    contestants: tuple[str, ...]
    protocol: Protocol


def default_batches() -> tuple[Batch, ...]:
    """The whole CPU benchmark."""
    few = replace(CPU_PROTOCOL, rounds=3)
    timed = [
        Batch(case, (*_ALL, *_MEAN) if case.name in ("v32k-fp32", "v32k-bf16") else _FEW, CPU_PROTOCOL)
        if case.vocab < 100_000
        else Batch(case, _FEW, few)
        for case in CPU_CASES
    ]
    return (*timed, Batch(CPU_MEMORY_CASE, _MEMORY, MEMORY_PROTOCOL))


def losses_batches() -> tuple[Batch, ...]:
    """DPO and SimPO: times of three cases, memory of the first."""
    cases = [ALL_CASES[name] for name in _LOSSES_CASES]
    ours, peers = replace(CPU_PROTOCOL, rounds=7), replace(CPU_PROTOCOL, rounds=2)
    return (
        *(Batch(case, _LOSSES_OURS, ours) for case in cases),
        *(Batch(case, _LOSSES_PEERS, peers) for case in cases),
        Batch(cases[0], _LOSSES_MEMORY, MEMORY_PROTOCOL),
    )


def quick_losses_batches() -> tuple[Batch, ...]:
    """The same on tiny problems, without what needs a compiler."""
    quick = replace(CPU_PROTOCOL, rounds=2)
    return (
        *(Batch(case, _LOSSES_OURS, quick) for case in QUICK_CASES),
        *(Batch(case, ("products", "dpo-naive", "simpo-naive"), quick) for case in QUICK_CASES),
        Batch(QUICK_CASES[0], _LOSSES_OURS[1:], MEMORY_PROTOCOL),
    )


def quick_batches() -> tuple[Batch, ...]:
    """Seconds: the same machinery on tiny problems."""
    quick = replace(CPU_PROTOCOL, rounds=2)
    return (
        *(Batch(case, ("products", "slime_fused", "naive", "torch-linear-ce"), quick) for case in QUICK_CASES),
        Batch(QUICK_CASES[0], ("slime_fused", "naive"), MEMORY_PROTOCOL),
    )


def what_is_taken(batch: Batch) -> str:
    """Time or memory, and of whom: a case may come in several batches."""
    return f"{'time' if batch.protocol.time else 'memory'} of {', '.join(batch.contestants)}"


def run_batch(batch: Batch, *, in_process: bool = False) -> list[Row]:
    """Rows of one batch. Memory is taken in one process per contestant; time in one process for all of them."""
    if in_process and batch.protocol.time:
        contestants = [CONTESTANTS[name] for name in batch.contestants]
        return run_case(batch.case, contestants, torch.device("cpu"), batch.protocol)
    deadline = time.time() + _PROCESS_LIMIT_S
    groups = (batch.contestants,) if batch.protocol.time else tuple((name,) for name in batch.contestants)
    rows: list[Row] = []
    for names in groups:
        rows += run_job(Job("cpu", (batch.case.name,), names, batch.protocol, deadline), _PROCESS_LIMIT_S)
    return rows


def with_memory(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """``rows`` and ``new``, where a memory row joins the timed row of the same case and contestant.

    The products of the first batch of a case stay: every row has its ratios to those of its own process.
    """
    table = {(row.case, row.contestant): row for row in rows}
    for row in new:
        key = (row.case, row.contestant)
        if row.contestant == "products" and key in table:
            continue
        if key in table and row.median_ms is None and row.status != FAILED:
            table[key] = replace(table[key], peak_bytes=row.peak_bytes)
        else:
            table[key] = row
    return list(table.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code says whether any row of this package failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--losses", action="store_true", help="DPO and SimPO, minutes; writes losses.json")
    parser.add_argument("--quick", action="store_true", help="tiny problems, a few seconds")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file")
    parser.add_argument("--cases", nargs="*", default=[], choices=sorted(ALL_CASES), metavar="CASE")
    args = parser.parse_args(argv)

    if args.losses:
        batches = quick_losses_batches() if args.quick else losses_batches()
    else:
        batches = quick_batches() if args.quick else default_batches()
    batches = tuple(batch for batch in batches if not args.cases or batch.case.name in args.cases)
    machine = describe_machine(torch.device("cpu"))
    path = (args.out or RESULTS / machine_slug(machine)) / ("losses.json" if args.losses else "cpu.json")
    settings = {f"{batch.case.name}: {what_is_taken(batch)}": asdict(batch.protocol) for batch in batches}
    rows: list[Row] = []
    for batch in batches:
        new = run_batch(batch, in_process=args.quick)
        rows = with_memory(rows, new)
        named = {row.case for row in rows}
        write_run(path, machine, settings, [c for c in ALL_CASES.values() if c.name in named], rows)
        print(format_rows(new, ALL_CASES), flush=True)
    print(f"wrote {path}")
    return int(any(row.status == FAILED and "slime_fused" in row.contestant for row in rows))


if __name__ == "__main__":
    sys.exit(main())
