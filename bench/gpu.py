"""The GPU benchmark: `python -m bench.gpu --out DIR [--cases ...] [--contestants ...] [--time-budget S]`.

Rows are taken in order of importance and written after every process, so a run whose budget ends early has the
rows that matter. Every family of contestants runs in its own process beside the bare matrix products.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bench.cases import ALL_CASES, GPU_CASES, HEADLINE, Case
from bench.contestants import OURS_SMALL
from bench.registry import CONTESTANTS, families
from bench.report import format_rows
from bench.results import FAILED, UNSUPPORTED, Row, describe_machine, machine_slug, write_run
from bench.runner import GPU_PROTOCOL, Protocol
from bench.worker import OUT_OF_TIME, Job, lost_row, run_job

# No process may take longer than this, so that one hang leaves most of the budget to the others.
_PROCESS_LIMIT_S = 150.0

_OURS_HEADLINE = (
    "slime_fused",
    "slime_fused-auto",
    "slime_fused-256MiB",
    "slime_fused-logps",
    "ce-slime_fused",
    "simpo-slime_fused",
)
_BASELINE_HEADLINE = (
    "naive",
    "naive-cross-entropy",
    "naive-no-upcast",
    "torch-linear-ce",
    "ce-naive",
    "ce-torch-linear",
)
_PEERS_HEADLINE = (
    "trl-fused-head",
    "cce",
    "cce-exact",
    "liger-ce-none",
    "ce-liger",
    "simpo-liger",
    "naive-compiled",
    "ce-quack",
    "liger-scaled",
)
_BACKENDS = (
    "slime_fused-cuda",
    "slime_fused-triton",
    "slime_fused-torch",
    *(contestant.name for contestant in OURS_SMALL),
)
_SHORT = ("slime_fused", "slime_fused-auto", "naive", "trl-fused-head")
_PEERS_SHORT = ("cce", "liger-ce-none", "simpo-liger", "simpo-slime_fused")


@dataclass(frozen=True)
class Heat:
    """Cases and contestants that are run next."""

    cases: tuple[Case, ...]
    contestants: tuple[str, ...]


def default_heats() -> tuple[Heat, ...]:
    """The whole benchmark, most important rows first."""
    others = tuple(case for case in GPU_CASES if case is not HEADLINE)
    return (
        Heat((HEADLINE,), _OURS_HEADLINE),
        Heat((HEADLINE,), _BASELINE_HEADLINE),
        Heat((HEADLINE,), _PEERS_HEADLINE[:5]),
        Heat(others[:5], _SHORT[:2]),
        Heat((HEADLINE,), _BACKENDS),
        Heat((HEADLINE,), _PEERS_HEADLINE[5:]),
        Heat(others[:5], _SHORT[2:]),
        Heat(others[5:], _SHORT),
        Heat(others[:5], _PEERS_SHORT),
    )


def selected_heats(cases: Sequence[str], contestants: Sequence[str]) -> tuple[Heat, ...]:
    """The heats restricted to the names given; an empty selection restricts nothing."""
    if cases and contestants:
        return (Heat(tuple(ALL_CASES[name] for name in cases), tuple(contestants)),)
    heats = []
    for heat in default_heats():
        kept_cases = tuple(case for case in heat.cases if not cases or case.name in cases)
        kept = tuple(name for name in heat.contestants if not contestants or name in contestants)
        if kept_cases and kept:
            heats.append(Heat(kept_cases, kept))
    return tuple(heats)


def run_heats(heats: Sequence[Heat], device: str, protocol: Protocol, deadline: float) -> Iterator[list[Row]]:
    """Rows of one process after another, until the deadline (seconds since the epoch)."""
    for heat in heats:
        unsupported = _unsupported(heat, torch.device(device))
        if unsupported:
            yield unsupported
        refused = {row.contestant for row in unsupported}
        for names in families(tuple(name for name in heat.contestants if name not in refused)).values():
            job = Job(device, tuple(case.name for case in heat.cases), names, protocol, deadline)
            rows = _run_within(job)
            yield rows
            yield from _retry_alone(job, rows)


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


def _run_within(job: Job) -> list[Row]:
    left = job.deadline - time.time()
    if left <= 0:
        return [lost_row(case, name, OUT_OF_TIME) for case in job.cases for name in job.contestants]
    return run_job(job, min(left + 20.0, _PROCESS_LIMIT_S))


def _retry_alone(job: Job, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """A process that died took its family along: give each member its own, as long as there is time."""
    lost = {row.contestant for row in rows if row.status == FAILED and row.reason.startswith("process ended")}
    members = [name for name in job.contestants if name in lost and name != "products"]
    if len(job.contestants) > 2:
        for name in members:
            yield _run_within(replace(job, contestants=("products", name)))


def merge(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows by (case, contestant): a later row replaces an earlier one unless it only says that it failed."""
    table = {(row.case, row.contestant): row for row in rows}
    for row in new:
        key = (row.case, row.contestant)
        if key not in table or row.status != FAILED or table[key].status == FAILED:
            # The products are timed once per process; the first reading stands, each row keeps its own.
            if row.contestant == "products" and key in table and table[key].status != FAILED:
                continue
            table[key] = row
    return list(table.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code says whether any row of this package failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file")
    parser.add_argument("--cases", nargs="*", default=[], choices=sorted(ALL_CASES), metavar="CASE")
    parser.add_argument("--contestants", nargs="*", default=[], choices=sorted(CONTESTANTS), metavar="NAME")
    parser.add_argument("--time-budget", type=float, default=300.0, help="seconds after which nothing is begun")
    parser.add_argument("--rounds", type=int, default=GPU_PROTOCOL.rounds)
    parser.add_argument("--device", default="cuda", help="cpu runs the same rows slowly, to try the machinery")
    parser.add_argument("--list", action="store_true", help="print cases and contestants, then exit")
    args = parser.parse_args(argv)
    if args.list:
        print("cases:", *ALL_CASES, "contestants:", *CONTESTANTS, sep="\n  ")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: no CUDA device is visible to PyTorch", file=sys.stderr)
        return 2

    deadline = time.time() + args.time_budget
    protocol = replace(GPU_PROTOCOL, rounds=args.rounds)
    machine = describe_machine(torch.device(args.device))
    path = (args.out or Path(__file__).parent / "results" / machine_slug(machine)) / "gpu.json"
    heats = selected_heats(args.cases, args.contestants)
    rows: list[Row] = []
    for batch in run_heats(heats, args.device, protocol, deadline):
        rows = merge(rows, batch)
        named = {row.case for row in rows}
        write_run(path, machine, asdict(protocol), [c for c in ALL_CASES.values() if c.name in named], rows)
        print(format_rows(batch, ALL_CASES), flush=True)
    print(f"wrote {path}")
    return int(any(row.status == FAILED and "slime_fused" in row.contestant for row in rows))


if __name__ == "__main__":
    sys.exit(main())
