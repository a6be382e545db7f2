"""docs/trainer.md: its commands and Python run, its rows are read, its tables name what exists."""

from __future__ import annotations

import json
import re
import shlex
import types
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from slime_fused.trainer import quick_help
from slime_fused.trainer.arguments import make_parser, parse_arguments
from slime_fused.trainer.cli import main
from slime_fused.trainer.formats import pair_columns
from slime_fused.trainer.loss_choice import LOSSES
from slime_fused.trainer.sft_formats import example_columns
from tests.tiny_models import make_pairs, tiny_llama

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "trainer.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]
LAUNCHED = [line for line in COMMANDS if not line.startswith("slime-train")]


@pytest.fixture(scope="module")
def cwd(tmp_path_factory, tokenizer):
    """A folder in which the paths of the page exist."""
    path = tmp_path_factory.mktemp("page")
    tiny_llama(len(tokenizer)).save_pretrained(path / "path" / "to" / "model")
    tokenizer.save_pretrained(path / "path" / "to" / "model")
    (path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in make_pairs(8)))
    (path / "texts.jsonl").write_text('{"text": "the cat sat on a mat"}\n')
    (yaml,) = blocks("yaml")
    (path / yaml.splitlines()[0].removeprefix("# ")).write_text(yaml)
    return path


def test_commands_one_after_the_other(cwd, monkeypatch, capsys):
    monkeypatch.chdir(cwd)
    commands = [line for line in COMMANDS if line.startswith("slime-train")]
    # The paper's two run in test_recipes.py.
    commands = [line for line in commands if "recipes/paper" not in line]
    assert len(commands) == 8
    quick = ["--use_cpu", "--max_steps", "2", "--logging_steps", "1"]
    for line in commands:
        assert main([*shlex.split(line)[1:], *quick]) == 0, (line, capsys.readouterr().err)
    reports = [json.loads(line) for line in (cwd / "out" / "yaml" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss" in row for row in reports)


def test_launch_commands(cwd, monkeypatch):
    """Starting eight processes is not for a test (`test_launch.py` starts two): both halves are parsed."""
    monkeypatch.chdir(cwd)
    assert len(LAUNCHED) == 3
    for line in LAUNCHED:
        launcher, *arguments = shlex.split(line)
        if launcher == "accelerate":
            assert arguments.pop(0) == "launch"
        parser = launch_command_parser() if launcher == "accelerate" else get_args_parser()
        told = parser.parse_args(arguments)
        assert told.training_script == "slime_fused.trainer"
        assert parse_arguments(told.training_script_args).script.dataset == "pairs.jsonl"


def test_python(cwd, monkeypatch):
    monkeypatch.chdir(cwd)
    scope = {"pairs": make_pairs(4)}
    for block in blocks("python"):
        exec(compile(block, "trainer.md", "exec"), scope)
    assert scope["trainer"].state.global_step > 0


def test_rows():
    pairs, examples = blocks("json")
    assert [len(text.splitlines()) for text in (pairs, examples)] == [4, 4]
    for line in pairs.splitlines():
        pair_columns(json.loads(line), line)
    for line in examples.splitlines():
        example_columns(json.loads(line), line)


def test_settings_exist():
    known = {option for action in make_parser("sft", "slime")._actions for option in action.option_strings}
    own = {loss: {o for a in make_parser("preference", loss)._actions for o in a.option_strings} for loss in LOSSES}
    rows = re.findall(r"^\| `(\w+)` \| (?:yes|no) \| `(.*?)` \|", PAGE, re.MULTILINE)
    assert [loss for loss, _ in rows] == list(LOSSES)
    for loss, settings in rows:
        assert set(settings.split()) <= own[loss], loss
    launchers = (
        "cpu config_file fsdp fsdp_version fsdp_auto_wrap_policy multi_gpu num_processes nproc_per_node use_fsdp"
    )
    foreign = {f"--{name}" for name in launchers.split()}
    foreign |= {"--help", "--help_all", "--config", "--overwrite_output_dir"}
    foreign |= {"--dataset_name", "--dataset_train_split", "--dataset_test_split"}  # TRL's
    named = set(re.findall(r"--[a-z]\w+", PAGE))
    assert named - foreign <= known.union(*own.values())


def test_help_where_sources_cannot_be_read(monkeypatch):
    """It imports `TrainingArguments` then; a release may declare them in another form."""
    expected = quick_help.short_help()
    spec = types.SimpleNamespace(origin="/nowhere/__init__.py")
    monkeypatch.setattr(quick_help.importlib.util, "find_spec", lambda name: spec)
    assert quick_help.short_help() == expected


def test_reported_names(cwd):
    """After the commands: every name of the table that is no pattern is in one of their reports."""
    names = re.findall(r"`([\w/]+)`", PAGE.split("## What is reported")[1].split("An evaluation")[0])
    rows = [json.loads(line) for path in cwd.glob("out/*/metrics.jsonl") for line in path.read_text().splitlines()]
    seen = {name for row in rows for name in row}
    assert len(names) > 15
    assert {name for name in names if "/" in name} - {"cpo/nll"} <= seen
