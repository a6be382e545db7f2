"""Two processes on gloo take the same optimizer steps, and report the same numbers, as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.processes import run_processes

WORKER = Path(__file__).with_name("ddp_worker.py")


def launch(folder: Path, reduction: str, batch_size: int, accumulation: int, processes: int):
    folder.mkdir()
    run_processes([str(WORKER), str(folder), reduction, str(batch_size), str(accumulation)], processes, folder)
    return torch.load(folder / "gradients.pt"), json.loads((folder / "reports.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_two_processes_step_as_one(tmp_path, reduction):
    gradients, reports = launch(tmp_path / "two", reduction, batch_size=1, accumulation=2, processes=2)
    expected, expected_reports = launch(tmp_path / "one", reduction, batch_size=4, accumulation=1, processes=1)
    assert len(gradients) == len(expected) == 2
    for step, expected_step in zip(gradients, expected, strict=True):
        for name, value in expected_step.items():
            floor = 2e-5 * float(value.abs().max())
            torch.testing.assert_close(step[name], value, rtol=2e-3, atol=floor, msg=lambda m, n=name: f"{n}: {m}")
    names = ("loss", "slime/stabilizer", "logps/chosen", "rewards/margins", "slime/active_fraction")
    for report, expected_report in zip(reports["train"], expected_reports["train"], strict=True):
        assert report["num_pairs"] == 4
        assert report["num_tokens"] == expected_report["num_tokens"]
        for name in names:
            assert report[name] == pytest.approx(expected_report[name], rel=1e-4), name
    assert reports["eval"]["eval_num_pairs"] == 8
    for name in ("logps/chosen", "logps/rejected", "rewards/margins"):
        assert reports["eval"][f"eval_{name}"] == pytest.approx(expected_reports["eval"][f"eval_{name}"], rel=1e-4)
