"""`slime-train` end to end on a tiny model, and what it says about input it cannot use."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from slime_fused.trainer.arguments import parse_arguments
from slime_fused.trainer.cli import main
from tests.tiny_models import make_pairs, tiny_llama


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("cli")
    tiny_llama(len(tokenizer)).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    write_jsonl(path / "pairs.jsonl", make_pairs(12))
    return path


QUICK = ("--use_cpu", "--logging_steps", "1", "--max_steps", "3", "--per_device_train_batch_size", "2")


def metrics(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_a_yaml_file(folder, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {folder / 'model'}\ndataset: {folder / 'pairs.jsonl'}\nlearning_rate: 1e-2\nuse_cpu: true\n"
        "max_steps: 3\nlogging_steps: 1\nper_device_train_batch_size: 2\neval_share: 0.25\neval_strategy: steps\n"
        "eval_steps: 3\nloss: fused\ngradient_checkpointing: false\nlambda_w: 0.2\n"
    )
    out = tmp_path / "out"
    assert main(["--config", str(config), "--output_dir", str(out), "--lambda_w=0.3"]) == 0
    reports = metrics(out)
    assert [row["step"] for row in reports if "loss" in row] == [1, 2, 3]
    assert [row["eval_num_pairs"] for row in reports if "eval_loss" in row] == [3]
    for row in reports[:3]:
        assert row["slime/anchor"] == pytest.approx(-0.3 * row["logps/chosen"], rel=1e-5)  # the option won
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "rewards/margins" in capsys.readouterr().out
    trained = AutoModelForCausalLM.from_pretrained(out)
    start = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"


def test_fused_and_naive_print_the_same_losses(folder, tmp_path):
    base = ["--model", str(folder / "model"), "--dataset", str(folder / "pairs.jsonl"), *QUICK]
    curves = []
    for loss in ("fused", "naive"):
        out = tmp_path / loss
        assert main([*base, "--output_dir", str(out), "--loss", loss]) == 0
        curves.append([row["loss"] for row in metrics(out) if "loss" in row])
    assert len(curves[0]) == 3
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_an_adapter_with_its_own_head_and_a_resumed_run(folder, tmp_path):
    base = ["--model", str(folder / "model"), "--dataset", str(folder / "pairs.jsonl"), *QUICK, "--use_peft"]
    base += ["--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--lora_modules_to_save", "lm_head"]
    base += ["--save_steps", "2", "--learning_rate", "1e-2", "--output_dir", str(tmp_path)]
    assert main(base) == 0
    adapter = tmp_path / "adapter_model.safetensors"
    first, first_metrics = adapter.read_bytes(), metrics(tmp_path)
    adapter.unlink()
    assert main([*base, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")]) == 0
    assert adapter.read_bytes() == first
    again = metrics(tmp_path)
    assert [row["loss"] for row in again if "loss" in row] == [
        row["loss"] for row in first_metrics if "loss" in row
    ]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "adapter",
    [
        ["--lora_target_modules", "q_proj"],
        ["--lora_target_modules", "q_proj", "lm_head"],
        ["--lora_modules_to_save", "lm_head"],
    ],
    ids=["LoRA", "LoRA head", "saved head"],
)
def test_a_merged_model_gives_the_logits_of_model_and_adapter(folder, tmp_path, tokenizer, adapter, tied):
    start = tmp_path / "start"
    tiny_llama(len(tokenizer), tie_word_embeddings=tied).save_pretrained(start)
    tokenizer.save_pretrained(start)
    base = ["--model", str(start), "--dataset", str(folder / "pairs.jsonl"), *QUICK, "--learning_rate", "3e-2"]
    assert main([*base, "--use_peft", *adapter, "--merge_adapter", "--output_dir", str(tmp_path / "out")]) == 0
    prompt = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    untrained = AutoModelForCausalLM.from_pretrained(start)
    with torch.no_grad():
        plain = untrained(prompt).logits
        expected = PeftModel.from_pretrained(untrained, tmp_path / "out")(prompt).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")(prompt).logits
    assert float((expected - plain).abs().max()) > 0.1
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "merged").eos_token == "<eos>"


@pytest.mark.parametrize("adapter", [[], ["--use_peft"]])
def test_the_model_card_names_loss_paper_and_settings(folder, tmp_path, adapter):
    base = ["--model", str(folder / "model"), "--dataset", str(folder / "pairs.jsonl"), *QUICK, *adapter]
    assert main([*base, "--lambda_l", "0.0375", "--learning_rate", "2e-3", "--output_dir", str(tmp_path)]) == 0
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == ("peft" if adapter else "transformers")
    assert {"slime", "preference-training"} <= set(card.data.tags)
    assert card.data.base_model is None  # a folder of this machine
    for text in ("SLIME loss", "2602.02383", "| lambda_l | 0.0375 |", "| learning_rate | 0.002 |", "`model`"):
        assert text in card.text, text
    last = metrics(tmp_path)[-2]
    assert f"| rewards/margins | {last['rewards/margins']:.4f} |" in card.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m", "--dataset", "d", "--merge_adapter"], "there is nothing to merge"),
        (["--model", "m"], "the following arguments are required: --dataset"),
        (["--modell", "m"], "unknown setting --modell; did you mean --model?"),
        (
            ["--model", "m", "--dataset", "d", "--lora_r", "many"],
            "argument --lora_r/--lora-r: invalid int value: 'many'",
        ),
        (["--model", "m", "--dataset", "d", "--truncation", "no"], "argument --truncation: invalid choice: 'no'"),
        (
            ["--model", "m", "--dataset", "d", "--kappa", "-1", "--use_cpu"],
            "kappa: expected a number > 0, got -1.0",
        ),
        (
            ["--model", "m", "--dataset", "d", "--eval_share", "2", "--use_cpu"],
            "eval_share: expected a share in [0, 1)",
        ),
        (["--config"], "--config: expected a YAML file"),
        (["--config", "nowhere.yaml"], "config: no such file: nowhere.yaml"),
        (
            ["--model", "m", "--dataset", "nowhere.jsonl", "--use_cpu"],
            "dataset: no such file or folder: nowhere.jsonl",
        ),
    ],
)
def test_unusable_command_lines(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [unclosed", "is not readable as YAML"),
        ("just text", "expected 'name: value' lines in"),
        ("modle: x", "unknown setting 'modle'"),
        ("model: m\ndataset: d\nlora_r: [1, 2]\n", "belong to no setting: ['2']"),
    ],
)
def test_unusable_yaml(text, message, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["--config", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "pairs.jsonl: expected at least one row, got an empty file"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"\n', "line 2 of"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": "a", "yes": "b"}\n', "line 3 of"),
        ("[1, 2]\n", "line 1 of"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
            '{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": '
            '[{"role": "assistant", "content": "c"}]}\n',
            "holds messages, but the first row holds texts",
        ),
    ],
)
def test_unusable_data_names_the_line(text, message, tmp_path, folder, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    assert main(["--model", str(folder / "model"), "--dataset", str(path), "--use_cpu"]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_model_folder_is_named(folder, capsys):
    assert main(["--model", "./nowhere", "--dataset", str(folder / "pairs.jsonl"), "--use_cpu"]) == 2
    assert "no such folder: nowhere" in capsys.readouterr().err


def test_evaluation_without_pairs_is_refused(folder, capsys):
    base = ["--model", str(folder / "model"), "--dataset", str(folder / "pairs.jsonl"), "--use_cpu"]
    assert main([*base, "--eval_strategy", "steps"]) == 2
    assert "eval_strategy=steps needs --eval_dataset or --eval_share" in capsys.readouterr().err


def test_help_names_every_setting_of_the_loss(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    for name in ("lambda_w", "lambda_l", "lambda_d", "delta", "margin_hard", "margin_soft", "kappa", "power"):
        assert f"--{name} " in text
    with pytest.raises(SystemExit):
        parse_arguments(["--help_all"])
    assert "--weight_decay" in capsys.readouterr().out
