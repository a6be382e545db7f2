"""Two processes on gloo take the same optimizer steps, and report the same numbers, as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.processes import run_processes
from tests.trainer.ddp_worker import LOSSES

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("ddp_worker.py")


def launch(folder: Path, processes: int, *settings: int) -> dict:
    folder.mkdir()
    run_processes([str(WORKER), str(folder), json.dumps(settings)], processes, folder)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(of two processes that accumulate, of one that does not)."""
    folder = tmp_path_factory.mktemp("ddp")
    return launch(folder / "two", 2, 1, 2), launch(folder / "one", 1, 4, 1)


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_step_as_one(results, loss):
    two, one = (of[loss] for of in results)
    assert len(two["gradients"]) == len(one["gradients"]) == 2
    for step, expected in zip(two["gradients"], one["gradients"], strict=True):
        for name, value in expected.items():
            floor = 2e-5 * float(value.abs().max())
            torch.testing.assert_close(step[name], value, rtol=2e-3, atol=floor, msg=lambda m, n=name: f"{n}: {m}")
    for report, expected in zip(two["reports"], one["reports"], strict=True):
        assert report["num_pairs"] == 4
        assert report["num_tokens"] == expected["num_tokens"]
        assert report.keys() == expected.keys()
        for name in report.keys() - {"epoch", "learning_rate", "grad_norm"}:
            assert report[name] == pytest.approx(expected[name], rel=1e-4, abs=2e-6), name


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_evaluate_as_one(results, loss):
    """Ten pairs and three: what the sampler repeats for the sake of even batches does not count."""
    two, one = (of[loss] for of in results)
    assert two["eval"].keys() == one["eval"].keys()
    assert [two["eval"][f"eval_{name}_num_pairs"] for name in ("ten", "three")] == [10, 3]
    assert [two["eval"][f"eval_{name}_counted"] for name in ("ten", "three")] == [10, 3]
    numbers = [n for n in two["eval"] if not n.endswith(("runtime", "per_second", "preparation_time"))]
    assert len(numbers) > 30
    for name in numbers:
        assert two["eval"][name] == pytest.approx(one["eval"][name], rel=1e-5, abs=2e-6), name
    for name, values in one["predictions"].items():
        assert values.shape == (10,)
        torch.testing.assert_close(two["predictions"][name], values, rtol=1e-5, atol=1e-5)
    assert torch.equal(two["tokens"], one["tokens"])
