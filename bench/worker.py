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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch

from bench.cases import ALL_CASES
from bench.registry import CONTESTANTS
from bench.results import FAILED, NOT_FINISHED, Row, row_from
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


def run_job(job: Job, timeout: float, on_row: Callable[[Row], None] | None = None) -> list[Row]:
    """Run a job in a child process. Rows that it did not deliver come back as failures that say why.

    ``on_row`` is called with each row within a second of its measurement.
    """
    delivered: dict[tuple[str, str], Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows_path, job_path = Path(folder) / "rows.jsonl", Path(folder) / "job.json"
        job_path.write_text(json.dumps(asdict(job)))
        rows_path.touch()
        with rows_path.open() as lines:

            def collect() -> None:
                for row in _whole_rows(lines):
                    delivered[row.case, row.contestant] = row
                    if on_row is not None:
                        on_row(row)

            command = [sys.executable, "-m", "bench.worker", str(job_path), str(rows_path)]
            reason = _run_child(command, timeout, collect)
            collect()
    return [
        delivered.get((case, name), lost_row(case, name, reason)) for case in job.cases for name in job.contestants
    ]


def _whole_rows(lines: TextIO) -> list[Row]:
    """The rows that were written since the last call; half a line waits for its rest."""
    rows: list[Row] = []
    while True:
        start = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(start)
            return rows
        rows.append(row_from(json.loads(line)))


def lost_row(case: str, name: str, reason: str) -> Row:
    """The row of a contestant that could not deliver one: out of time, or failed."""
    contestant = CONTESTANTS[name]
    status = NOT_FINISHED if reason.startswith(("not started", "not finished")) else FAILED
    return Row(case, name, contestant.objective, status, reason, contestant.note)


def _run_child(command: Sequence[str], timeout: float, poll: Callable[[], None]) -> str:
    """Why rows may be missing: the end of the child's error output, or the time limit. Calls ``poll`` meanwhile."""
    limit = max(timeout, 1.0)
    deadline = time.monotonic() + limit
    child = subprocess.Popen(command, cwd=_ROOT, stderr=subprocess.PIPE, text=True)
    while True:
        try:
            _, errors = child.communicate(timeout=min(1.0, max(0.0, deadline - time.monotonic())))
            break
        except subprocess.TimeoutExpired:
            poll()
            if time.monotonic() >= deadline:
                child.kill()
                child.communicate()
                return f"not finished within {limit:.0f} s"
    last = [line for line in errors.splitlines() if line.strip()][-1:]
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
