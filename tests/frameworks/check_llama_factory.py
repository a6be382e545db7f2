"""LLaMA-Factory with this package's losses: its own command line and trainer on a tiny model, step by step."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest

from slime_fused.losses import DPO, SFT, SimPO, Slime
from tests.frameworks.support import plain_loss, save_model, save_pairs, watch_dropout, watch_steps

if importlib.util.find_spec("torchaudio") is None:
    # Imported for audio inputs, of which there are none; its wheel needs CUDA's libraries (see the requirements).
    stand_in = types.ModuleType("torchaudio")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = stand_in

from llamafactory.train.dpo import trainer as lf_trainer

from slime_fused.integrations import llama_factory
from slime_fused.integrations.hooks import HookError

RECIPE = Path(__file__).parents[2] / "recipes" / "llama_factory.yaml"
PLAIN = lf_trainer.CustomDPOTrainer


@pytest.fixture(autouse=True)
def plain_trainer(monkeypatch):
    """Every test begins with LLaMA-Factory's own class."""
    monkeypatch.setattr(lf_trainer, "CustomDPOTrainer", PLAIN)


@pytest.fixture
def settings(tmp_path):
    """What a tiny model on a CPU needs in place of the recipe's entries."""
    save_pairs(tmp_path / "data" / "pairs.jsonl", 8)
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    info = {"pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": columns}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    return {
        "model_name_or_path": str(save_model(tmp_path / "model")),
        "dataset": "pairs",
        "dataset_dir": str(tmp_path / "data"),
        "template": "default",
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "plot_loss": False,
    }


