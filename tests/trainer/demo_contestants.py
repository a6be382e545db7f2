"""Contestants for the tests of the demo's turns; nothing here loads PyTorch, so that they start at once."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def steps(connection: Connection, diary: Path, seconds: float) -> None:
    """Take ``seconds`` for every step, and write down when it began and when it ended."""
    while (request := connection.recv()) is not None:
        began = time.monotonic()
        time.sleep(seconds)
        with diary.open("a") as file:
            file.write(f"{request} {began} {time.monotonic()}\n")
        connection.send(request)


def fails(connection: Connection, how: str = "exit", answers: int = 0, **options: Any) -> None:
    """Give ``answers``; upon the next request end in the way that ``how`` names."""
    for _ in range(answers):
        connection.send(connection.recv())
    ways: dict[str, Any] = {
        "exit": lambda: os._exit(3),
        "raise": lambda: 1 / 0,
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hang": lambda: time.sleep(60),
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    }
    print("about to", how, flush=True)
    connection.recv()
    ways[how]()
    connection.recv()
