"""docs/trl.md: its scripts run, with a tiny model and pairs in the place of those that they name."""

from __future__ import annotations

import math
import re
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from trl import DPOTrainer
from trl.trainer import dpo_trainer

import slime_fused as sf
from slime_fused.integrations.trl.hook import LossHook
from tests.integrations.trl_cases import Expected, reports
from tests.tiny_models import make_pairs, tiny_llama

PAGE = Path(__file__).parents[2] / "docs" / "trl.md"
NAME = "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.fixture
def blocks(tokenizer, tmp_path, monkeypatch):
    """The page's blocks, in a folder where the names in them are a tiny model and twelve pairs, for three steps."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(len(tokenizer)).save_pretrained(NAME)
    tokenizer.save_pretrained(NAME)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: Dataset.from_list(make_pairs(12)))
    plain = dpo_trainer.DPOConfig

    def short(output_dir="out", **options):
        fixed = {"max_steps": 3, "logging_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none"}
        fixed |= {"per_device_train_batch_size": 2, "max_grad_norm": 0.0, "save_strategy": "no"}
        return plain(output_dir, **{**fixed, **options})

    monkeypatch.setattr(dpo_trainer, "DPOConfig", short)
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_scripts_of_the_page_train_what_they_say(blocks, monkeypatch):
    runs = []
    train = DPOTrainer.train

    def watched(trainer):
        loss = LossHook.of(trainer)._loss
        runs.append(Expected(trainer, loss))
        return train(trainer)

    monkeypatch.setattr(DPOTrainer, "train", watched)
    names = {}
    for block in blocks:
        exec(compile(block, "trl.md", "exec"), names)
    losses = [sf.SlimeLossConfig(), sf.losses.SimPO(beta=2.0, gamma=0.5), sf.SlimeLossConfig()]
    assert [run.loss for run in runs] == losses
    for run in runs:
        run.check()
        assert run.trainer.ref_model is None
    assert any("lm_head.lora_A" in name for name in runs[-1].steps[0][2])


def test_the_first_script_is_one_line_from_dpo(blocks):
    """Without the line and its import it is plain DPO, whose loss at the first step is log 2."""
    kept = [line for line in blocks[0].splitlines() if "enable_slime" not in line]
    assert len(kept) == len(blocks[0].splitlines()) - 2
    names = {}
    exec(compile("\n".join(kept), "trl.md", "exec"), names)
    assert reports(names["trainer"])[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
