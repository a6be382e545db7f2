"""ms-swift with this package's losses: its own pipeline and trainer on a tiny model, step by step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from swift.cli.main import parse_yaml_args
from swift.pipelines import rlhf_main
from swift.pipelines.train.rlhf import SwiftRLHF
from swift.rlhf_trainers import dpo_trainer

import slime_fused.integrations.swift as integration
from slime_fused.integrations.hooks import HookError
from slime_fused.losses import DPO, SimPO, Slime
from tests.frameworks.support import plain_loss, save_model, save_pairs, watch_dropout, watch_steps

ROOT = Path(__file__).parents[2]
PLAIN = dpo_trainer.DPOTrainer


@pytest.fixture(autouse=True)
def plain_classes(monkeypatch):
    """Every test begins with ms-swift's own classes, and none asks the hub for news of its model."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).endswith("ms_swift_plugin.py"):
            del sys.modules[name]  # imported again, it enables its loss again
    import swift.rlhf_trainers
    import swift.trainers.mixin

    monkeypatch.setattr(swift.trainers.mixin, "check_local_model_is_latest", lambda *args, **kwargs: None)
    monkeypatch.setattr(dpo_trainer, "DPOTrainer", PLAIN)
    monkeypatch.setattr(swift.rlhf_trainers, "DPOTrainer", PLAIN, raising=False)
    monkeypatch.setattr(SwiftRLHF, "_prepare_model_tokenizer", SwiftRLHF._prepare_model_tokenizer)


@pytest.fixture
def settings(tmp_path):
    """What a tiny model on a CPU needs in place of the recipe's entries."""

    def row(pair):
        messages = [
            {"role": "user", "content": pair["prompt"]},
            {"role": "assistant", "content": pair["chosen"]},
        ]
        return {"messages": messages, "rejected_response": pair["rejected"]}

    return {
        "rlhf_type": "dpo",
        "model": str(save_model(tmp_path / "model")),
        "model_type": "llama",
        "template": "default",
        "dataset": str(save_pairs(tmp_path / "pairs.jsonl", 8, row)),
        "load_from_cache_file": False,
        "use_hf": True,
        "torch_dtype": "float32",
        "use_cpu": True,
        "output_dir": str(tmp_path / "out"),
        "add_version": False,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
    }


