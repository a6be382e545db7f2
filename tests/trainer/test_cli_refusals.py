"""What `slime-train` says of input it cannot use: one line that names the setting, before training."""

from __future__ import annotations

import json

import huggingface_hub.constants
import pytest

from slime_fused.trainer.arguments import parse_arguments
from slime_fused.trainer.cli import main
from tests.tiny_models import make_pairs, tiny_llama

GIVEN = ["--model", "m", "--dataset", "d", "--use_cpu"]
HEAD_DROPOUT = ["--use_peft", "--lora_target_modules", "lm_head", "--disable_dropout", "false"]


def complaint(arguments, capsys) -> str:
    """The one line that ``arguments`` are answered with."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = error.split("slime-train: error: ")[1].splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pad_to_multiple_of", "-8"], "pad_to_multiple_of: expected at least 1, got -8"),
        (["--pad_to_multiple_of", "0"], "pad_to_multiple_of: expected at least 1, got 0"),
        (["--num_train_epochs", "nan"], "num_train_epochs: expected a number > 0, or max_steps, got nan"),
        (["--num_train_epochs", "0"], "num_train_epochs: expected a number > 0, or max_steps, got 0"),
        (["--dataloader_num_workers", "-1"], "dataloader_num_workers: expected at least 0, got -1"),
        (["--logging_steps", "-3"], "logging_steps: expected a number >= 0, got -3.0"),
        (["--fsdp_config", "nothere.json"], "fsdp_config: expected JSON or the path of a JSON file, got 'nothere"),
        (["--use_peft", "--lora_r", "0"], "lora_r: expected at least 1, got 0"),
        ([*HEAD_DROPOUT, "--lora_dropout", "2"], "lora_dropout: expected a number in [0, 1), got 2.0"),
        ([*HEAD_DROPOUT, "--lora_dropout", "0.1"], "lora_dropout: expected 0 with lm_head among lora_target_mod"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "lr_scheduler_type: 'cosine_with_min_lr' with lr_schedul"),
        (["--optim", "galore_adamw"], "optim: 'galore_adamw' cannot be used here: You need to install"),
        (["--load_best_model_at_end"], "--load_best_model_at_end requires the save and eval strategy to match"),
        (["--output_dir", "/proc/x"], "output_dir: cannot write to /proc/x: "),
        (["--output_dir", ""], "--output_dir: expected a name or a path, got an empty text"),
        (["--dataset", ""], "--dataset: expected a name or a path, got an empty text"),
        (["--model="], "--model: expected a name or a path, got an empty text"),
    ],
)  # fmt: skip
def test_settings_that_would_fail_later(arguments, message, capsys):
    assert complaint([*GIVEN, *arguments], capsys).startswith(message)


def test_a_yaml_error_names_its_line(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: m\ndataset: [unclosed\nseed: 1\n")
    message = complaint(["--config", str(tmp_path / "run.yaml")], capsys)
    assert message.startswith(f"config: line 3 of {tmp_path / 'run.yaml'} is not readable as YAML: expected")


@pytest.mark.parametrize("name", ["save_strategy", "eval_strategy", "logging_strategy"])
def test_yaml_reads_no_as_false(name, tmp_path):
    (tmp_path / "run.yaml").write_text(f"{name}: no\n")
    config = parse_arguments([*GIVEN, "--config", str(tmp_path / "run.yaml")]).config
    assert getattr(getattr(config, name), "value", getattr(config, name)) == "no"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("refusals")
    tiny_llama(len(tokenizer)).save_pretrained(path / "model")
    (path / "bare").mkdir()
    (path / "bare" / "config.json").write_text((path / "model" / "config.json").read_text())
    tokenizer.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "torn")
    (path / "torn" / "config.json").write_text((path / "model" / "config.json").read_text())
    (path / "torn" / "model.safetensors").write_bytes(b"1234")
    tokenizer.save_pretrained(path / "t5")
    (path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_pairs(4)))
    (path / "pd.json").write_text('{"data": []}')
    (path / "bad.parquet").write_bytes(b"PAR1 no more")
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothere"], "model: cannot load the tokenizer of 'nothere' (no folder here, so the hub's)"),
        (["--model", "bare"], "model: cannot load the tokenizer of 'bare': "),
        (["--tokenizer", "nothere"], "tokenizer: cannot load 'nothere' (no folder here, so the hub's): OSError: "),
        (["--model", "t5"], "model: cannot load 't5': ValueError: Unrecognized configuration class"),
        (["--model", "torn"], "model: cannot load 'torn': SafetensorError: "),
        (["--model_init_kwargs", '{"foo": 1}'], "model: cannot load 'model' with model_init_kwargs {'foo': 1}: "),
        (["--dataset", "pd.json"], "pd.json: expected a list of rows, got an object with the keys ['data']"),
        (["--dataset", "bad.parquet"], "bad.parquet: not readable as Parquet: "),
        (["--use_peft", "--lora_modules_to_save", "lm_haed"],
         "lora_modules_to_save: expected layers of the model, got 'lm_haed'; did you mean lm_head"),
        (["--use_peft", "--lora_target_modules", "q_proj", "v_prj"],
         "lora_target_modules: expected layers of the model, got 'v_prj'; did you mean v_proj"),
        (["--metric_for_best_model", "nothere", "--save_strategy", "best", "--eval_share", "0.5", "--max_steps",
          "1", "--eval_steps", "1"], "metric_for_best_model: The `metric_for_best_model` training argument is"),
        (["--workspace", "1KiB", "--max_steps", "1"], "workspace: expected at least "),
    ],
)  # fmt: skip
def test_models_and_data_that_cannot_be_used(arguments, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    given = ["--model", "model", "--dataset", "pairs.jsonl", "--use_cpu", "--output_dir", str(tmp_path)]
    assert complaint([*given, *arguments], capsys).startswith(message)


def test_the_whole_traceback_on_demand(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLIME_FUSED_TRACEBACK", "1")
    given = ["--model", str(folder / "torn"), "--dataset", str(folder / "pairs.jsonl"), "--use_cpu"]
    assert main([*given, "--output_dir", str(tmp_path)]) == 2
    assert "SafetensorError" in capsys.readouterr().err.split("Traceback")[1]
