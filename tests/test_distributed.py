"""Losses that several processes share: four of them on gloo, each judging what it got (`distributed_worker.py`)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed_worker import CHECKS, PROCESSES

pytestmark = pytest.mark.slow  # four processes import torch

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """What each process found, by the check's name: "" or a traceback."""
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
    running = []
    for rank in range(PROCESSES):
        place = {**address, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
        log = (folder / f"rank{rank}.log").open("w+")
        command = [sys.executable, "-m", "tests.distributed_worker", str(folder)]
        process = subprocess.Popen(command, env=os.environ | place, cwd=REPOSITORY, stdout=log, stderr=log)
        running.append((process, log))
    try:
        for process, log in running:
            status = process.wait(timeout=300)
            log.seek(0)
            assert status == 0, log.read()[-3000:]
    finally:
        for process, log in running:
            process.kill()
            log.close()
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("check", CHECKS)
def test_shared_losses(findings, check):
    assert [found[check] for found in findings] == [""] * PROCESSES
