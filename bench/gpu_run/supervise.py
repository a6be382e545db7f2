"""Runs one command under a time limit: its whole process group ends with it, and its log says why."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.clocks import query_command, summarize

OK, FAILED, NOT_FINISHED, SKIPPED = "ok", "failed", "not finished", "skipped"
NOT_FINISHED_CODE = 3
"""As in bench/results.py, which needs PyTorch."""
# Between asking a process to end and ending it.
TERM_SECONDS = 3.0


@dataclass(frozen=True)
class Outcome:
    """How a part went."""

    name: str
    status: str
    seconds: float = 0.0
    limit: float = 0.0
    code: int | None = None
    reason: str = ""
    clocks: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line of the summary."""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.name:16s} {self.status:12s} {self.seconds:5.0f} of {self.limit:4.0f} s{why}"


def run(
    name: str,
    command: Sequence[str],
    limit: float,
    log: Path,
    *,
    cwd: Path,
    env: Mapping[str, str],
    must_show: str = "",
) -> Outcome:
    """Run ``command``, its output in ``log``. Past ``limit`` seconds its process group is ended: "not finished".

    ``must_show``: a pattern without which the output proves nothing, whatever the exit code.
    """
    begun = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output, _clocks(log.with_suffix(".clocks.csv"), env) as clocks:
        try:
            process = subprocess.Popen(
                command, cwd=cwd, env=dict(env), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            output.write(f"{error}\n")
            return Outcome(name, FAILED, 0.0, limit, None, str(error))
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        _end_group(process)
    seconds = time.monotonic() - begun
    summary = summarize(clocks.read_text().splitlines()) if clocks.exists() else {}
    if code is None:
        return Outcome(name, NOT_FINISHED, seconds, limit, None, f"ended after {limit:.0f} s", summary)
    if code == NOT_FINISHED_CODE:
        return Outcome(name, NOT_FINISHED, seconds, limit, code, "left something out for want of time", summary)
    if code != 0:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Outcome(name, FAILED, seconds, limit, code, how, summary)
    if must_show and not re.search(must_show, log.read_text(errors="replace")):
        return Outcome(name, FAILED, seconds, limit, code, f"the log shows no {must_show!r}", summary)
    return Outcome(name, OK, seconds, limit, code, "", summary)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what the command started, also after it ended itself: a stray process would disturb what comes next."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        # A process that waits for a lost device may not even end by SIGKILL: the others must still get their turn.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TERM_SECONDS)


@contextlib.contextmanager
def _clocks(path: Path, env: Mapping[str, str]) -> Iterator[Path]:
    """The GPU's clocks, power and what holds them back, once a second into a file beside the log."""
    try:
        with path.open("w") as lines:
            sampler = subprocess.Popen(
                [*query_command(), "-l", "1"], env=dict(env), stdout=lines, stderr=subprocess.DEVNULL
            )
    except OSError:
        path.unlink(missing_ok=True)
        yield path
        return
    try:
        yield path
    finally:
        sampler.terminate()
        sampler.wait()
