"""Formats, tokenisation, truncation and batches."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset

from slime_fused.trainer import PreferenceCollator, PreferenceFormatError
from slime_fused.trainer.data import prepare_dataset
from slime_fused.trainer.formats import parse_pair
from slime_fused.trainer.tokenization import TokenizedResponse, tokenize_pair, truncate_pair
from tests.tiny_models import make_pairs


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def decoded(tokenizer, response: TokenizedResponse) -> tuple[str, str]:
    return tokenizer.decode(response.ids[: response.prompt_length]), tokenizer.decode(
        response.ids[response.prompt_length :]
    )


def test_text_ends_with_one_eos_and_splits_where_the_response_begins(tokenizer):
    pair = parse_pair({"prompt": "the cat", "chosen": " sat", "rejected": " ran<eos>"}, "row 0")
    chosen, rejected, is_prefix = tokenize_pair(pair, tokenizer)
    assert is_prefix
    assert decoded(tokenizer, chosen) == ("the cat", " sat<eos>")
    assert decoded(tokenizer, rejected) == ("the cat", " ran<eos>")


def test_chat_ends_as_its_template_ends_it(tokenizer):
    pair = parse_pair(
        {"prompt": [user("who sat")], "chosen": [reply("the cat")], "rejected": [reply("a dog")]}, "r"
    )
    chosen, rejected, is_prefix = tokenize_pair(pair, tokenizer)
    assert is_prefix
    assert decoded(tokenizer, chosen) == ("<|user|>who sat<|end|><|assistant|>", "the cat<|end|>")
    assert decoded(tokenizer, rejected) == ("<|user|>who sat<|end|><|assistant|>", "a dog<|end|>")


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"chosen": "the cat sat", "rejected": "the cat ran"}, "the cat", " sat", " ran"),
        ({"chosen": "the cat", "rejected": "the cat ran"}, "the cat", "", " ran"),
        (
            {"chosen": [user("q"), reply("a")], "rejected": [user("q"), reply("b")]},
            [user("q")],
            [reply("a")],
            [reply("b")],
        ),
        (
            {"prompt": "q", "chosen": [user("q"), reply("a")], "rejected": [user("q"), reply("b")]},
            [user("q")],
            [reply("a")],
            [reply("b")],
        ),
        ({"prompt": "q", "chosen": [reply("a")], "rejected": reply("b")}, [user("q")], [reply("a")], [reply("b")]),
    ],
)
def test_a_prompt_is_found_where_it_is_not_given(row, prompt, chosen, rejected):
    pair = parse_pair(row, "row 0")
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            r"row 7: expected 'chosen' and 'rejected'.*got columns \['chosen', 'prompt'\]",
        ),
        ({}, r"row 7: .* got no columns"),
        (
            {"prompt": "a", "chosen": 3, "rejected": "b"},
            r"row 7: 'chosen' must be a text or a non-empty list .* got 3",
        ),
        ({"prompt": "a", "chosen": [], "rejected": "b"}, r"row 7: 'chosen' must be a text or a non-empty list"),
        ({"prompt": "a", "chosen": [{"from": "x"}], "rejected": "b"}, r"'chosen' must have 'role' and 'content'"),
        ({"prompt": "a", "chosen": "b", "rejected": [reply("c")]}, r"row 7: 'chosen' and 'rejected' must both be"),
        ({"prompt": [user("a")], "chosen": "b", "rejected": "c"}, r"row 7: 'prompt' holds messages although"),
        ({"chosen": "same", "rejected": "same"}, r"row 7: without a 'prompt', .* must differ"),
        ({"chosen": [reply("a")], "rejected": [reply("a")]}, r"row 7: .* hold the same messages"),
        ({"chosen": [reply("a")], "rejected": [reply("b")]}, r"row 7: no 'prompt', and .* share no first message"),
    ],
)
def test_rows_that_are_no_pair_are_named(row, message):
    with pytest.raises(PreferenceFormatError, match=message):
        parse_pair(row, "row 7")


def test_messages_without_a_chat_template_are_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    pair = parse_pair({"prompt": [user("a")], "chosen": [reply("b")], "rejected": [reply("c")]}, "row 0")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        tokenize_pair(pair, tokenizer)


LONG, SHORT = TokenizedResponse([1, 2, 3, 10, 11, 12, 13], 3), TokenizedResponse([1, 2, 3, 20], 3)


@pytest.mark.parametrize(
    ("truncation", "max_length", "expected"),
    [
        ("keep_start", 7, (LONG, SHORT)),
        ("drop", 7, (LONG, SHORT)),
        ("drop", 6, None),
        ("keep_start", 5, (TokenizedResponse([1, 2, 3, 10, 11], 3), SHORT)),
        ("keep_end", 6, (TokenizedResponse([2, 3, 10, 11, 12, 13], 2), TokenizedResponse([2, 3, 20], 2))),
        ("keep_end", 3, (TokenizedResponse([3, 10, 11], 1), TokenizedResponse([3, 20], 1))),
        ("keep_start", 2, (TokenizedResponse([1, 2], 2), TokenizedResponse([1, 2], 2))),
    ],
)
def test_truncation(truncation, max_length, expected):
    assert truncate_pair(LONG, SHORT, max_length, truncation) == expected


def test_unusable_rows_are_dropped_and_counted(tokenizer, make_args, caplog, monkeypatch):
    from slime_fused.trainer import data

    warnings: list[str] = []
    monkeypatch.setattr(data.logger, "warning", warnings.append)
    rows = [
        {"prompt": "the cat", "chosen": " sat", "rejected": " ran"},
        {"prompt": "the cat", "chosen": "", "rejected": " ran"},
        {"prompt": "the cat " * 20, "chosen": " sat", "rejected": " ran"},
    ]
    kept = prepare_dataset(rows, tokenizer, make_args(max_length=12), "train")
    assert len(kept) == 1
    assert tokenizer.decode(kept[0]["chosen_ids"]) == "the cat sat<eos>"
    assert warnings == [
        "train dataset: dropped 2 of 3 pairs: 1 because a response is empty; "
        "1 because the prompt leaves no room for a response within max_length=12"
    ]
    with pytest.raises(
        ValueError, match="none of its 2 pairs can be used: 1 because a response is empty; 1 because"
    ):
        prepare_dataset(rows[1:], tokenizer, make_args(max_length=12), "train")


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_cut_rows_are_counted_with_the_rule(tokenizer, make_args, monkeypatch, truncation):
    from slime_fused.trainer import data

    warnings: list[str] = []
    monkeypatch.setattr(data.logger, "warning", warnings.append)
    rows = [{"prompt": "the cat", "chosen": " sat" * count, "rejected": " ran"} for count in (1, 20, 30)]
    kept = prepare_dataset(rows, tokenizer, make_args(max_length=12, truncation=truncation), "train")
    assert [len(ids) for ids in kept["chosen_ids"]] == [len(kept[0]["chosen_ids"]), 12, 12]
    assert set(kept.column_names) == set(data.TOKEN_COLUMNS)
    (warning,) = warnings
    rule = {"keep_start": "the end of the response gives way", "keep_end": "the start of the prompt gives way"}
    assert warning.startswith(f"train dataset: cut 2 of 3 pairs to max_length=12: {rule[truncation]}")


@pytest.mark.parametrize("content", ["", None])
def test_an_empty_chat_response_is_dropped(tokenizer, make_args, content):
    """Its template would leave the token that ends a turn as the only target."""
    full = {"prompt": [user("who")], "chosen": [reply("the cat")], "rejected": [reply("a dog")]}
    for name in ("chosen", "rejected"):
        rows = [full, {**full, name: [reply(content)]}]
        assert len(prepare_dataset(rows, tokenizer, make_args(), "train")) == 1


def test_a_response_that_only_calls_a_tool_is_kept(tokenizer, make_args):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    row = {"prompt": [user("who")], "chosen": [call], "rejected": [reply("a dog")]}
    assert len(prepare_dataset([row], tokenizer, make_args(), "train")) == 1


def test_token_ids_as_trl_makes_them(tokenizer, make_args):
    """The same rows as texts, and tokenised with the prompt apart from the responses: the same batches."""
    rows = make_pairs(6)
    ours = prepare_dataset(rows, tokenizer, make_args(max_length=16), "train")
    tokenised = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        both = [tokenizer(row["prompt"] + row[name] + "<eos>")["input_ids"] for name in ("chosen", "rejected")]
        assert all(ids[: len(prompt)] == prompt for ids in both)
        tokenised.append(
            {"prompt_ids": prompt, "chosen_ids": both[0][len(prompt) :], "rejected_ids": both[1][len(prompt) :]}
        )
    theirs = prepare_dataset(tokenised, tokenizer, make_args(max_length=16), "train")
    assert theirs.to_list() == ours.to_list()
    with pytest.raises(
        PreferenceFormatError, match="row 0 of the train dataset: 'chosen_ids' must be a list of token"
    ):
        prepare_dataset([{**tokenised[0], "chosen_ids": "text"}], tokenizer, make_args(), "train")


def test_a_streaming_dataset_gives_the_same_rows(tokenizer, make_args):
    rows = [*make_pairs(5), {"prompt": "the", "chosen": "", "rejected": " cat"}]
    whole = prepare_dataset(Dataset.from_list(rows), tokenizer, make_args(), "train")
    streamed = prepare_dataset(IterableDataset.from_generator(lambda: iter(rows)), tokenizer, make_args(), "train")
    assert list(streamed) == list(whole)
    assert len(whole) == 5


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, "train_dataset: expected at least one row, got an empty dataset"),
        ("pairs.jsonl", TypeError, "train_dataset: expected a datasets.Dataset or an iterable of rows, got .*str"),
        ([{"text": "a"}], PreferenceFormatError, r"row 0 of the train dataset: expected .* got columns \['text'\]"),
    ],
)
def test_unusable_datasets_are_refused(tokenizer, make_args, dataset, error, message):
    with pytest.raises(error, match=message):
        prepare_dataset(dataset, tokenizer, make_args(), "train")


def test_a_batch_is_chosen_then_rejected_padded_on_the_right():
    rows = [
        {"chosen_ids": [1, 2, 3], "chosen_prompt_length": 1, "rejected_ids": [1, 4], "rejected_prompt_length": 1},
        {"chosen_ids": [5, 6], "chosen_prompt_length": 1, "rejected_ids": [5, 7, 8], "rejected_prompt_length": 2},
    ]
    batch = PreferenceCollator(pad_token_id=0, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [5, 6, 0, 0], [1, 4, 0, 0], [5, 7, 8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    n = -100
    assert batch["labels"].tolist() == [[n, 2, 3, n], [n, 6, n, n], [n, 4, n, n], [n, n, 8, n]]
    assert batch["layout"].lengths == (2, 1, 1, 1)
    assert batch["layout"].labels.tolist() == [[2, 3, -1, -1], [6, -1, -1, -1], [4, -1, -1, -1], [-1, 8, -1, -1]]


def test_a_batch_that_processes_cut_up_holds_tensors_alone():
    rows = [{"chosen_ids": [1, 2], "chosen_prompt_length": 1, "rejected_ids": [1, 4], "rejected_prompt_length": 1}]
    assert set(PreferenceCollator(0, has_layout=False)(rows)) == {"input_ids", "attention_mask", "labels"}


def test_tokens_are_kept_for_any_run_with_the_same_settings_of_data(tokenizer, make_args, tmp_path):
    """`datasets` looks results up by a fingerprint, in which nothing else may be."""
    rows = Dataset.from_list(make_pairs(3))
    tokenizer("once")  # its state changes at the first call

    def fingerprint(**settings):
        return prepare_dataset(rows, tokenizer, make_args(**settings), "train")._fingerprint

    first = fingerprint()
    assert fingerprint(output_dir=str(tmp_path / "other"), learning_rate=0.5, seed=9) == first
    assert fingerprint(max_length=99) != first


def test_prepared_rows_without_a_target_are_dropped(tokenizer, make_args, monkeypatch):
    from slime_fused.trainer import data

    warnings: list[str] = []
    monkeypatch.setattr(data.logger, "warning", warnings.append)
    whole = prepare_dataset(make_pairs(3), tokenizer, make_args(), "train")
    assert prepare_dataset(whole, tokenizer, make_args(), "train") is whole
    rows = whole.to_list()
    rows[1]["rejected_prompt_length"] = len(rows[1]["rejected_ids"])
    kept = prepare_dataset(Dataset.from_list(rows), tokenizer, make_args(max_length=2), "train")
    assert kept.to_list() == [rows[0], rows[2]]
    assert warnings[0].startswith("train dataset: 3 of 3 pairs are longer than max_length=2 and stay so")
    assert warnings[1] == "train dataset: dropped 1 of 3 pairs: no response token"
    streamed = prepare_dataset(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, make_args(), "train")
    assert list(streamed) == kept.to_list()
