"""Axolotl with the plugin: its own command line on a tiny model, step by step, and its own validation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_cli
from axolotl.integrations.base import PluginManager

import slime_fused.integrations.axolotl as plugin
from slime_fused.losses import SimPO, Slime
from tests.frameworks.support import plain_loss, save_model, save_pairs, watch_steps

RECIPE = Path(__file__).parents[2] / "recipes" / "axolotl.yaml"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A configuration file: the recipe, with what a tiny model on a CPU needs in place of its entries."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(PluginManager, "_instance", None)

    def row(pair):
        message = {side: {"role": "assistant", "content": pair[side]} for side in ("chosen", "rejected")}
        return {"messages": [{"role": "user", "content": pair["prompt"]}], **message}

    pairs = save_pairs(tmp_path / "pairs.jsonl", 8, row)
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["datasets"][0]["path"] = str(pairs)
    recipe |= {
        "base_model": str(save_model(tmp_path / "model")),
        "output_dir": str(tmp_path / "out"),
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "dataset_num_proc": 1,
        "bf16": False,
        "lora_dropout": 0.0,
        "micro_batch_size": 3,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "sequence_len": 128,
        "save_strategy": "no",
        "save_total_limit": 1,
    }

    def write(**entries) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(recipe | entries))
        return str(path)

    return write


def test_the_recipe_trains_slime_and_every_step_is_that_of_the_reference(write, monkeypatch, tmp_path):
    reported = []

    def expected(trainer, batch):
        if not reported:
            monkeypatch.setattr(trainer, "log", recorder(trainer.log, reported))
        assert trainer.ref_model is None
        mask = batch.pop("completion_mask")
        batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
        return plain_loss(trainer.model, batch, Slime())

    losses = watch_steps(monkeypatch, expected)
    do_cli(write())
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    steps = [entry for entry in reported if "loss" in entry]
    assert [entry["loss"] for entry in steps] == pytest.approx(losses, rel=1e-4)
    assert all("slime/anchor" in entry for entry in steps)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["lm_head"]


def recorder(log, entries):
    def record(logs, *args, **kwargs):
        entries.append(logs)
        return log(logs, *args, **kwargs)

    return record


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"slime_lamda_w": 1.0}, "did you mean slime_lambda_w"),
        ({"slime_loss": "grpo"}, "slime_loss: expected one of slime, dpo"),
        ({"slime_lambda_w": -1.0}, "slime_lambda_w: expected"),
        ({"rl": "orpo"}, "rl: expected 'dpo'"),
        ({"trainer_cls": "trl.DPOTrainer"}, "trainer_cls: expected none"),
    ],
)
def test_a_wrong_entry_stops_axolotl_before_it_loads_anything(write, entries, message):
    with pytest.raises(ValueError, match=message):
        load_cfg(write(**entries))


def test_entries_reach_the_loss(write, monkeypatch):
    given = []
    monkeypatch.setattr(plugin, "enable_loss", lambda trainer, loss, **where: given.append((trainer, loss, where)))
    others = dict.fromkeys(("slime_lambda_w", "slime_lambda_l", "slime_delta"))
    config = load_cfg(write(slime_loss="simpo", slime_gamma=0.25, slime_workspace="64MiB", **others))
    plugin.SlimePlugin().post_trainer_create(config, "trainer")
    assert given == [("trainer", SimPO(gamma=0.25), {"backend": "auto", "workspace": "64MiB"})]
