"""Two processes that share a model's weights (FSDP1, FSDP2) take the same optimizer steps as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.processes import run_processes
from tests.tiny_models import make_tokenizer, tiny_llama

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("fsdp_worker.py")

EXACT = [
    (layout, kind)
    for layout, kinds in {
        "FSDP1": ("full", "tied full", "LoRA", "LoRA head", "LoRA, saved head"),
        "FSDP1, every Linear a unit": ("full",),
        "FSDP1, kept until backward": ("LoRA head",),
        "FSDP2": ("full", "tied full", "LoRA", "LoRA head", "tied LoRA head", "LoRA, saved head"),
        "FSDP2, recomputing": ("full",),
        "FSDP2, head in the root": ("full", "LoRA head"),
        "FSDP2, head a unit": ("full", "LoRA head", "LoRA, saved head"),
        "FSDP2, every leaf a unit": ("LoRA head",),
    }.items()
    for kind in kinds
]
KINDS = sorted({kind for _, kind in EXACT})
ROUNDED = [(layout, kind) for layout in ("FSDP1", "FSDP2") for kind in ("full", "LoRA head")]


def train(folder: Path, processes: int, cases: list[tuple[str, ...]]) -> dict:
    folder.mkdir()
    run_processes([str(WORKER), str(folder), json.dumps(cases)], processes, folder)
    results = torch.load(folder / "results.pt")
    assert len(results) == len(cases)
    return dict(zip(cases, results, strict=True))


WITH_A_REFERENCE = [("FSDP1", "full"), ("FSDP2", "full"), ("FSDP2", "LoRA head")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def results(folder):
    one = train(folder / "one", 1, [("one process", kind, "float32", "fused") for kind in KINDS])
    one |= train(
        folder / "one, DPO", 1, [("one process", kind, "float32", "DPO") for kind in ("full", "LoRA head")]
    )
    two = [(*case, "float32", "fused") for case in EXACT]
    two += [(*case, "float32", "DPO") for case in WITH_A_REFERENCE]
    two += [(*case, "bf16", loss) for case in ROUNDED for loss in ("fused", "naive")]
    return one | train(folder / "two", 2, two)


def assert_same(result, expected, rtol: float) -> None:
    assert isinstance(result, dict), result
    assert isinstance(expected, dict), expected
    assert result["change"].keys() == expected["change"].keys()
    moved = 0
    for name, change in expected["change"].items():
        size = float(change.abs().max())
        moved += size > 0
        error = float((result["change"][name] - change).abs().max())
        assert error <= rtol * size, f"{name}: off by {error:.3g} of {size:.3g}"
    assert moved
    for report, wanted in zip(result["reports"], expected["reports"], strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected", *wanted.keys() & {"slime/stabilizer"}):
            assert report[name] == pytest.approx(wanted[name], rel=rtol), name
    assert result["eval"]["eval_loss"] == pytest.approx(expected["eval"]["eval_loss"], rel=rtol)


@pytest.mark.parametrize(("layout", "kind"), EXACT)
def test_two_processes_step_as_one(results, layout, kind):
    assert_same(results[layout, kind, "float32", "fused"], results["one process", kind, "float32", "fused"], 2e-4)


@pytest.mark.parametrize(("layout", "kind"), WITH_A_REFERENCE)
def test_the_reference_of_a_sharded_model(results, layout, kind):
    """It runs once the model is sharded, before the first step."""
    got, expected = results[layout, kind, "float32", "DPO"], results["one process", kind, "float32", "DPO"]
    assert_same(got, expected, 2e-4)
    if kind == "full":  # the adapter changes the model from the beginning
        assert got["reports"][0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert abs(got["reports"][1]["rewards/margins"]) > 1e-3


SAVED = [case for case in EXACT if case[0] in ("FSDP1", "FSDP2")]


@pytest.mark.parametrize(("layout", "kind"), SAVED)
def test_what_is_saved_is_what_was_trained(results, folder, layout, kind):
    """FSDP1 keeps whole checkpoints here and FSDP2 keeps shards: `save_model` writes a whole model under both."""
    result = results[layout, kind, "float32", "fused"]
    saved = folder / "two" / f"{layout} {kind}"
    if "LoRA" in kind:
        base = tiny_llama(len(make_tokenizer()), tie_word_embeddings=kind.startswith("tied"))
        again: Any = PeftModel.from_pretrained(base, str(saved))
    else:
        again = AutoModelForCausalLM.from_pretrained(saved)
    trained = result["end"]
    assert trained.keys() == dict(again.named_parameters()).keys()
    for name, weight in again.named_parameters():
        torch.testing.assert_close(weight.detach(), trained[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(("layout", "kind"), ROUNDED)
def test_mixed_precision_as_the_model_s_own_logits(results, layout, kind):
    fused, naive = (results[layout, kind, "bf16", loss] for loss in ("fused", "naive"))
    # Both round hidden states, weights and gradients to bfloat16 in places; the naive way its logits too. The
    # second step starts from weights that differ by then, so the first says what there is to say.
    assert isinstance(fused, dict), fused
    assert isinstance(naive, dict), naive
    first, wanted = fused["reports"][0], naive["reports"][0]
    assert first["loss"] == pytest.approx(wanted["loss"], rel=2e-3)
    assert first["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=3e-2)
    assert first["rewards/margins"] == pytest.approx(wanted["rewards/margins"], abs=5e-3)
    # Rounded to bfloat16 on its way, a mean of four would be a multiple of 2**-8.
    assert first["logps/chosen"] * 2**8 % 1 != 0
