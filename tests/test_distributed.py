"""Losses that several processes share: four of them on gloo, each judging what it got (`distributed_worker.py`)."""

from __future__ import annotations

import json

import pytest

from tests.distributed_worker import CHECKS, PROCESSES
from tests.processes import run_processes

pytestmark = pytest.mark.slow  # four processes import torch


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """What each process found, by the check's name: "" or a traceback."""
    folder = tmp_path_factory.mktemp("distributed")
    run_processes(["-m", "tests.distributed_worker", str(folder)], PROCESSES, folder, timeout=300)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("check", CHECKS)
def test_shared_losses(findings, check):
    assert [found[check] for found in findings] == [""] * PROCESSES
