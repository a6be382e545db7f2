"""Everything that README.md shows runs: its Python blocks one after the other, and its command line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl.trainer import dpo_trainer

import slime_fused as sf
from slime_fused.trainer.cli import main
from tests.tiny_models import make_pairs, tiny_llama

README = (Path(__file__).parents[2] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def cwd(tmp_path, tokenizer, monkeypatch):
    """A folder in which the paths of the README exist."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "path" / "to" / "model"
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = "".join(json.dumps(pair) + "\n" for pair in make_pairs(4))
    (tmp_path / "pairs.jsonl").write_text(lines)
    return tmp_path


def test_python_blocks(cwd, capsys, monkeypatch):
    assert len(PYTHON) >= 4
    # TRL's defaults are a GPU's.
    plain = dpo_trainer.DPOConfig
    monkeypatch.setattr(
        dpo_trainer,
        "DPOConfig",
        lambda folder="dpo", **options: plain(folder, bf16=False, use_cpu=True, max_steps=1, **options),
    )
    scope = {"pairs": Dataset.from_list(make_pairs(4))}
    values = []
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), scope)
        if isinstance(scope.get("loss"), torch.Tensor):
            values.append(scope["loss"].item())
    # Plain PyTorch says the same as the call, in float32.
    torch.testing.assert_close(values[0], scope["out"].loss.item(), rtol=1e-5, atol=0)
    assert "plan         stream" in capsys.readouterr().out
    assert scope["trainer"].state.global_step > 0


def test_command_line(cwd):
    lines = [line for block in SHELL for line in block.splitlines() if line.startswith("slime-train")]
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line)[1:]
        assert main(words) == 0
        assert (cwd / words[words.index("--output_dir") + 1] / "metrics.jsonl").exists()


def test_names_of_the_table_exist():
    names = re.findall(
        r"^\| `(.*?)`(?:, `(.*?)`)* \|", README.split("## What is in it")[1].split("##")[0], re.MULTILINE
    )
    assert len(names) >= 7
    cells = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    for cell in cells[: len(names)]:
        for name in re.findall(r"`(\w+)", cell):
            assert hasattr(sf, name), name


def test_links_lead_somewhere():
    root = Path(__file__).parents[2]
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if not t.startswith("http")]
    assert targets
    for target in targets:
        assert (root / target).exists(), target
