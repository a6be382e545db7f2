"""`SftTrainer`: which tokens are trained on; the loss against plain `transformers` and the reference."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from slime_fused import reference
from slime_fused.trainer import PreferenceFormatError, SftConfig, SftTrainer
from slime_fused.trainer.sft_data import IGNORE_INDEX, prepare_examples, tokenize_example, truncate_example
from slime_fused.trainer.sft_formats import example_columns, parse_example
from tests.tiny_models import make_pairs, quick_settings, tiny_llama


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    return [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in make_pairs(count, seed)]


def config(folder, **overrides) -> SftConfig:
    return SftConfig(**quick_settings(folder, **{"max_steps": 1, "max_grad_norm": 0.0, **overrides}))


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters()})


def train(tokenizer, args, rows, **kwargs):
    recorder = Gradients()
    trainer = SftTrainer(
        kwargs.pop("model", None) or tiny_llama(len(tokenizer)),
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[recorder],
        **kwargs,
    )
    trainer.train()
    return trainer, recorder.steps


def report(trainer) -> dict[str, float]:
    return next(row for row in trainer.state.log_history if "loss" in row)


def assert_same_gradients(got, expected):
    for name, value in expected.items():
        floor = 2e-5 * float(value.abs().max())
        torch.testing.assert_close(got[name], value, rtol=2e-3, atol=floor, msg=lambda m, n=name: f"{n}: {m}")


CHAT = [user("who sat"), reply("the cat"), user("who ran"), reply("a dog")]


@pytest.mark.parametrize(
    ("row", "spans"),
    [
        ({"prompt": "the cat", "completion": " sat"}, [" sat<eos>"]),
        ({"prompt": [user("who sat")], "completion": [reply("the cat")]}, ["the cat<|end|>"]),
        ({"prompt": "who sat", "completion": [reply("the cat")]}, ["the cat<|end|>"]),
        ({"messages": CHAT[:2]}, ["the cat<|end|>"]),
        ({"messages": CHAT}, ["the cat<|end|>", "a dog<|end|>"]),
        ({"messages": [CHAT[0], reply(""), *CHAT[2:]]}, ["a dog<|end|>"]),
        ({"text": "the cat sat"}, ["the cat sat<eos>"]),
        ({"prompt": "the cat", "chosen": " sat", "rejected": " ran"}, [" sat<eos>"]),
        ({"chosen": CHAT[:2], "rejected": [CHAT[0], reply("a dog")]}, ["the cat<|end|>"]),
    ],
)
def test_what_is_trained_on(tokenizer, row, spans):
    ids, labels, is_prefix = tokenize_example(parse_example(row, "row 0"), tokenizer)
    assert is_prefix
    assert len(ids) == len(labels)
    found, inside = [], False
    for token, label in zip(ids, labels, strict=True):
        if label == IGNORE_INDEX:
            inside = False
            continue
        assert label == token
        if not inside:
            found.append([])
        found[-1].append(token)
        inside = True
    assert [tokenizer.decode(span) for span in found] == spans
    assert parse_example(example_columns(row, "row 0"), "row 0") == parse_example(row, "row 0")


def test_a_turn_that_changes_once_others_follow_is_left_out(tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['role'] == 'assistant' and not loop.last %}again{% else %}{{ m['content'] }}{% endif %}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    _, labels, is_prefix = tokenize_example(parse_example({"messages": CHAT}, "row 0"), tokenizer)
    assert not is_prefix
    assert tokenizer.decode([x for x in labels if x != IGNORE_INDEX]) == "a dog<|end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "b"}, r"row 3: expected 'prompt' with 'completion'; got columns \['completion'\]"),
        ({"prompt": "a"}, r"row 3: expected 'prompt' and 'completion', 'messages', 'text', or a pair"),
        ({"prompt": [user("a")], "completion": "b"}, "'prompt' holds messages although the completion is a text"),
        ({"messages": "a"}, "'messages' must be a list of messages"),
        ({"messages": [{"from": "x"}]}, "must have 'role' and 'content'"),
        ({"text": ["a"]}, "'text' must be a text"),
    ],
)
def test_rows_that_are_no_example_are_named(row, message):
    with pytest.raises(PreferenceFormatError, match=message):
        parse_example(row, "row 3")


@pytest.mark.parametrize(
    ("rule", "max_length", "ids", "labels"),
    [
        ("keep_start", 6, [1, 2, 3, 4, 5, 6], [-100, -100, -100, 4, 5, 6]),
        ("keep_start", 4, [1, 2, 3, 4], [-100, -100, -100, 4]),
        ("keep_end", 4, [3, 4, 5, 6], [-100, 4, 5, 6]),
        ("keep_end", 3, [3, 4, 5], [-100, 4, 5]),
    ],
)
def test_truncation(rule, max_length, ids, labels):
    whole = [1, 2, 3, 4, 5, 6], [-100, -100, -100, 4, 5, 6]
    assert truncate_example(*whole, max_length, rule) == (ids, labels)
    assert truncate_example(*whole, 5, "drop") is None


def test_rows_without_a_completion_are_dropped(tokenizer, tmp_path):
    rows = [
        *make_rows(2),
        {"prompt": "the cat", "completion": ""},
        {"prompt": "the cat " * 20, "completion": " sat"},
    ]
    kept = prepare_examples(rows, tokenizer, config(tmp_path, max_length=30), "train")
    assert len(kept) == 2
    whole = prepare_examples(rows[:2], tokenizer, config(tmp_path, completion_only_loss=False), "train")
    assert whole["labels"][:] == whole["input_ids"][:]


@pytest.mark.parametrize("completion_only", [True, False])
def test_the_chosen_ids_of_a_tokenised_pair_are_the_completion(tokenizer, tmp_path, completion_only):
    rows = [
        {"prompt_ids": [3, 4], "chosen_ids": [5, 6], "rejected_ids": [7]},
        {"prompt_ids": [3, 4], "chosen_ids": [], "rejected_ids": [7]},
    ]
    rows = Dataset.from_list([example_columns(row, "row") for row in rows])
    args = config(tmp_path, completion_only_loss=completion_only)
    labels = [IGNORE_INDEX, IGNORE_INDEX, 5, 6] if completion_only else [3, 4, 5, 6]
    assert list(prepare_examples(rows, tokenizer, args, "train")) == [{"input_ids": [3, 4, 5, 6], "labels": labels}]
    row = {"prompt_ids": [3], "chosen_ids": "5 6", "rejected_ids": [7]}
    with pytest.raises(PreferenceFormatError, match="'chosen_ids' must be a list of token ids"):
        example_columns(row, "row")


def test_prepared_rows_without_a_label_are_dropped(tokenizer, tmp_path):
    """Entropy was NaN on a batch of them, with smoothing; without, training stopped there."""
    prepared = prepare_examples(make_rows(2), tokenizer, config(tmp_path), "train")
    rows = [*prepared.to_list(), {"input_ids": [5, 6, 7], "labels": [5, IGNORE_INDEX, IGNORE_INDEX]}]
    args = config(tmp_path, per_device_train_batch_size=1, label_smoothing=0.1, max_steps=-1, num_train_epochs=1)
    trainer, _ = train(tokenizer, args, Dataset.from_list(rows))
    told = [row for row in trainer.state.log_history if "loss" in row]
    assert len(told) == 2
    assert all(row["entropy"] > 0 for row in told)
    with pytest.raises(ValueError, match="train_dataset: none of its 1 rows has a response token"):
        prepare_examples(Dataset.from_list(rows[2:]), tokenizer, config(tmp_path), "train")


@pytest.mark.parametrize("completion_only", [True, False])
def test_against_the_loss_of_transformers(tokenizer, tmp_path, completion_only):
    """Its own model computes the same mean from the same labels: value, and the gradient of every parameter."""
    args = config(tmp_path, completion_only_loss=completion_only)
    trainer, steps = train(tokenizer, args, make_rows(4))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    batch.pop("layout")
    model = tiny_llama(len(tokenizer))
    loss = model(**batch).loss
    loss.backward()
    told = report(trainer)
    assert told["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(steps[0], {name: p.grad for name, p in model.named_parameters()})
    assert told["num_tokens"] == int(batch["attention_mask"].sum())
    assert told["num_completion_tokens"] == int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    assert told["num_rows"] == 4


@pytest.mark.parametrize("impl", ["fused", "naive"])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
def test_against_the_reference(tokenizer, tmp_path, impl, smoothing, z_loss):
    args = config(tmp_path, label_smoothing=smoothing, z_loss=z_loss, loss_impl=impl)
    trainer, steps = train(tokenizer, args, make_rows(4))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    model = tiny_llama(len(tokenizer)).double()
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    told = reference.linear_cross_entropy(
        hidden,
        model.lm_head.weight,
        batch["labels"],
        shift=True,
        reduction="none",
        label_smoothing=smoothing,
        z_loss=z_loss,
        return_stats=("entropy", "is_top1"),
    )
    count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    loss = told.losses.sum() / count
    loss.backward()
    got = report(trainer)
    assert got["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert got["entropy"] == pytest.approx(float(told.entropy.sum()) / count, rel=1e-4)
    assert got["mean_token_accuracy"] == pytest.approx(int(told.is_top1.sum()) / count, rel=1e-6)
    assert_same_gradients(steps[0], {name: p.grad.float() for name, p in model.named_parameters()})


def test_accumulation_counts_tokens(tokenizer, tmp_path):
    """Rows of unequal length: a mean of the micro-batches' means would be another number."""
    rows = [{"prompt": "the", "completion": " cat" * n} for n in (1, 9, 2, 14)]
    runs = [
        train(
            tokenizer,
            config(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, seed=1),
            rows,
        )
        for size in (4, 2, 1)
    ]
    whole, expected = runs[0]
    for trainer, steps in runs[1:]:
        assert report(trainer)["loss"] == pytest.approx(report(whole)["loss"], rel=1e-5)
        assert report(trainer)["num_completion_tokens"] == report(whole)["num_completion_tokens"]
        assert_same_gradients(steps[0], expected[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_evaluation_counts_tokens(tokenizer, tmp_path, smoothing):
    rows = [{"prompt": "the", "completion": " cat" * n} for n in (1, 9, 2, 14, 3)]
    numbers = []
    for size in (5, 2):
        trainer = SftTrainer(
            tiny_llama(len(tokenizer)),
            config(tmp_path, per_device_eval_batch_size=size, label_smoothing=smoothing),
            eval_dataset=rows,
            processing_class=tokenizer,
        )
        numbers.append(trainer.evaluate())
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "num_completion_tokens", "num_rows"):
        assert numbers[1][f"eval_{name}"] == pytest.approx(numbers[0][f"eval_{name}"], rel=1e-5), name
    assert numbers[0]["eval_num_rows"] == 5


def test_default_learning_rates(tmp_path):
    rates = [config(tmp_path, learning_rate=None).resolved_learning_rate(is_adapter=x) for x in (False, True)]
    assert rates == [2e-5, 1e-4]


def test_training_learns_the_completion(tokenizer, tmp_path):
    rows = [{"messages": CHAT}] * 4
    args = config(tmp_path, max_steps=30, learning_rate=1e-2, lr_scheduler_type="constant")
    trainer, _ = train(tokenizer, args, rows)
    last = [row for row in trainer.state.log_history if "loss" in row][-1]
    assert last["loss"] < 0.1
    assert last["mean_token_accuracy"] == 1.0