def arguments(settings) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def history(settings) -> list[dict[str, float]]:
    lines = (Path(settings["output_dir"]) / "logging.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def expected_of(loss, ref_models: list):
    """The loss of a batch by the reference; the list gets the trainer's reference models."""

    def expected(trainer, batch):
        batch.pop("use_cache", None)
        ref_models.append(trainer.ref_model)
        other = None
        if isinstance(loss, DPO):
            other = Reference(trainer)
        return plain_loss(trainer.model, batch, loss, other)

    return expected


class Reference:
    """A context manager that gives the model to compare with."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self.context = trainer.null_ref_context()

    def __enter__(self):
        self.context.__enter__()
        return self.trainer.ref_model or self.trainer.model

    def __exit__(self, *error):
        return self.context.__exit__(*error)


def run_recipe(folder: Path, entries) -> None:
    """The recipe with these entries in place of its own."""
    recipe = yaml.safe_load((ROOT / "recipes" / "ms_swift.yaml").read_text())
    changed = folder / "recipe.yaml"
    changed.write_text(yaml.safe_dump({**recipe, **entries}))
    argv = [str(changed)]
    parse_yaml_args(argv)
    rlhf_main(argv)


def test_the_recipe_trains_slime_and_every_step_is_that_of_the_reference(settings, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    losses = watch_steps(monkeypatch, expected_of(Slime(), ref_models := []))
    run_recipe(tmp_path, {**settings, "lora_dropout": 0.0})  # the reference would drop others
    assert ref_models == [None] * 3
    logged = history(settings)
    assert len(losses) == len(logged) == 3
    for loss, entry in zip(losses, logged, strict=True):
        assert entry["loss"] == pytest.approx(loss, rel=1e-5)
        parts = sum(entry[f"slime/{name}"] for name in ("anchor", "margin", "stabilizer"))
        assert parts == pytest.approx(loss, rel=1e-5)
        assert entry["rewards/margins"] == pytest.approx(
            entry["mean_logps/chosen"] - entry["mean_logps/rejected"], abs=1e-6
        )
    assert losses[-1] < losses[0]


def test_the_recipes_dropout_acts(settings, monkeypatch, tmp_path):
    """ms-swift's own trainer sets it to 0, by a default of TRL's that its command line cannot change."""
    monkeypatch.chdir(ROOT)
    seen = watch_dropout(monkeypatch)
    run_recipe(tmp_path, {**settings, "max_steps": 1})
    assert seen == [{0.05}]


@pytest.mark.parametrize("tuner_type", ["lora", "full"])
@pytest.mark.parametrize("loss", [DPO(beta=0.2), SimPO(beta=2.0, gamma=0.3)], ids=["dpo", "simpo"])
def test_other_losses_with_and_without_a_reference(settings, monkeypatch, loss, tuner_type):
    integration.enable_loss(loss)
    losses = watch_steps(monkeypatch, expected_of(loss, ref_models := []))
    rlhf_main(arguments({**settings, "tuner_type": tuner_type, "lora_dropout": 0.0}))
    has_reference_model = isinstance(loss, DPO) and tuner_type == "full"
    assert [model is not None for model in ref_models] == [has_reference_model] * 3
    if isinstance(loss, DPO):
        assert losses[0] == pytest.approx(0.693147, abs=1e-5)
        assert losses[-1] != pytest.approx(losses[0], abs=1e-3)


def test_dpo_equals_swifts_own(settings):
    """Its own DPO from materialised logits, on the same batches from the same weights."""
    settings["tuner_type"] = "full"
    rlhf_main(arguments({**settings, "beta": 0.2}))
    own = history(settings)
    integration.enable_loss(DPO(beta=0.2))
    settings["output_dir"] += "2"
    rlhf_main(arguments(settings))
    fused = history(settings)
    assert len(own) == len(fused) == 3
    names = ("loss", "grad_norm", "rewards/accuracies", "rewards/margins", "rewards/chosen")
    names += ("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected")
    for theirs, ours in zip(own, fused, strict=True):
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def test_evaluation(settings):
    integration.enable_loss(Slime())
    extra = {"split_dataset_ratio": 0.25, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    rlhf_main(arguments({**settings, **extra, "tuner_type": "lora"}))
    lines = (Path(settings["output_dir"]) / "logging.jsonl").read_text().splitlines()
    (entry,) = [entry for entry in map(json.loads, lines) if "eval_loss" in entry]
    parts = sum(entry[f"eval_slime/{name}"] for name in ("anchor", "margin", "stabilizer"))
    assert entry["eval_loss"] == pytest.approx(parts, rel=1e-4)


@pytest.mark.parametrize("loss", [Slime(), DPO(beta=0.2)], ids=["slime", "dpo"])
@pytest.mark.parametrize("scaled", [False, True])
def test_padding_free_batches_equal_padded_ones(settings, loss, scaled):
    """One row of sequences, told apart by their positions. ms-swift wants flash-attention for this, which needs a
    GPU; here `transformers` makes the mask that keeps them apart.
    """
    integration.enable_loss(loss)
    trainer = make_trainer({**settings, "tuner_type": "lora", "lora_dropout": 0.0, "max_steps": 1})
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    padded = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    padded = {name: padded[name] for name in ("input_ids", "attention_mask", "labels")}
    want, metrics = trainer.get_batch_loss_metrics(trainer.model, padded)
    want_gradients = gradients_of(trainer.model, want)

    is_token = padded["attention_mask"].bool()
    packed = {name: padded[name][is_token][None] for name in ("input_ids", "labels")}
    lengths = is_token.sum(1).tolist()
    packed["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    trainer.template.padding_free = True
    scale = torch.tensor(0.7) if scaled else None
    loss_value, packed_metrics = trainer.get_batch_loss_metrics(trainer.model, packed, "train", scale)
    factor = 3 * 0.7 if scaled else 1.0  # the pairs times the scale: a sum over pairs in place of a mean
    torch.testing.assert_close(loss_value, want * factor, rtol=1e-5, atol=1e-6)
    got = gradients_of(trainer.model, loss_value)
    for name, gradient in want_gradients.items():
        floor = 1e-5 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(got[name], gradient * factor, rtol=1e-3, atol=floor, msg=name)
    assert packed_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)


def gradients_of(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def make_trainer(settings):
    """The trainer that the pipeline makes, before it trains."""
    seen = []

    class Pipeline(SwiftRLHF):
        def train(self, trainer):
            seen.append(trainer)
            return {}

    Pipeline(arguments(settings)).main()
    return seen[0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"rpo_alpha": 0.5}, "rpo_alpha: expected None, got 0.5: Slime would ignore it"),
        ({"beta": 0.3}, r"beta: expected 0\.1, got 0\.3: Slime would ignore it; leave it out"),
        ({"loss_type": "ipo"}, "loss_type: expected 'sigmoid', got 'ipo': Slime would ignore it"),
        ({"rlhf_type": "orpo"}, "rlhf_type: expected 'dpo', whose trainer Slime takes over, got 'orpo'"),
    ],
)
def test_refusals(settings, entries, message):
    integration.enable_loss(Slime())
    with pytest.raises(ValueError, match=message):
        rlhf_main(arguments({**settings, "tuner_type": "lora", **entries}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("f_divergence_type", "js_divergence"), ("reference_free", True), ("loss_type", ["ipo"])],
)
def test_arguments_that_only_python_can_set_are_refused(settings, monkeypatch, name, value):
    integration.enable_loss(Slime())
    fused = dpo_trainer.DPOTrainer
    plain_init = fused.__init__

    def init(self, *args, **kwargs):
        setattr(kwargs["args"], name, value)
        plain_init(self, *args, **kwargs)

    monkeypatch.setattr(fused, "__init__", init)
    with pytest.raises(ValueError, match=f"{name}: expected .*, got .*: Slime would ignore it"):
        make_trainer({**settings, "tuner_type": "lora"})


def test_means_over_tokens_are_refused_where_a_step_has_several_batches(settings):
    integration.enable_loss(Slime(stabilizer_reduction="token"))
    with pytest.raises(ValueError, match="stabilizer_reduction: expected 'sequence', got 'token'"):
        make_trainer({**settings, "tuner_type": "lora", "gradient_accumulation_steps": 2})


def test_a_policy_that_would_be_its_own_reference_is_refused(settings, monkeypatch):
    integration.enable_loss(DPO())
    monkeypatch.setattr(SwiftRLHF, "_get_trainer_kwargs", lambda self: {})
    with pytest.raises(ValueError, match="ref_model: expected a model, since DPO needs a reference and Llama"):
        make_trainer({**settings, "tuner_type": "full"})


def test_a_trainer_that_computes_its_loss_elsewhere_is_refused(monkeypatch):
    """As TRL's own does from 0.29 on: `compute_loss` asks `_compute_loss`, and DPO would be trained."""
    monkeypatch.setattr(PLAIN, "compute_loss", lambda self, model, inputs: self._compute_loss(model, inputs))
    with pytest.raises(HookError, match=r"expected DPOTrainer\.compute_loss to call get_batch_loss_metrics"):
        integration.enable_loss(Slime())
    assert dpo_trainer.DPOTrainer is PLAIN
