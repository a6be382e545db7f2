"""The paper's recipe: its two commands run on a tiny model, and each stage gets its own part of one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from slime_fused.losses import Slime
from slime_fused.trainer.arguments import parse_arguments
from slime_fused.trainer.cli import main
from slime_fused.trainer.run import build_trainer, read_datasets
from tests.tiny_models import make_pairs, tiny_llama

RECIPES = Path(__file__).parents[2] / "recipes" / "paper"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("recipes")
    # Tied, as the models of the paper are: the head that the recipe trains needs weights of its own.
    tiny_llama(len(tokenizer), tie_word_embeddings=True).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_pairs(50)))
    return path


def command(folder, stage, *more):
    model = folder / "model" if stage == "sft" else folder / "sft" / "merged"
    arguments = ["--config", str(RECIPES / f"{stage}.yaml"), "--model", str(model)]
    return [
        *arguments,
        "--dataset",
        str(folder / "pairs.jsonl"),
        "--output_dir",
        str(folder / stage),
        "--use_cpu",
        *more,
    ]


def test_each_stage_gets_its_part(folder):
    parts = [read_datasets(parse_arguments(command(folder, stage)))[0] for stage in ("sft", "slime")]
    assert [len(part) for part in parts] == [17, 33]
    given = [(row["prompt"], row["completion"]) for row in parts[0]]
    given += [(row["prompt"], row["chosen"]) for row in parts[1]]
    assert sorted(given) == sorted((row["prompt"], row["chosen"]) for row in make_pairs(50))


@pytest.mark.parametrize("stage", ["sft", "slime"])
def test_the_settings_are_the_papers(folder, stage):
    settings = parse_arguments(command(folder, stage))
    config = settings.config
    assert (config.learning_rate, config.num_train_epochs, config.bf16) == (1e-4, 3, True)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (1, 2)
    assert settings.loss == (None if stage == "sft" else Slime())


def test_both_commands_one_after_the_other(folder):
    for stage in ("sft", "slime"):
        assert (
            main(command(folder, stage, "--max_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-2")) == 0
        )
    start, sft, slime = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (folder / "model", folder / "sft" / "merged", folder / "slime" / "merged")
    )
    for before, after in ((start, sft), (sft, slime)):
        for name in (
            "lm_head.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.1.mlp.up_proj.weight",
        ):
            assert not torch.equal(before[name], after[name]), name
        assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_adapter_dropout_is_on_and_the_head_is_fused(folder):
    """The head is trained whole, so that no adapter's dropout stands before it; elsewhere it acts."""
    settings = parse_arguments(command(folder, "sft", "--bf16", "false", "--gradient_checkpointing", "false"))
    trainer = build_trainer(settings)
    modules = dict(trainer.model.named_modules())
    rates = {name: m.p for name, m in modules.items() if isinstance(m, torch.nn.Dropout) and "lora" in name}
    assert len(rates) == 14
    assert set(rates.values()) == {0.05}
    batch = trainer.data_collator([trainer.train_dataset[0]])
    for parameter in trainer.model.parameters():
        parameter.data.add_(0.05)  # an adapter as it begins adds nothing, and so has nothing to drop
    trainer.model.train()
    losses = {float(trainer.compute_loss(trainer.model, dict(batch))) for _ in range(3)}
    assert len(losses) == 3
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    trained = [name for name, p in trainer.model.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("lm_head.modules_to_save" in name for name in trained)
