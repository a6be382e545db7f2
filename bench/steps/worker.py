"""One process of the end-to-end benchmark: a job on its input, a JSON line per row on its output.

A fault or a hang must not cost the rows of other jobs, and peak resident memory is a property of a process. Rows
come out as they are learnt, so that whoever stops the run keeps them.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch

from bench.results import FAILED, NOT_FINISHED, OK
from bench.runner import DeviceLost
from bench.steps.cases import StepCase
from bench.steps.contestants import STEP_CONTESTANTS
from bench.steps.results import LimitRow, Quantity, StepRow, limit_row_from, step_row_from
from bench.steps.runner import Bounds, StepProtocol, find_limit, run_step_case
from bench.worker import OUT_OF_TIME

_DIED = "process ended"
_PR_SET_PDEATHSIG = 1  # prctl(2)
_ROOT = Path(__file__).parent.parent.parent
# Without it, the pieces that one contestant's logits leave in the allocator's cache may not fit the next one's.
_ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@dataclass(frozen=True)
class Search:
    """Which size of the job's case is searched, and within which bounds."""

    quantity: Quantity
    bounds: Bounds
    room: int | None = None


@dataclass(frozen=True)
class StepJob:
    """One case and its contestants, by name; with ``searches``, their limits instead of their steps."""

    device: str
    case: StepCase
    contestants: tuple[str, ...]
    protocol: StepProtocol
    deadline: float
    searches: tuple[Search, ...] = ()

    @staticmethod
    def from_record(record: dict[str, Any]) -> StepJob:
        """A job from its JSON object."""
        searches = tuple(
            Search(search["quantity"], Bounds(**search["bounds"]), search["room"]) for search in record["searches"]
        )
        return StepJob(
            record["device"],
            StepCase(**record["case"]),
            tuple(record["contestants"]),
            StepProtocol(**record["protocol"]),
            record["deadline"],
            searches,
        )


AnyRow: TypeAlias = StepRow | LimitRow


def run_step_job(job: StepJob, timeout: float) -> Iterator[AnyRow]:
    """Rows of a job as a child process reports them; what it did not deliver follows, with the reason.

    Nothing is started after the job's deadline.
    """
    if time.time() >= job.deadline:
        yield from (replace(row, status=NOT_FINISHED, reason=OUT_OF_TIME) for row in expected_rows(job))
        return
    latest: dict[tuple[str, str], AnyRow] = {}
    with tempfile.TemporaryFile("w+") as errors:
        reason = ""
        for record in _child_lines(json.dumps(asdict(job)), timeout, errors):
            if "reason" in record:
                reason = record["reason"]
                continue
            row: AnyRow = limit_row_from(record["limit"]) if "limit" in record else step_row_from(record["step"])
            latest[_key(row)] = row
            yield row
    # A child that ended well left out what its deadline forbade.
    reason = reason or OUT_OF_TIME
    status = NOT_FINISHED if reason.startswith("not ") else FAILED
    for row in expected_rows(job):
        delivered = latest.get(_key(row), row)
        lacks_time = isinstance(delivered, StepRow) and _lacks_time(delivered, job.protocol)
        if delivered is row or lacks_time:
            yield replace(delivered, status=status, reason=reason)


def run_past_crashes(job: StepJob, time_left: Callable[[], float]) -> Iterator[AnyRow]:
    """Rows of a job; where the process dies while a contestant is checked, the others run again without it.

    ``time_left``: the time limit, in seconds, of a process that begins now.
    """
    names = job.contestants
    while names:
        latest: dict[str, AnyRow] = {}
        for row in run_step_job(replace(job, contestants=names), time_left()):
            latest[row.contestant] = row
            yield row
        lost = [name for name in names if latest[name].reason.startswith(_DIED)]
        unchecked = [name for name in lost if _is_unchecked(latest[name])]
        names = tuple(name for name in lost if name != unchecked[0]) if unchecked else ()


def _is_unchecked(row: AnyRow) -> bool:
    return isinstance(row, StepRow) and row.error_loss is None


def expected_rows(job: StepJob) -> list[AnyRow]:
    """Empty rows of everything that a job is to deliver."""
    if job.searches:
        return [
            LimitRow(job.case.name, name, search.quantity, room_bytes=search.room)
            for name in job.contestants
            for search in job.searches
        ]
    return [StepRow(job.case.name, name, note=STEP_CONTESTANTS[name].note) for name in job.contestants]


def _key(row: AnyRow) -> tuple[str, str]:
    return (row.contestant, row.quantity if isinstance(row, LimitRow) else "")


def _lacks_time(row: StepRow, protocol: StepProtocol) -> bool:
    return protocol.time and row.status == OK and not row.samples_ms


def _child_lines(job: str, timeout: float, errors: IO[str]) -> Iterator[dict[str, Any]]:
    """The child's JSON lines, then one with the ``reason`` why rows may be missing."""
    timeout = max(timeout, 1.0)
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.steps.worker", job],
        cwd=_ROOT,
        env={**_ENVIRONMENT, **os.environ},
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    hung = threading.Event()

    def stop() -> None:
        hung.set()
        child.kill()

    timer = threading.Timer(timeout, stop)
    timer.start()
    try:
        assert child.stdout is not None
        for line in child.stdout:
            yield json.loads(line)
        code = child.wait()
    finally:
        timer.cancel()
        child.kill()
    if hung.is_set():
        yield {"reason": f"not finished within {timeout:.0f} s"}
    elif code != 0:
        errors.seek(0)
        last = [line for line in errors.read().splitlines() if line.strip()][-1:]
        yield {"reason": f"{_DIED} with code {code}: {' '.join(last)[:300]}"}


def main(job_text: str) -> int:
    """Run the job in this process."""
    # Whatever a library prints must not come between the rows.
    out, sys.stdout = sys.stdout, sys.stderr

    def report(row: AnyRow) -> None:
        kind = "limit" if isinstance(row, LimitRow) else "step"
        print(json.dumps({kind: asdict(row)}), file=out, flush=True)

    # Whoever kills the parent must not leave this process on the device.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    job = StepJob.from_record(json.loads(job_text))
    device = torch.device(job.device)
    contestants = [STEP_CONTESTANTS[name] for name in job.contestants]
    if time.time() >= job.deadline:
        return 0
    try:
        if not job.searches:
            run_step_case(job.case, contestants, device, job.protocol, job.deadline, report)
        for search in job.searches:
            for contestant in contestants:
                options = (search.bounds, search.room, job.deadline)
                report(find_limit(job.case, contestant, search.quantity, device, *options))
    except DeviceLost as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
