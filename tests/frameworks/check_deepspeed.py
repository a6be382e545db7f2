"""Two processes that share a model's weights by DeepSpeed's ZeRO take the same optimizer steps as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.processes import run_processes
from tests.tiny_models import make_tokenizer, tiny_llama

WORKER = Path(__file__).with_name("deepspeed_worker.py")

KINDS = ("full", "tied full", "LoRA", "LoRA head", "LoRA, saved head")
CASES = [*((stage, kind) for stage in ("2", "3") for kind in KINDS), ("3, offloaded", "LoRA, saved head")]


def train(folder: Path, processes: int, cases: list[tuple[str, str]]) -> dict:
    folder.mkdir()
    run_processes([str(WORKER), str(folder), json.dumps(cases)], processes, folder, timeout=400)
    return dict(zip(cases, torch.load(folder / "results.pt"), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def results(folder):
    one = train(folder / "one", 1, [("one process", kind) for kind in KINDS])
    return one | train(folder / "two", 2, CASES)


@pytest.mark.parametrize(("stage", "kind"), CASES)
def test_two_processes_step_as_one(results, stage, kind):
    result, expected = results[stage, kind], results["one process", kind]
    assert isinstance(result, dict), result
    assert isinstance(expected, dict), expected
    assert result["change"].keys() == expected["change"].keys()
    for name, change in expected["change"].items():
        size = float(change.abs().max())
        error = float((result["change"][name] - change).abs().max())
        assert error <= 2e-4 * size, f"{name}: off by {error:.3g} of {size:.3g}"
    assert any(float(change.abs().max()) > 0 for change in expected["change"].values())
    for report, wanted in zip(result["reports"], expected["reports"], strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "slime/stabilizer"):
            assert report[name] == pytest.approx(wanted[name], rel=2e-4), name
    assert result["eval"]["eval_loss"] == pytest.approx(expected["eval"]["eval_loss"], rel=2e-4)


@pytest.mark.parametrize(("stage", "kind"), CASES)
def test_what_is_saved_loads_again(results, folder, stage, kind):
    saved = folder / "two" / f"{stage} {kind}"
    if "LoRA" in kind:
        again = PeftModel.from_pretrained(tiny_llama(len(make_tokenizer())), str(saved))
    else:
        again = AutoModelForCausalLM.from_pretrained(saved)
    trained = results[stage, kind]["end"]
    assert trained.keys() == dict(again.named_parameters()).keys()
    for name, weight in again.named_parameters():
        torch.testing.assert_close(weight.detach(), trained[name], rtol=0, atol=0, msg=name)
