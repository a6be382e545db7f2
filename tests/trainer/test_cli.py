"""`slime-train` end to end on a tiny model, and what it says about input it cannot use."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import typing

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.integrations import integration_utils

from slime_fused import losses
from slime_fused.trainer import quick_help
from slime_fused.trainer.arguments import ScriptArguments, kinds_of, make_parser, parse_arguments
from slime_fused.trainer.cli import main
from slime_fused.trainer.loss_choice import LOSSES
from tests.test_import import run_python
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
        "eval_steps: 3\nloss_impl: fused\ngradient_checkpointing: false\nlambda_w: 0.2\n"
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
    for impl in ("fused", "naive"):
        out = tmp_path / impl
        assert main([*base, "--output_dir", str(out), "--loss_impl", impl]) == 0
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


GIVEN = ("--model", "m", "--dataset", "d", "--use_cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m"], "the following arguments are required: --dataset"),
        (["--modell", "m"], "unknown setting --modell; did you mean --model?"),
        (["--lr", "1"], "unknown setting --lr; did you mean --learning_rate?"),
        (["m"], "expected --setting value, got 'm' before any setting"),
        (["--config"], "--config: expected a YAML file, got nothing"),
        (["--config", "nowhere.yaml"], "config: no such file: nowhere.yaml"),
        (["--model", "m", "--dataset", "no.jsonl", "--use_cpu"], "dataset: no such file or folder: no.jsonl"),
        (["--model", "./m", "--dataset", "d", "--use_cpu"], "model: no such folder: m"),
        (["--model", "m.gguf", "--dataset", "d", "--use_cpu"], "model: no such file: m.gguf"),
        ([*GIVEN, "--tokenizer", "/nowhere"], "tokenizer: no such folder: /nowhere"),
        ([*GIVEN, "--eval_strategy", "steps"], "eval_strategy=steps needs --eval_dataset or --eval_share"),
        ([*GIVEN, "--lora_r", "many"], "--lora_r: expected --use_peft with it; without"),
        ([*GIVEN, "--use_peft", "false", "--lora-alpha", "8"], "--lora_alpha: expected --use_peft with it"),
        ([*GIVEN, "--merge_adapter"], "there is nothing to merge"),
        ([*GIVEN, "--use_peft", "TRUE", "--lora_r", "many"], "--lora_r/--lora-r: invalid int value: 'many'"),
        ([*GIVEN, "--use_peft", "--lora_dropout", "0.1"], "lora_dropout: 0.1 has no effect while disable_dropout"),
        ([*GIVEN, "--model_init_kwargs", '{"dtype": "auto"}'], "model_init_kwargs: expected no 'dtype', which"),
        ([*GIVEN, "--truncation", "no"], "argument --truncation: invalid choice: 'no'"),
        ([*GIVEN, "--kappa", "-1"], "kappa: expected a number > 0, got -1.0"),
        ([*GIVEN, "--eval_share", "2"], "eval_share: expected a share in [0, 1)"),
        ([*GIVEN, "--eval_share", "0.1", "--eval_dataset", "e"], "--eval_share: has no effect beside --eval_"),
        ([*GIVEN, "--eval_dataset_split", "dev"], "--eval_dataset_split: expected --eval_dataset with it"),
        ([*GIVEN, "--slice_seed", "1"], "--slice_seed: expected --dataset_slice with it"),
        ([*GIVEN, "--backend", "foo"], "backend: expected 'auto' or one of ('cuda', "),
        ([*GIVEN, "--backend", "cuda"], "backend: 'cuda' cannot run on cpu with torch.float32"),
        ([*GIVEN, "--backend", "triton"], "backend: 'triton' cannot run on cpu with torch.float32"),
        ([*GIVEN, "--workspace", "much"], "workspace: expected 'auto', bytes, or a string such as '512"),
        ([*GIVEN, "--workspace", "0"], "workspace: expected a positive number of bytes, got 0"),
        ([*GIVEN, "--learning_rate", "-1"], "learning_rate: expected a finite number >= 0, got -1.0"),
        ([*GIVEN, "--adam_beta2", "1"], "adam_beta2: expected a number in [0, 1), got 1.0"),
        ([*GIVEN, "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps: expected at least 1, got 0"),
        ([*GIVEN, "--report_to", "wonder"], "report_to: expected 'none' or some of ["),
        ([*GIVEN, "--resume_from_checkpoint", "no/where"], "expected a checkpoint, got no/where: no such folder"),
        ([*GIVEN, "--resume_from_checkpoint", "true", "--output_dir", "nowhere"], "nowhere holds no checkpoint"),
        ([*GIVEN, "--loss", "naive"], "'kto'); --loss_impl naive is how it is computed"),
        ([*GIVEN, "--loss", "ppo"], "'kto'), got ppo"),
        ([*GIVEN, "--gamma", "1"], "--gamma: a hyperparameter of --loss simpo, alphapo; this run's is slime"),
        ([*GIVEN, "--loss", "simpo", "--kappa", "1"], "--kappa: a hyperparameter of --loss slime; this run's is"),
        ([*GIVEN, "--loss", "dpo", "--beta", "-1"], "beta: expected a number > 0, got -1.0"),
        ([*GIVEN, "--loss", "kto", "--baseline", "given"], "loss: KTO(baseline='given') expected a kl_baseline"),
        ([*GIVEN, "--z_loss", "1"], "--z_loss: a setting of --stage sft; this run's is preference"),
        ([*GIVEN, "--stage", "sft", "--beta", "1"], "which --stage sft does not take"),
        ([*GIVEN, "--stage", "sft", "--loss", "dpo"], "--loss: a setting of --stage preference"),
        ([*GIVEN, "--stage", "sft", "--z_loss", "-1"], "z_loss: expected a finite number >= 0, got -1.0"),
        ([*GIVEN, "--stage", "rlhf"], "stage: expected one of ('preference', 'sft'), got rlhf"),
    ],
)  # fmt: skip
def test_unusable_command_lines(arguments, message, capsys):
    """Each is one line, before a model ("m") or a dataset ("d") is looked for."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("slime-train: error: ")
    assert message in error


