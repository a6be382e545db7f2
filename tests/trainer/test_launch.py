"""`slime-train` under `accelerate launch`: two processes take the step of one, and evaluate the same rows."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from slime_fused.trainer.cli import main
from tests.processes import run_processes
from tests.tiny_models import tiny_llama


@pytest.mark.slow
def test_two_processes_step_as_one(tmp_path, tokenizer):
    """A step on 8 rows of unequal length, and 5 to evaluate: the sampler repeats one, which must not count."""
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": "the", "completion": " cat" * n} for n in (1, 9, 2, 14, 3, 5, 1, 7)]
    for name, count in (("train", 8), ("eval", 5)):
        lines = "".join(json.dumps(row) + "\n" for row in rows[:count])
        (tmp_path / f"{name}.jsonl").write_text(lines)
    arguments = ["--stage", "sft", "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "train.jsonl")]
    arguments += ["--eval_dataset", str(tmp_path / "eval.jsonl"), "--max_steps", "1", "--logging_steps", "1"]
    # Plain descent at rate 1: what the weights move by is the gradient.
    arguments += ["--optim", "sgd", "--learning_rate", "1", "--max_grad_norm", "0", "--use_cpu"]
    one = ["--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "5"]
    assert main([*arguments, *one, "--output_dir", str(tmp_path / "one")]) == 0
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "-m",
        "slime_fused.trainer",
    ]
    two = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--ddp_backend", "gloo"]
    two += ["--per_device_eval_batch_size", "1", "--output_dir", str(tmp_path / "two")]
    run_processes([*launch, *arguments, *two], 1, tmp_path)

    start, got, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "two", "one"))
    for name, value in expected.items():
        moved = (value - start[name]).abs().max().item()
        assert moved > 0, name
        assert (got[name] - value).abs().max().item() < 1e-4 * moved, name
    reports = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    ]
    names = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "num_completion_tokens", "num_rows")
    for prefix, step in (("", 0), ("eval_", 1)):
        for name in names:
            assert reports[0][step][prefix + name] == pytest.approx(reports[1][step][prefix + name], rel=1e-4), name
    assert reports[0][1]["eval_num_rows"] == 5
