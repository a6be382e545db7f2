"""The GPU benchmark: `python -m bench.gpu --out DIR [--stage headline|rows] [--cases ...] [--contestants ...]`.

Rows are taken in order of importance and written as they come, so a run whose budget ends early has the rows that
matter. Every family of contestants runs in its own process beside the bare matrix products. `--continue` keeps the
rows that the result file already has, and measures the others.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.cases import ALL_CASES
from bench.heats import STAGES, Heat, remaining, selected, stage_heats, toy_heats
from bench.registry import CONTESTANTS, families
from bench.report import format_rows
from bench.results import (
    FAILED,
    NOT_FINISHED,
    NOT_FINISHED_CODE,
    OK,
    UNSUPPORTED,
    Row,
    describe_machine,
    machine_slug,
    read_run,
    write_run,
)
from bench.runner import GPU_PROTOCOL, HEADLINE_PROTOCOL
from bench.worker import OUT_OF_TIME, Job, lost_row, run_job

# No process may take longer than this, so that one hang leaves most of the budget to the others.
_PROCESS_LIMIT_S = 150.0
# What a process may still take when the budget ends, to finish the case that it is in.
GRACE_S = 12.0


def run_heats(
    heats: Sequence[Heat], device: str, deadline: float, on_row: Callable[[Row], None] | None = None
) -> Iterator[list[Row]]:
    """Rows of one process after another, until the deadline (seconds since the epoch).

    ``on_row`` is called with each row as soon as it is measured; the lists hold it too.
    """
    for heat in heats:
        unsupported = _unsupported(heat, torch.device(device))
        if unsupported:
            yield unsupported
        refused = {row.contestant for row in unsupported}
        for names in families(tuple(name for name in heat.contestants if name not in refused)).values():
            job = Job(device, tuple(case.name for case in heat.cases), names, heat.protocol, deadline)
            rows = _run_within(job, on_row)
            yield rows
            yield from _retry_alone(job, rows, on_row)


def _unsupported(heat: Heat, device: torch.device) -> list[Row]:
    """Rows of the contestants that support none of the heat's cases: no process is started for them."""
    rows = []
    for name in heat.contestants:
        contestant = CONTESTANTS[name]
        reasons = [(case.name, contestant.supports(case, device)) for case in heat.cases]
        if all(reason is not None for _, reason in reasons):
            rows += [
                Row(case, name, contestant.objective, UNSUPPORTED, reason or "", contestant.note)
                for case, reason in reasons
            ]
    return rows


def _run_within(job: Job, on_row: Callable[[Row], None] | None) -> list[Row]:
    left = job.deadline - time.time()
    if left <= 0:
        return [lost_row(case, name, OUT_OF_TIME) for case in job.cases for name in job.contestants]
    return run_job(job, min(left + GRACE_S, _PROCESS_LIMIT_S), on_row)


def _retry_alone(job: Job, rows: Sequence[Row], on_row: Callable[[Row], None] | None) -> Iterator[list[Row]]:
    """A process that died took its family along: give each member its own, as long as there is time."""
    lost = {row.contestant for row in rows if row.status == FAILED and row.reason.startswith("process ended")}
    members = [name for name in job.contestants if name in lost and name != "products"]
    if len(job.contestants) > 2:
        for name in members:
            yield _run_within(replace(job, contestants=("products", name)), on_row)


def merge(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows by (case, contestant): a later row replaces an earlier one unless it knows less.

    The products are timed once per process; the first reading stands, each row keeps its own.
    """
    known = {NOT_FINISHED: 0, FAILED: 1, UNSUPPORTED: 2, OK: 3}
    table = {(row.case, row.contestant): row for row in rows}
    for row in new:
        key = (row.case, row.contestant)
        before = known[table[key].status] if key in table else -1
        if known[row.status] > before or (known[row.status] == before and row.contestant != "products"):
            table[key] = row
    return list(table.values())


def earlier_rows(path: Path, machine: dict[str, Any]) -> list[Row]:
    """The rows of a result file of the same code on the same device; none from any other."""
    if not path.exists():
        return []
    run = read_run(path)
    for name in ("commit", "sources", "torch", "gpu", "cpu"):
        if run.machine.get(name) != machine.get(name):
            print(f"bench.gpu: {path} is from another {name}: its rows are not kept")
            return []
    return list(run.rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Exit code 1: a row of this package failed; else 3: one was not finished; else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file")
    parser.add_argument("--stage", choices=STAGES, default=None, help="default: both")
    parser.add_argument("--cases", nargs="*", default=[], choices=sorted(ALL_CASES), metavar="CASE")
    parser.add_argument("--contestants", nargs="*", default=[], choices=sorted(CONTESTANTS), metavar="NAME")
    parser.add_argument("--time-budget", type=float, default=300.0, help="seconds after which nothing is begun")
    parser.add_argument("--rounds", type=int, default=None, help="for every row, in place of 8 and 3")
    parser.add_argument("--device", default="cuda", help="cpu runs the same rows slowly, to try the machinery")
    parser.add_argument("--toy", action="store_true", help="tiny problems, a few seconds")
    parser.add_argument("--continue", action="store_true", dest="keep", help="keep what the file already has")
    parser.add_argument("--list", action="store_true", help="print cases and contestants, then exit")
    args = parser.parse_args(argv)
    if args.list:
        print("cases:", *ALL_CASES, "contestants:", *CONTESTANTS, sep="\n  ")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: no CUDA device is visible to PyTorch", file=sys.stderr)
        return 2

    deadline = time.time() + args.time_budget
    machine = describe_machine(torch.device(args.device))
    path = (args.out or Path(__file__).parent / "results" / machine_slug(machine)) / "gpu.json"
    rows = earlier_rows(path, machine) if args.keep else []
    heats = selected((toy_heats if args.toy else stage_heats)(args.stage), args.cases, args.contestants)
    if args.rounds is not None:
        heats = tuple(replace(heat, protocol=replace(heat.protocol, rounds=args.rounds)) for heat in heats)
    settings = {"headline": asdict(HEADLINE_PROTOCOL), "rows": asdict(GPU_PROTOCOL), "rounds": args.rounds}

    def keep(new: Sequence[Row]) -> None:
        nonlocal rows
        rows = merge(rows, new)
        named = {row.case for row in rows}
        write_run(path, machine, settings, [c for c in ALL_CASES.values() if c.name in named], rows)

    for batch in run_heats(remaining(heats, rows), args.device, deadline, lambda row: keep([row])):
        keep(batch)
        print(format_rows(batch, ALL_CASES), flush=True)
    print(f"{len(rows)} rows in {path}")
    ours = {row.status for row in rows if "slime_fused" in row.contestant}
    return 1 if FAILED in ours else NOT_FINISHED_CODE if NOT_FINISHED in ours else 0


if __name__ == "__main__":
    sys.exit(main())
