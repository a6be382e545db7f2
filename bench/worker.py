"""One process of a benchmark: `python -m bench.worker JOB.json` writes a JSON line per finished row.

A fault of one contestant (a CUDA error, a crash, a hang) must not cost the rows of the others, and peak resident
memory is a property of a process; so `run_job` starts a child per family of contestants and reads its rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.cases import ALL_CASES
from bench.registry import CONTESTANTS
from bench.results import FAILED, Row, row_from
from bench.runner import DeviceLost, Protocol, run_case

_ROOT = Path(__file__).parent.parent
OUT_OF_TIME = "not started: the time budget was spent"


@dataclass(frozen=True)
class Job:
    """Contestants and cases by name. ``deadline``: seconds since the epoch after which no case is begun."""

    device: str
    cases: tuple[str, ...]
    contestants: tuple[str, ...]
    protocol: Protocol
    deadline: float


def run_job(job: Job, timeout: float) -> list[Row]:
    """Run a job in a child process. Rows that it did not deliver come back as failures that say why."""
    with tempfile.TemporaryDirectory() as folder:
        rows_path, job_path = Path(folder) / "rows.jsonl", Path(folder) / "job.json"
        job_path.write_text(json.dumps(asdict(job)))
        reason = _run_child([sys.executable, "-m", "bench.worker", str(job_path), str(rows_path)], timeout)
        lines = rows_path.read_text().splitlines() if rows_path.exists() else []
    delivered = {(row.case, row.contestant): row for row in map(row_from, map(json.loads, lines))}
    return [
        delivered.get((case, name), lost_row(case, name, reason)) for case in job.cases for name in job.contestants
    ]


def lost_row(case: str, name: str, reason: str) -> Row:
    """The row of a contestant that could not deliver one."""
    contestant = CONTESTANTS[name]
    return Row(case, name, contestant.objective, FAILED, reason, contestant.note)


def _run_child(command: Sequence[str], timeout: float) -> str:
    """Why rows may be missing: the end of the child's error output, or the time limit."""
    try:
        child = subprocess.run(command, cwd=_ROOT, stderr=subprocess.PIPE, text=True, timeout=max(timeout, 1.0))
    except subprocess.TimeoutExpired:
        return f"not finished within {timeout:.0f} s"
    last = [line for line in child.stderr.splitlines() if line.strip()][-1:]
    if child.returncode == 0:
        return OUT_OF_TIME
    return f"process ended with code {child.returncode}: {' '.join(last)[:300]}"


def main(job_path: str, rows_path: str) -> int:
    """Run the job in this process."""
    record = json.loads(Path(job_path).read_text())
    job = Job(**{**record, "protocol": Protocol(**record["protocol"])})
    device = torch.device(job.device)
    contestants = [CONTESTANTS[name] for name in job.contestants]
    with Path(rows_path).open("a") as out:

        def report(row: Row) -> None:
            out.write(json.dumps(asdict(row)) + "\n")
            out.flush()

        for name in job.cases:
            if time.time() >= job.deadline:
                return 0
            try:
                run_case(ALL_CASES[name], contestants, device, job.protocol, report)
            except DeviceLost as error:
                print(error, file=sys.stderr)
                return 3
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
