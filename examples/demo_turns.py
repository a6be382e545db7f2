"""Contestants that take turns: each a process of its own that works only when it is asked to, and else waits.

Timing one contestant after the other compares two stretches of time as much as two programs: whatever else the
machine did in one of them is taken for a difference. Here every round asks each contestant for one step, the first
to go changes from round to round, and only one of them works at any moment.
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import signal
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any


class ContestantError(RuntimeError):
    """A contestant died or did not answer in time; the message says which, when and what it printed last."""


class Contestant:
    """A process that runs ``serve(connection, **options)``; what it prints goes into the file ``log``.

    ``serve`` is named as "module:function" and imported there alone: this process stays small. It receives a
    request, works and sends its answer, until the request is None.
    """

    def __init__(self, name: str, serve: str, log: Path, **options: Any) -> None:
        self.name, self.log = name, log
        # A fresh interpreter, not a fork: threads and memory of this process must not be in what is measured.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_run, args=(theirs, serve, log, options), name=f"demo-{name}", daemon=True
        )
        self._process.start()
        # The contestant now holds the only other end: when it dies, the pipe ends, and nobody waits for ever.
        theirs.close()

    def ask(self, request: Any, timeout: float) -> Any:
        """The answer to ``request``. Raises ContestantError if the process dies, or after ``timeout`` seconds."""
        try:
            self._connection.send(request)
            if self._connection.poll(timeout):
                return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(10)
            raise ContestantError(
                f"the {self.name} contestant died ({_describe(self._process.exitcode)}) while it was asked for "
                f"{request!r}{self._last_lines()}"
            ) from None
        self._process.kill()
        raise ContestantError(
            f"the {self.name} contestant gave no answer to {request!r} within {timeout:.0f} s and was ended"
            f"{self._last_lines()}"
        )

    def __enter__(self) -> Contestant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the process end by itself, or end it: at once after an error, else when it takes too long."""
        if error is None:
            with suppress(OSError):
                self._connection.send(None)
            self._process.join(30)
        self._connection.close()
        self._process.kill()
        self._process.join()

    def _last_lines(self, count: int = 12) -> str:
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return ":\n" + "\n".join(lines[-count:]) if lines else f"; it printed nothing into {self.log}"


def take_turns(
    contestants: Sequence[Contestant], turn: int, requests: Mapping[str, Any], timeout: float
) -> dict[str, Any]:
    """Every contestant's answer to its own of the ``requests``; in odd turns the last contestant goes first."""
    order = reversed(contestants) if turn % 2 else contestants
    answers = {contestant.name: contestant.ask(requests[contestant.name], timeout) for contestant in order}
    return {contestant.name: answers[contestant.name] for contestant in contestants}


def _run(connection: Connection, serve: str, log: Path, options: dict[str, Any]) -> None:
    """The contestant's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the asking process ends this one
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        pkgutil.resolve_name(serve)(connection, **options)
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def _describe(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        hint = ", perhaps for want of memory" if -exitcode == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-exitcode).name}{hint}"
    return f"exit status {exitcode}"
