"""Starting the processes of a distributed test on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def run_processes(arguments: list[str], count: int, logs: Path, *, timeout: float = 200) -> None:
    """Run Python with ``arguments`` in ``count`` processes that find each other; each must end with status 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")]))
    running = []
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)} if count > 1 else {}
        log = (logs / f"rank{rank}.log").open("w+")
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, env=environment | place, cwd=REPOSITORY, stderr=log, stdout=log)
        running.append((process, log))
    try:
        for process, log in running:
            status = process.wait(timeout=timeout)
            log.seek(0)
            assert status == 0, log.read()[-3000:]
    finally:
        for process, log in running:
            process.kill()
            log.close()
