"""Whole training steps: `python -m bench.end_to_end [--device cpu|cuda] [--quick] [--out DIR] [--time-budget S]`.

Forward of a decoder with random weights, SLIME loss, backward, optimiser. Every contestant takes the same step,
which is checked before anything is timed. Rows are taken in order of importance and the result file is rewritten
after every one of them, so a run that is cut off leaves what it measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import torch

from bench.cases import GIB, MIB
from bench.results import (
    FAILED,
    NOT_FINISHED,
    NOT_FINISHED_CODE,
    OK,
    RESULTS,
    describe_machine,
    machine_slug,
)
from bench.steps import cases as steps
from bench.steps.cases import StepCase
from bench.steps.contestants import STEP_CONTESTANTS
from bench.steps.report import format_limit_row, format_step_row
from bench.steps.results import WRONG, LimitRow, StepRow, write_step_run
from bench.steps.runner import CPU_MEMORY, CPU_STEPS, GPU_STEPS, Bounds, StepProtocol
from bench.steps.worker import Search, StepJob, run_past_crashes
from slime_fused.engine.workspace import parse_bytes

# No process may take longer than this, so that one hang leaves the rest of the time to the others.
_PROCESS_LIMIT_S = {"cpu": 1200.0, "cuda": 150.0}
# The process under way at the deadline may take so much longer.
_GRACE_S = 20.0
_GPU_BUDGET_S = 300.0

_ALL = tuple(STEP_CONTESTANTS)
_QUICK: tuple[str, ...] = ("slime_fused", "naive", "naive-reference", "trl-fused-head")

Cases: TypeAlias = tuple[StepCase, ...]


@dataclass(frozen=True)
class Schedule:
    """Jobs in the order in which they run."""

    jobs: tuple[StepJob, ...]
    cases: Cases


@dataclass
class Table:
    """What is known so far."""

    rows: dict[tuple[str, str], StepRow] = field(default_factory=dict)
    limits: dict[tuple[str, str, str], LimitRow] = field(default_factory=dict)

    def take(self, row: StepRow | LimitRow, protocol: StepProtocol) -> None:
        """Add a row. One from a process for memory alone joins the row of the same contestant."""
        if isinstance(row, LimitRow):
            self.limits[row.case, row.contestant, row.quantity] = row
            return
        key = (row.case, row.contestant)
        known = self.rows.get(key)
        if known is None or protocol.time or protocol.check:
            self.rows[key] = row
        elif row.status == OK:
            self.rows[key] = replace(known, held_bytes=row.held_bytes, added_bytes=row.added_bytes)
        else:
            self.rows[key] = replace(known, reason=f"memory: {row.status}: {row.reason}")

    def everything(self) -> list[StepRow | LimitRow]:
        """All rows."""
        return [*self.rows.values(), *self.limits.values()]

    def is_measurable(self, case: str, contestant: str) -> bool:
        """Whether the contestant took the right step, as far as is known."""
        row = self.rows.get((case, contestant))
        return row is None or row.status == OK


def _defaults(args: argparse.Namespace) -> tuple[Cases, Cases, tuple[str, ...]]:
    """Cases whose step is measured, cases whose limits are searched, and contestants."""
    if args.quick:
        return steps.QUICK_CASES, steps.QUICK_LIMIT_CASES, _QUICK
    if args.device == "cuda":
        return steps.GPU_CASES, steps.GPU_LIMIT_CASES, _ALL
    return steps.CPU_CASES, steps.CPU_LIMIT_CASES, _ALL


def default_schedule(args: argparse.Namespace, deadline: float) -> Schedule:
    """The jobs that the command line asks for."""
    cuda = args.device == "cuda"
    timed, searched, names = _defaults(args)
    if args.cases:
        timed = searched = tuple(steps.ALL_CASES[name] for name in args.cases)
    timed, searched = _resized(timed, args), _resized(searched, args)
    names = tuple(args.contestants) or names

    protocol = GPU_STEPS if cuda else CPU_STEPS
    if args.quick:
        protocol = replace(protocol, rounds=2)
    if args.rounds:
        protocol = replace(protocol, rounds=args.rounds)

    def job(case: StepCase, who: tuple[str, ...], how: StepProtocol, *searches: Search) -> StepJob:
        return StepJob(args.device, case, who, how, deadline, searches)

    jobs = [[job(case, names, protocol)] for case in timed]
    if not cuda:
        for of_case, case in zip(jobs, timed, strict=True):
            # A high-water mark is a process's. The quick run shows the machinery on two of them.
            of_case += [job(case, (name,), CPU_MEMORY) for name in (names[:2] if args.quick else names)]
    who: list[tuple[str, ...]] = [(name,) for name in names if _is_searched(name, args.device)]
    if args.quick:
        who = [names[:2]]
    searches = _searches(args)
    limits = [[job(case, group, protocol, *searches) for group in who] for case in searched if args.limits]
    # The first case of each model, what fits of the first, and so on: a short run has something of everything.
    ordered = [*jobs[:2], *limits[:1], *jobs[2:4], *limits[1:], *jobs[4:]]
    return Schedule(tuple(one for group in ordered for one in group), tuple(dict.fromkeys((*timed, *searched))))


def _is_searched(name: str, device: str) -> bool:
    """On the CPU every size would be compiled anew: there the search would measure the compiler."""
    contestant = STEP_CONTESTANTS[name]
    return contestant.unsupported() is None and not (contestant.compiles and device == "cpu")


def _resized(cases: Cases, args: argparse.Namespace) -> Cases:
    """The cases with the sizes that the command line gives; what becomes equal is kept once."""
    changes = {
        name: value
        for name, value in (("pairs", args.pairs), ("length", args.length), ("layers", args.layers))
        if value is not None
    }
    return tuple(dict.fromkeys(case.but(**changes) for case in cases))


def _searches(args: argparse.Namespace) -> tuple[Search, Search]:
    """Longest sequence, then largest batch; on the CPU within a room, on a GPU within all of its memory."""
    if args.device == "cuda":
        return Search("length", Bounds(1024, 65536)), Search("pairs", Bounds(1, 256))
    if args.quick:
        room = args.room or 16 * MIB
        return Search("length", Bounds(64, 512), room), Search("pairs", Bounds(1, 8), room)
    room = args.room or GIB
    return Search("length", Bounds(128, 4096), room), Search("pairs", Bounds(1, 16), room)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="a tiny model, under a minute")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file")
    parser.add_argument("--time-budget", type=float, default=None, help="seconds after which nothing is begun")
    parser.add_argument("--cases", nargs="*", default=[], choices=sorted(steps.ALL_CASES), metavar="CASE")
    parser.add_argument("--contestants", nargs="*", default=[], choices=sorted(STEP_CONTESTANTS), metavar="NAME")
    parser.add_argument("--pairs", type=int, default=None, help="instead of the cases' own")
    parser.add_argument("--length", type=int, default=None, help="positions of a sequence, instead of the cases'")
    parser.add_argument("--layers", type=int, default=None, help="instead of the cases' own")
    parser.add_argument("--rounds", type=int, default=None, help="turns of every contestant")
    parser.add_argument("--room", type=parse_bytes, default=None, help='CPU: bytes for the search, as in "1GiB"')
    parser.add_argument("--no-limits", dest="limits", action="store_false", help="search no largest sizes")
    parser.add_argument("--list", action="store_true", help="print cases and contestants, then exit")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.time_budget is None and args.device == "cuda":
        args.time_budget = _GPU_BUDGET_S
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    The exit code is 1 where a row of this package failed or is wrong, else 3 where time ran out, else 0; 2 for
    arguments that cannot be run here.
    """
    args = _parse(argv)
    if args.list:
        for case in steps.ALL_CASES.values():
            print(f"{case.name}: {case.describe()}")
        for contestant in STEP_CONTESTANTS.values():
            print(f"{contestant.name}: {contestant.note}")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.end_to_end: no CUDA device is visible to PyTorch", file=sys.stderr)
        return 2

    deadline = float("inf") if args.time_budget is None else time.time() + args.time_budget
    try:
        schedule = default_schedule(args, deadline)
    except ValueError as error:
        print(f"bench.end_to_end: {error}", file=sys.stderr)
        return 2
    machine = describe_machine(torch.device(args.device))
    path = (args.out or RESULTS / machine_slug(machine)) / "end_to_end.json"
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "list")}
    settings["protocols"] = [asdict(protocol) for protocol in dict.fromkeys(job.protocol for job in schedule.jobs)]
    table = Table()

    def store() -> None:
        named = {row.case for row in table.everything()}
        used = [case for case in schedule.cases if case.name in named]
        write_step_run(path, machine, settings, used, table.rows.values(), table.limits.values())

    def time_left() -> float:
        return min(deadline + _GRACE_S - time.time(), _PROCESS_LIMIT_S[args.device])

    for job in schedule.jobs:
        names = tuple(name for name in job.contestants if table.is_measurable(job.case.name, name))
        if not names:
            continue
        started = time.time()
        job = replace(job, contestants=names, deadline=started + time_left() - _GRACE_S)
        for row in run_past_crashes(job, time_left):
            table.take(row, job.protocol)
            store()
            if isinstance(row, LimitRow):
                print(format_limit_row(row), flush=True)
        for name in () if job.searches else names:
            print(format_step_row(table.rows[job.case.name, name]), flush=True)
        print(f"-- {job.case.name}: {time.time() - started:.0f} s", flush=True)
    print(f"wrote {path}")
    ours = [row for row in table.everything() if row.contestant == "slime_fused"]
    if any(row.status in (FAILED, WRONG) for row in ours):
        return 1
    return NOT_FINISHED_CODE if any(row.status == NOT_FINISHED for row in table.everything()) else 0


if __name__ == "__main__":
    sys.exit(main())