def history(settings) -> list[dict[str, float]]:
    state = json.loads((Path(settings["output_dir"]) / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@contextmanager
def reference_model(trainer):
    if trainer.ref_model is not None:
        yield trainer.ref_model
        return
    with trainer.model.disable_adapter():
        yield trainer.model


def test_the_recipe_trains_slime_and_every_step_is_that_of_the_reference(settings, monkeypatch):
    losses = watch_steps(monkeypatch, lambda trainer, batch: plain_loss(trainer.model, batch, Slime()))
    settings["lora_dropout"] = 0.0  # the reference would drop others
    llama_factory.main(["train", str(RECIPE), *(f"{name}={value}" for name, value in settings.items())])
    logged = history(settings)
    assert len(losses) == len(logged) == 3
    for loss, entry in zip(losses, logged, strict=True):
        assert entry["loss"] == pytest.approx(loss, abs=1e-4)  # rounded to four digits
        parts = sum(entry[f"slime/{name}"] for name in ("anchor", "margin", "stabilizer"))
        assert parts == pytest.approx(loss, rel=1e-5)
        assert entry["rewards/margins"] == pytest.approx(
            entry["mean_logps/chosen"] - entry["mean_logps/rejected"], abs=1e-6
        )
    assert losses[-1] < losses[0]
    # The head was trained and is in the adapter.
    from safetensors import safe_open

    with safe_open(str(Path(settings["output_dir"]) / "adapter_model.safetensors"), "pt") as adapter:
        assert any("lm_head" in name for name in adapter.keys())  # noqa: SIM118


def test_the_recipes_dropout_acts(settings, monkeypatch):
    """LLaMA-Factory's own trainer sets it to 0."""
    seen = watch_dropout(monkeypatch)
    settings["max_steps"] = 1
    llama_factory.main(["train", str(RECIPE), *(f"{name}={value}" for name, value in settings.items())])
    assert seen == [{0.05}]


@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
@pytest.mark.parametrize("loss", [DPO(beta=0.2), SimPO(beta=2.0, gamma=0.3)], ids=["dpo", "simpo"])
def test_other_losses_with_and_without_a_reference(settings, monkeypatch, loss, finetuning_type):
    needs_reference = isinstance(loss, DPO)

    def expected(trainer, batch):
        assert (trainer.ref_model is not None) == (needs_reference and finetuning_type == "full")
        other = reference_model(trainer) if needs_reference else None
        return plain_loss(trainer.model, batch, loss, other)

    losses = watch_steps(monkeypatch, expected)
    own = (
        {"slime_loss": "dpo", "slime_beta": 0.2} if needs_reference else {"slime_loss": "simpo", "slime_gamma": 0.3}
    )
    config = {**settings, "stage": "dpo", "do_train": True, "finetuning_type": finetuning_type, "report_to": "none"}
    llama_factory.train({**config, **own})
    assert len(losses) == 3
    if needs_reference:
        assert losses[0] == pytest.approx(0.693147, abs=1e-5)
        assert losses[-1] != pytest.approx(losses[0], abs=1e-3)
    rewards = [entry["rewards/chosen"] for entry in history(settings)]
    assert len(rewards) == 3


def test_simpo_equals_llama_factorys_own(settings, monkeypatch):
    """Its own SimPO from materialised logits, on the same batches from the same weights."""
    config = {**settings, "stage": "dpo", "do_train": True, "finetuning_type": "full", "report_to": "none"}
    from llamafactory.train.tuner import run_exp

    run_exp({**config, "pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 0.5})
    own = history(settings)
    llama_factory.train(
        {**config, "slime_loss": "simpo", "slime_beta": 2.0, "slime_gamma": 0.5, "overwrite_output_dir": True}
    )
    fused = history(settings)
    assert len(own) == len(fused) == 3
    for theirs, ours in zip(own, fused, strict=True):
        for name in ("loss", "grad_norm", "rewards/accuracies", "rewards/margins", "rewards/chosen"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-4), name
        # What it calls logps is a mean for this loss.
        assert ours["mean_logps/chosen"] == pytest.approx(theirs["logps/chosen"], rel=1e-3)


def test_evaluation(settings):
    config = {**settings, "stage": "dpo", "do_train": True, "do_eval": True, "val_size": 0.25, "report_to": "none"}
    llama_factory.train({**config, "finetuning_type": "lora", "slime_loss": "slime", "max_steps": 1})
    results = json.loads((Path(settings["output_dir"]) / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(
        sum(results[f"eval_slime/{name}"] for name in ("anchor", "margin", "stabilizer")), rel=1e-4
    )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"stage": "sft"}, "stage: expected 'dpo', got 'sft'"),
        ({"pref_loss": "simpo"}, "pref_loss: slime_loss takes its place"),
        (
            {"slime_loss": "dpo", "pref_beta": 0.3},
            r"pref_beta: slime_beta takes its place; expected none, got 0\.3",
        ),
        ({"slime_loss": "simpo", "simpo_gamma": 1.0}, "simpo_gamma: slime_gamma takes its place"),
        (
            {"slime_stabilizer_reduction": "token", "gradient_accumulation_steps": 2},
            "stabilizer_reduction: expected 'sequence', got 'token' with gradient_accumulation_steps=2",
        ),
        ({"use_ray": True}, "use_ray: expected false"),
        ({"pref_ftx": 0.5}, "pref_ftx: expected 0.0, got 0.5: Slime would ignore it"),
        ({"slime_loss": "grpo"}, "slime_loss: expected one of slime, dpo, simpo, orpo, cpo, alphapo, got 'grpo'"),
        ({"slime_lamda_w": 1.0}, "slime_lamda_w: expected a setting of 'slime'.*did you mean slime_lambda_w"),
        ({"slime_lambda_w": -1.0}, "slime_lambda_w: expected"),
    ],
)
def test_refusals(settings, entries, message):
    config = {**settings, "stage": "dpo", "do_train": True, "finetuning_type": "lora", "report_to": "none"}
    with pytest.raises(ValueError, match=message):
        llama_factory.train({**config, **entries})


@pytest.mark.parametrize(("name", "value"), [("pref_beta", 0.3), ("simpo_gamma", 1.0)])
def test_hyperparameters_of_its_own_losses_are_refused_in_python(settings, name, value):
    from llamafactory.train.tuner import run_exp

    llama_factory.enable_loss(SimPO())
    config = {**settings, "stage": "dpo", "do_train": True, "finetuning_type": "lora", "report_to": "none"}
    with pytest.raises(ValueError, match=f"{name}: expected .*, got {value}: SimPO would ignore it; leave it out"):
        run_exp({**config, "pref_loss": "simpo", name: value})


def test_a_policy_that_would_be_its_own_reference_is_refused(settings, monkeypatch):
    import llamafactory.train.dpo.workflow as workflow

    monkeypatch.setattr(workflow, "create_ref_model", lambda *args, **kwargs: None)
    config = {**settings, "stage": "dpo", "do_train": True, "finetuning_type": "full", "report_to": "none"}
    with pytest.raises(ValueError, match="ref_model: expected a model, since DPO needs a reference and Llama"):
        llama_factory.train({**config, "slime_loss": "dpo"})


def test_a_reference_model_that_would_be_loaded_for_nothing_is_refused(settings):
    from llamafactory.train.tuner import run_exp

    llama_factory.enable_loss(Slime())
    config = {**settings, "stage": "dpo", "do_train": True, "finetuning_type": "lora", "report_to": "none"}
    with pytest.raises(ValueError, match="pref_loss: expected 'simpo', since Slime needs no reference model"):
        run_exp({**config, "pref_loss": "sigmoid"})


def test_a_loss_of_single_responses_is_refused():
    with pytest.raises(ValueError, match="loss: expected a loss of pairs, got one of single"):
        llama_factory.enable_loss(SFT())


def test_a_trl_that_computes_its_loss_elsewhere_is_refused(monkeypatch):
    """As from TRL 0.29 on: `compute_loss` no longer asks `get_batch_loss_metrics`, and DPO would be trained."""
    base = PLAIN.__mro__[1]
    monkeypatch.setattr(base, "compute_loss", lambda self, model, inputs: self._compute_loss(model, inputs))
    with pytest.raises(HookError, match=r"expected CustomDPOTrainer\.compute_loss to call get_batch_loss_metrics"):
        llama_factory.enable_loss(Slime())
    assert lf_trainer.CustomDPOTrainer is PLAIN


def test_a_trainer_with_other_arguments_is_refused(monkeypatch):
    class Other(PLAIN):
        def get_batch_loss_metrics(self, batch, model):
            return None

    monkeypatch.setattr(lf_trainer, "CustomDPOTrainer", Other)
    with pytest.raises(
        HookError, match=r"get_batch_loss_metrics\(model, batch, train_eval\), got \(batch, model\)"
    ):
        llama_factory.enable_loss(Slime())