def test_a_reporting_library_that_is_missing_is_named_first(monkeypatch, capsys):
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["wandb"])
    assert main([*GIVEN, "--report_to", "wandb", "tensorboard"]) == 2
    assert "report_to: 'tensorboard' needs its library, which is not installed here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [unclosed", "is not readable as YAML"),
        ("just text", "expected 'name: value' lines in"),
        ("modle: x", "config: unknown setting 'modle' in"),
        ("model: m\ndataset: d\nsave_steps: [1, 2]\n", "belong to no setting: ['2']"),
        ("model: m\nseed: 1\n\nmodel: n\n", "config: line 4 of"),
        ("model: m\nmodel_init_kwargs:\n  a: 1\n  a: 2\n", "config: line 4 of"),
        ("model: m\ndataset: d\nlora_r: 8\n", "'lora_r' in"),
        ("model: m\ndataset: d\nloss: dpo\ngamma: 1\n", "a hyperparameter of --loss simpo, alphapo; this"),
    ],
)  # fmt: skip
def test_unusable_yaml(text, message, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["--config", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--bf16", "--gradient_checkpointing", "--disable_dropout", "--use_peft"])
def test_a_flag_alone_means_true(flag, monkeypatch):
    # Releases of transformers before 5 leave the precision there, for whatever trains next.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    settings = parse_arguments([*GIVEN, flag, "--seed", "1"])
    name = flag.lstrip("-")
    owner = settings.script if name == "use_peft" else settings.config
    assert getattr(owner, name) is True
    assert settings.config.seed == 1


@pytest.mark.parametrize("text", ["none", "None"])
def test_a_limit_can_be_taken_away(text, tmp_path):
    assert parse_arguments([*GIVEN, "--max_length", text]).config.max_length is None
    (tmp_path / "run.yaml").write_text(f"max_length: {text}\nseed: null\n")
    config = parse_arguments([*GIVEN, "--config", str(tmp_path / "run.yaml")]).config
    assert (config.max_length, config.seed) == (None, 42)


def test_a_yaml_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\ndataset: d\nseed: 7\n", encoding="utf-8-sig")
    settings = parse_arguments(["--config", str(tmp_path / "run.yaml")])
    assert (settings.script.model, settings.config.seed) == ("m", 7)


@pytest.mark.parametrize(
    ("arguments", "strategy"),
    [
        ([], "no"),
        (["--eval_share", "0.2"], "epoch"),
        (["--eval_dataset", "e"], "epoch"),
        (["--eval_share", "0.2", "--eval_steps", "5"], "steps"),
        (["--eval_share", "0.2", "--eval_strategy", "no"], "no"),
    ],
)
def test_rows_to_evaluate_on_are_evaluated_on(arguments, strategy):
    assert parse_arguments([*GIVEN, *arguments]).config.eval_strategy == strategy


@pytest.mark.parametrize(
    ("arguments", "loss"),
    [
        (["--lambda_w", "0.3"], losses.Slime(lambda_w=0.3)),
        (["--loss", "dpo", "--beta", "0.2", "--loss_type", "robust", "--label_smoothing", "0.1"],
         losses.DPO(beta=0.2, loss_type="robust", label_smoothing=0.1)),
        (["--loss", "dpo", "--ld_alpha", "0.5", "--length_normalised", "--nll_weight", "1"],
         losses.DPO(ld_alpha=0.5, length_normalised=True, nll_weight=1.0)),
        (["--loss", "simpo", "--beta", "2.5", "--gamma", "1.4"], losses.SimPO(beta=2.5, gamma=1.4)),
        (["--loss", "orpo", "--beta", "0.3"], losses.ORPO(beta=0.3)),
        (["--loss", "cpo", "--loss_type", "ipo", "--nll_weight", "0"], losses.CPO(loss_type="ipo", nll_weight=0.0)),
        (["--loss", "alphapo", "--alpha", "0.1"], losses.AlphaPO(alpha=0.1)),
        (["--loss", "kto", "--desirable_weight", "2"],
         losses.KTO(desirable_weight=2.0, baseline="batch")),
        (["--loss", "kto"], losses.KTO(baseline="batch")),
        (["--stage", "sft"], None),
    ],
)  # fmt: skip
def test_each_loss_takes_its_hyperparameters(arguments, loss):
    assert parse_arguments([*GIVEN, *arguments]).loss == loss


def test_every_hyperparameter_of_every_loss_is_a_setting_with_help():
    assert set(LOSSES) == set(typing.get_args(typing.get_type_hints(ScriptArguments)["loss"]))
    for loss, cls in LOSSES.items():
        actions = {action.dest: action for action in make_parser("preference", loss)._actions}
        for field in dataclasses.fields(cls):
            default = "batch" if field.name == "baseline" else field.default
            assert actions[field.name].help, (loss, field.name)
            assert actions[field.name].default == default, (loss, field.name)


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


@pytest.mark.parametrize("arguments", [[], ["--loss", "dpo"], ["--loss", "kto"], ["--stage", "sft"]])
def test_help_says_what_the_parser_says(arguments, capsys):
    """It reads sources in place of importing them: names, defaults and texts must be those of the classes."""
    assert main(["--help", *arguments]) == 0
    text = capsys.readouterr().out
    assert "--config" in text
    stage = "sft" if "sft" in arguments else "preference"
    loss = arguments[1] if "--loss" in arguments else "slime"
    kinds = kinds_of(stage, loss)
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for kind in kinds for field in dataclasses.fields(kind)} - inherited
    actions = {action.dest: action for action in reversed(make_parser(stage, loss)._actions)}
    for name in (own - {"ld_alpha"}) | set(quick_help._COMMON):
        action = actions[name]
        default = "required" if action.required else f"default: {getattr(action.default, 'value', action.default)}"
        expected = " ".join(f"{action.help or ''}".replace("%%", "%").split()) + f" ({default})"
        lines = re.search(rf"^  --{name} +(.*(?:\n {{30,}}.*)*)", text, re.MULTILINE)
        assert lines, name
        assert " ".join(lines[1].split()) == expected


def test_help_loads_none_of_the_libraries():
    report = run_python("""
        import json, sys
        from slime_fused.trainer.cli import main
        main(["--help"])
        print(json.dumps(sorted({"transformers", "datasets", "peft", "accelerate"} & set(sys.modules))))
    """)
    assert report == []


def test_all_of_the_help(capsys):
    assert main(["--help_all", "--loss", "dpo"]) == 0
    text = capsys.readouterr().out
    assert "--weight_decay" in text
    assert "--dpop" in text
    assert "--ld_alpha" not in text  # which the trainer refuses


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_other_losses_train_and_are_named(folder, tmp_path, loss):
    base = ["--model", str(folder / "model"), "--dataset", str(folder / "pairs.jsonl"), *QUICK, "--use_peft"]
    assert (
        main([*base, "--loss", loss, "--beta", "0.3", "--eval_share", "0.25", "--output_dir", str(tmp_path)]) == 0
    )
    reports = metrics(tmp_path)
    # Before the first step policy and reference are one.
    assert reports[0]["loss"] == pytest.approx(math.log(2) if loss == "dpo" else 0.5, abs=1e-4)
    assert [row["eval_num_pairs"] for row in reports if "eval_loss" in row] == [3]
    card = ModelCard.load(tmp_path / "README.md").text
    assert f"{loss.upper()} loss" in card
    assert "| beta | 0.3 |" in card
    assert (tmp_path / "training.png").exists()


def test_an_earlier_run_in_the_same_folder_is_refused_by_name(folder, tmp_path, capsys):
    base = ["--model", str(folder / "model"), "--dataset", str(folder / "pairs.jsonl"), *QUICK]
    base += ["--output_dir", str(tmp_path), "--save_steps", "2", "--save_total_limit", "1"]
    assert main(base) == 0
    (tmp_path / "checkpoint-9").mkdir()
    assert main(base) == 2
    error = capsys.readouterr().err
    for part in ("holds checkpoint-9 of", "--resume_from_checkpoint true", "--overwrite_output_dir"):
        assert part in error
    assert main([*base, "--overwrite_output_dir"]) == 0
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3"]
    assert main([*base, "--resume_from_checkpoint", "true", "--overwrite_output_dir"]) == 2
    assert "overwrite_checkpoints: would delete" in capsys.readouterr().err
    assert main([*base, "--resume_from_checkpoint", "true"]) == 0


def test_a_model_is_merged_where_nothing_can_be_drawn(folder, tmp_path, capsys, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    base = ["--model", str(folder / "model"), "--dataset", str(folder / "pairs.jsonl"), *QUICK]
    assert main([*base, "--use_peft", "--merge_adapter", "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "merged" / "config.json").exists()
    assert not (tmp_path / "training.png").exists()
    captured = capsys.readouterr()
    assert "slime-train: no training.png:" in captured.err
    assert "training.png" not in captured.out
