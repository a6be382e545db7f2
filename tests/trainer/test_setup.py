"""What a trainer takes, and what it refuses by name; and what the base class's options do to it."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
import transformers.trainer
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import FalconConfig, FalconForCausalLM, OPTConfig, OPTForCausalLM, TrainingArguments
from transformers.models.llama import modeling_llama

from slime_fused.losses import DPO, SimPO, Slime
from slime_fused.trainer import PreferenceConfig, PreferenceTrainer, SlimeConfig, SlimeTrainer
from slime_fused.trainer.setup import ready_model
from tests.tiny_models import make_pairs, slime_by_hand, tiny_llama
from tests.trainer.test_trainer import losses, run

LORA = LoraConfig(r=4, target_modules=["q_proj"])


def build(tokenizer, args, *, model=None, **options):
    return SlimeTrainer(
        model if model is not None else None if "model_init" in options else tiny_llama(len(tokenizer)),
        args,
        **{"train_dataset": make_pairs(8), "processing_class": tokenizer, **options},
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate: expected a finite number >= 0, got -1.0"),
        ({"learning_rate": float("nan")}, r"learning_rate: expected a finite number >= 0, got nan"),
        ({"backend": "foo"}, r"backend: expected 'auto' or one of .* got 'foo'"),
        ({"backend": "triton"}, r"backend: 'triton' cannot run on cpu"),
        ({"workspace": "lots"}, r"workspace: expected 'auto', bytes, or a string such as '512MiB', got 'lots'"),
        ({"workspace": "0"}, r"workspace: expected a positive number of bytes, got 0"),
        ({"report_to": "paper"}, r"report_to: expected 'none' or some of .* got 'paper'"),
        ({"report_to": "swanlab"}, r"report_to: 'swanlab' needs its library"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor: expected 0, got 0.1.*DPO\(label_smoothing"),
        ({"include_for_metrics": ["inputs"]}, r"include_for_metrics: expected no 'inputs'"),
        ({"use_liger_kernel": True}, r"use_liger_kernel: expected the package liger-kernel"),
    ],
)
def test_settings_are_refused_before_anything_is_loaded(make_args, settings, message, monkeypatch):
    monkeypatch.setattr("slime_fused.trainer.config_checks.is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        make_args(**settings)


def left_padding(rows):
    ids = torch.ones(2 * len(rows), 6, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"args": TrainingArguments(use_cpu=True)},
            TypeError,
            "args: expected a SlimeConfig.* got TrainingArguments",
        ),
        ({"compute_loss_func": lambda *a: 0}, ValueError, "compute_loss_func: expected None"),
        ({"processing_class": None}, ValueError, "processing_class: expected a tokenizer: the model has no name"),
        (
            {"model_init": lambda: None, "model": torch.nn.Linear(1, 1)},
            ValueError,
            "model: expected either .* both",
        ),
        ({"data_collator": left_padding}, ValueError, "data_collator: expected batches padded on the right"),
        (
            {"data_collator": lambda rows: {"input_ids": torch.ones(2, 3)}},
            ValueError,
            "data_collator: expected tensors",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused(tokenizer, make_args, options, error, message):
    options = {"args": make_args(), **options}
    with pytest.raises(error, match=message):
        build(tokenizer, options.pop("args"), **options).train()


def test_an_evaluation_stream_is_refused_where_it_would_be_cut_up(tokenizer, make_args, monkeypatch):
    monkeypatch.setattr(SlimeConfig, "world_size", 2)
    stream = IterableDataset.from_generator(lambda: iter(make_pairs(3)))
    with pytest.raises(ValueError, match="eval_dataset: expected a dataset of known length for several processes"):
        build(tokenizer, make_args(), eval_dataset={"a": stream})


@pytest.mark.parametrize(("adapter", "expected"), [(None, 1e-6), (LORA, 1e-4)])
def test_the_default_learning_rate_follows_the_adapter(tokenizer, make_args, adapter, expected):
    args = make_args(learning_rate=None, lr_scheduler_type="constant", max_steps=1)
    trainer = build(tokenizer, args, peft_config=adapter)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == expected
    assert args.learning_rate is None  # so that the next trainer can choose for itself
    assert make_args(learning_rate=2e-5).resolved_learning_rate(is_adapter=True) == 2e-5


def stand_in_for_liger(model, fused_linear_cross_entropy=True, **_):
    """As `_apply_liger_kernel_to_instance`: another forward on the instance, that makes no logits in training."""
    if not fused_linear_cross_entropy:
        return

    def lce_forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return modeling_llama.LlamaForCausalLM.forward(self, input_ids, attention_mask, use_cache=False)

    model.forward = types.MethodType(lce_forward, model)


def test_liger_may_patch_the_model_before_and_while_training_begins(tokenizer, make_args, monkeypatch):
    plain, _ = run(tokenizer, make_args())
    monkeypatch.setattr("slime_fused.trainer.config_checks.is_liger_kernel_available", lambda: True)
    configs = []

    def apply(model, config):
        configs.append(config)
        stand_in_for_liger(model, **config)

    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", apply)
    model = tiny_llama(len(tokenizer))
    stand_in_for_liger(model)
    for settings in ({}, {"liger_kernel_config": {"rope": True, "fused_linear_cross_entropy": True}}):
        args = make_args(use_liger_kernel=True, **settings)
        trained, _ = run(tokenizer, args, model=model if settings else None)
        assert losses(trained) == losses(plain)
    assert configs == [{"fused_linear_cross_entropy": False}, {"rope": True, "fused_linear_cross_entropy": False}]


def test_predictions_are_per_pair_in_the_order_of_the_dataset(tokenizer, make_args):
    """Sizes that do not fill the last batch, and rows that a sampler would group by length."""
    seen = []
    rows = make_pairs(7, seed=2)
    args = make_args(per_device_eval_batch_size=3, train_sampling_strategy="group_by_length")
    trainer = build(
        tokenizer,
        args,
        eval_dataset=rows,
        compute_metrics=lambda told: seen.append(told) or {"best": told.predictions["margin"].max()},
        preprocess_logits_for_metrics=lambda told, labels: {
            **told,
            "margin": told["chosen_logps"] - told["rejected_logps"],
        },
    )
    metrics = trainer.evaluate()
    told = trainer.predict(rows)
    batch = trainer.data_collator(list(trainer.eval_dataset))
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    logps = torch.log_softmax(logits[:, :-1].double(), -1)
    logps = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (targets != -100)
    sums, lengths = logps.sum(1).numpy(), (targets != -100).sum(1).numpy()
    for predictions in (seen[0].predictions, told.predictions):
        np.testing.assert_allclose(predictions["chosen_sum_logps"], sums[:7], rtol=1e-5)
        np.testing.assert_allclose(predictions["rejected_logps"], (sums / lengths)[7:], rtol=1e-5)
    np.testing.assert_array_equal(told.label_ids, lengths.reshape(2, 7).T)
    means = sums / lengths
    assert metrics["eval_best"] == pytest.approx((means[:7] - means[7:]).max(), rel=1e-5)
    assert told.metrics["test_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(
    "loss", [Slime(), Slime(stabilizer_reduction="token"), SimPO(nll_weight=1.0)], ids=["sequence", "token", "nll"]
)
def test_evaluation_does_not_depend_on_the_batch_size(tokenizer, make_args, loss):
    results = []
    for size in (5, 2):
        args = PreferenceConfig(output_dir=make_args().output_dir, use_cpu=True, per_device_eval_batch_size=size)
        trainer = PreferenceTrainer(
            tiny_llama(len(tokenizer)), args, loss, eval_dataset=make_pairs(5), processing_class=tokenizer
        )
        results.append(trainer.evaluate())
        batch = trainer.data_collator(list(trainer.eval_dataset))
        if isinstance(loss, Slime):
            with torch.no_grad():
                expected = float(slime_by_hand(trainer.model, batch, loss))
            assert results[-1]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    for name in results[0].keys() - {n for n in results[0] if n.endswith(("time", "second"))}:
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-5), name


def test_rows_of_like_length_are_grouped(tokenizer, make_args):
    args = make_args(train_sampling_strategy="group_by_length", per_device_train_batch_size=2, max_steps=8)
    trainer = build(tokenizer, args, train_dataset=make_pairs(16))
    lengths = trainer.train_dataset["length"]
    expected = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in trainer.train_dataset]
    assert list(lengths) == expected
    widths = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: widths.append(len(rows)) or collate(rows)
    trainer.train()
    assert widths == [2] * 8


def test_a_model_by_model_init_starts_anew_each_time(tokenizer, make_args):
    # Its own seeding of the tiny model would shuffle the rows in another way.
    args = make_args(train_sampling_strategy="sequential")
    plain, _ = run(tokenizer, args, rows=make_pairs(8))
    trainer = build(tokenizer, args, model_init=lambda: tiny_llama(len(tokenizer)))
    for _ in range(2):
        trainer.train()
        assert losses(trainer)[:2] == losses(plain)
    with pytest.raises(ValueError, match="optimizers: expected none with model_init"):
        build(tokenizer, make_args(), model_init=lambda: tiny_llama(len(tokenizer)), optimizers=(object(), None))
    with pytest.raises(ValueError, match="model_init: DPO needs a reference"):
        PreferenceTrainer(
            None, make_args(), DPO(), model_init=lambda: tiny_llama(len(tokenizer)), processing_class=tokenizer
        )


def test_raw_rows_are_prepared_wherever_they_come(tokenizer, make_args):
    trainer = build(tokenizer, make_args())
    rows = make_pairs(5, seed=1)
    expected = trainer.evaluate(trainer.prepared(rows, "eval"))["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == expected
    assert trainer.evaluate({"a": rows, "b": Dataset.from_list(rows)})["eval_b_loss"] == expected


def test_no_warning_of_pinned_memory_on_a_cpu(tokenizer, make_args, recwarn):
    run(tokenizer, make_args(max_steps=-1, num_train_epochs=2))
    assert not [str(w.message) for w in recwarn if "pin_memory" in str(w.message)]


def model_with_dropout(kind):
    """Functional dropouts: an attribute of each module, a rate for whole layers, and a config read at each call."""
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    if kind == "OPT":
        config = OPTConfig(
            **size, ffn_dim=48, dropout=0.3, attention_dropout=0.3, layerdrop=0.5, word_embed_proj_dim=32
        )
        return OPTForCausalLM(config)
    if kind == "Falcon":
        return FalconForCausalLM(FalconConfig(**size, hidden_dropout=0.3, attention_dropout=0.3))
    return tiny_llama(64, attention_dropout=0.3)


@pytest.mark.parametrize("kind", ["Llama", "OPT", "Falcon"])
def test_every_dropout_is_off(make_args, kind):
    ids = torch.arange(2, 26).reshape(2, 12)
    for is_off in (False, True):
        model = model_with_dropout(kind)
        model = ready_model(model, None, make_args(disable_dropout=is_off)).train()
        with torch.no_grad():
            first, *others = (model(input_ids=ids).logits for _ in range(3))
        assert all(torch.equal(first, other) for other in others) == is_off
        if kind != "Falcon":  # which reads it there
            assert model.config.attention_dropout == 0.3  # what is saved with the model
