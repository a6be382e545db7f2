"""Whole runs: accumulation, metrics, evaluation, resuming, saving."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerState

from slime_fused.trainer import SlimeConfig, SlimeTrainer
from slime_fused.trainer.callbacks import MetricsFile
from tests.tiny_models import GradientRecorder, make_pairs, slime_by_hand, tiny_llama


def run(tokenizer, args, *, rows=None, eval_rows=None, model=None, resume=None):
    recorder = GradientRecorder()
    trainer = SlimeTrainer(
        tiny_llama(len(tokenizer)) if model is None else model,
        args,
        train_dataset=make_pairs(16) if rows is None else rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("loss_impl", ["fused", "naive"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(tokenizer, make_args, reduction, loss_impl):
    """Four pairs at once, 2 x 2, and 4 x 1; the last step of the epoch has only two pairs."""
    settings = {"stabilizer_reduction": reduction, "loss_impl": loss_impl, "max_grad_norm": 0.0}
    settings |= {"max_steps": -1, "num_train_epochs": 1}
    rows = make_pairs(6)
    runs = [
        run(
            tokenizer,
            make_args(per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, **settings),
            rows=rows,
        )
        for size in (4, 2, 1)
    ]
    reference_trainer, reference = runs[0]
    assert len(reference.steps) == 2
    for trainer, recorder in runs[1:]:
        assert losses(trainer) == pytest.approx(losses(reference_trainer), rel=1e-5)
        for step, expected in zip(recorder.steps, reference.steps, strict=True):
            for name, grad in expected.items():
                floor = 2e-5 * float(grad.abs().max())
                torch.testing.assert_close(
                    step[name], grad, rtol=2e-3, atol=floor, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_reported_numbers_against_the_definition(tokenizer, make_args):
    args = make_args(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, margin_hard=0.1)
    args.learning_rate = 0.0
    rows = make_pairs(4)
    trainer, _ = run(tokenizer, args, rows=rows)
    report = trainer.state.log_history[0]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.eval()
    with torch.no_grad():
        expected = float(slime_by_hand(trainer.model, batch, args.loss_config()))
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert report["loss"] == pytest.approx(expected, rel=1e-5)
    logps = torch.log_softmax(logits[:, :-1].double(), -1)
    targets = batch["labels"][:, 1:]
    mask = targets != -100
    logps = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~mask, 0)
    means = logps.sum(1) / mask.sum(1)
    margins = means[:4] - means[4:]
    assert report["logps/chosen"] == pytest.approx(float(means[:4].mean()), rel=1e-5)
    assert report["logps/rejected"] == pytest.approx(float(means[4:].mean()), rel=1e-5)
    assert report["rewards/margins"] == pytest.approx(float(margins.mean()), rel=1e-4)
    assert report["rewards/accuracies"] == float((margins > 0).double().mean())
    assert report["slime/active_fraction"] == float((margins < 0.1).double().mean())
    assert 0 < report["slime/active_fraction"] < 1
    parts = report["slime/anchor"] + report["slime/margin"] + report["slime/stabilizer"]
    assert parts == pytest.approx(report["loss"], rel=1e-5)
    assert report["num_pairs"] == 4
    assert report["num_tokens"] == report["num_new_tokens"] == int(batch["attention_mask"].sum())
    assert report["num_completion_tokens"] == int(mask.sum())


def test_evaluation_weights_batches_by_their_pairs(tokenizer, make_args):
    args = make_args(per_device_eval_batch_size=4)
    trainer = SlimeTrainer(
        tiny_llama(len(tokenizer)),
        args,
        eval_dataset={"a": make_pairs(5, seed=1), "b": make_pairs(2, seed=2)},
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    for name, count in (("a", 5), ("b", 2)):
        dataset = trainer.eval_dataset[name]
        batch = trainer.data_collator([dataset[i] for i in range(count)])
        with torch.no_grad():
            expected = float(slime_by_hand(trainer.model, batch, args.loss_config()))
        assert metrics[f"eval_{name}_loss"] == pytest.approx(expected, rel=1e-5)
        assert metrics[f"eval_{name}_num_pairs"] == count


def test_training_learns_the_preference(tokenizer, make_args):
    rows = [{"prompt": "the cat", "chosen": " sat on a mat", "rejected": " ran under a tree"}] * 4
    # A fresh model puts the two answers at some margin; training has to bring it past the hard one.
    trainer, _ = run(
        tokenizer, make_args(max_steps=30, learning_rate=1e-2, lr_scheduler_type="constant"), rows=rows
    )
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1]["rewards/margins"] > 1.0 > history[0]["rewards/margins"]
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert history[-1]["logps/chosen"] > history[0]["logps/chosen"]


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tokenizer, make_args, tmp_path, reduction):
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "stabilizer_reduction": reduction,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    model = tiny_llama(len(tokenizer), attention_dropout=0.2)  # dropout on: the random state must be restored too
    whole, _ = run(tokenizer, make_args(disable_dropout=False, **settings), model=model)
    again, _ = run(
        tokenizer,
        make_args(disable_dropout=False, output_dir=str(tmp_path / "again"), **settings),
        model=tiny_llama(len(tokenizer), seed=9, attention_dropout=0.2),
        resume=f"{whole.args.output_dir}/checkpoint-3",
    )
    assert losses(again)[3:] == losses(whole)[3:]
    assert len(losses(whole)) == 6
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_same_seed_gives_the_same_adapter(tokenizer, make_args):
    adapters = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        trainer = SlimeTrainer(
            tiny_llama(len(tokenizer)),
            make_args(),
            train_dataset=make_pairs(2),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
        )
        adapters.append({n: p for n, p in trainer.model.named_parameters() if "lora_A" in n})
    assert len(adapters[0]) == 2
    for name, value in adapters[0].items():
        assert torch.equal(value, adapters[1][name]), name


def test_fused_and_naive_train_alike(tokenizer, make_args):
    fused, _ = run(tokenizer, make_args(max_steps=4))
    naive, _ = run(tokenizer, make_args(max_steps=4, loss_impl="naive"))
    assert losses(fused) == pytest.approx(losses(naive), rel=1e-4)


@pytest.mark.parametrize("settings", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_mixed_precision_and_checkpointing(tokenizer, make_args, settings):
    plain, _ = run(tokenizer, make_args())
    other, _ = run(tokenizer, make_args(**settings))
    # bf16 has 8 bits: the loss of a random model moves in the second digit.
    assert losses(other) == pytest.approx(losses(plain), rel=3e-2 if "bf16" in settings else 1e-6)


@pytest.mark.parametrize(("setting", "forwards_per_step"), [(None, 2), (True, 2), (False, 1)])
def test_layers_are_recomputed_unless_told_otherwise(tokenizer, make_args, setting, forwards_per_step):
    model = tiny_llama(len(tokenizer))
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    run(tokenizer, make_args(max_steps=3, gradient_checkpointing=setting, check_head=False), model=model)
    assert len(calls) == 3 * forwards_per_step


def test_a_streaming_dataset_trains(tokenizer, make_args):
    rows = make_pairs(8)
    streamed, _ = run(tokenizer, make_args(), rows=IterableDataset.from_generator(lambda: iter(rows)))
    assert len(losses(streamed)) == 2
    assert streamed.state.log_history[0]["num_pairs"] == 4


def test_a_model_by_folder_is_loaded_trained_and_saved(tokenizer, make_args, tmp_path):
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    trainer = SlimeTrainer(str(tmp_path / "start"), make_args(), train_dataset=make_pairs(8))
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    for (name, a), b in zip(trainer.model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert "slime" in json.dumps(trainer.model.model_tags)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lambda_w": -1.0}, ValueError, "lambda_w: expected a weight >= 0, got -1.0"),
        ({"kappa": 0.0}, ValueError, "kappa: expected a number > 0"),
        ({"stabilizer_reduction": "mean"}, ValueError, "stabilizer_reduction: expected one of"),
        ({"max_length": 1}, ValueError, "max_length: expected at least 2"),
        ({"truncation": "middle"}, ValueError, "truncation: expected one of .* got 'middle'"),
        ({"loss_impl": "fast"}, ValueError, "loss_impl: expected one of .* got 'fast'"),
        ({"model_init_kwargs": "{"}, ValueError, "model_init_kwargs: expected JSON"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        SlimeConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_splitting_a_batch_is_refused(tokenizer, make_args):
    args = make_args(accelerator_config={"split_batches": True})
    with pytest.raises(ValueError, match="split_batches=True would separate chosen from rejected"):
        run(tokenizer, args)


def test_the_package_does_not_import_the_trainer():
    code = "import slime_fused, sys; print([m for m in ('transformers', 'datasets', 'peft') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("fsdp_config", "expected"),
    [({}, True), ({"activation_checkpointing": True}, False), ({"fsdp_activation_checkpointing": "true"}, False)],
)
def test_checkpointing_is_left_to_fsdp_where_it_is_asked_to(make_args, fsdp_config, expected, tmp_path):
    path = tmp_path / "fsdp.json"
    path.write_text(json.dumps(fsdp_config))
    for config in (dict(fsdp_config), json.dumps(fsdp_config), str(path)):
        assert make_args(gradient_checkpointing=None, fsdp_config=config).gradient_checkpointing is expected
    args = make_args(gradient_checkpointing=True, fsdp_config=dict(fsdp_config))
    assert args.gradient_checkpointing is True


def test_a_report_that_was_being_written_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    state = TrainerState(global_step=2)
    MetricsFile(path).on_train_begin(None, state, None)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(json.JSONDecodeError):  # which no killed run leaves
        MetricsFile(path).on_train_begin(None, state, None)
