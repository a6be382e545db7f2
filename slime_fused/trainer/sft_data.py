"""Datasets of supervised fine-tuning to batches: tokenised once, with a label for each token to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from slime_fused.trainer.data import IGNORE_INDEX, check_vocabulary, pad_batch, prepare_rows
from slime_fused.trainer.formats import TOKENISED, Messages, common_length, is_empty, is_tokenised, token_ids
from slime_fused.trainer.sft_config import SftConfig
from slime_fused.trainer.sft_formats import Example, parse_example
from slime_fused.trainer.tokenization import Truncation, apply_template, prompt_ids, respond

SFT_COLUMNS = ("input_ids", "labels")
SFT_FEATURES = Features({name: [Value("int64")] for name in SFT_COLUMNS})


@dataclass(frozen=True)
class ExampleTokenizer:
    """Maps one row to `SFT_COLUMNS`, a ``verdict`` ("" to keep it, else why it is dropped) and ``is_cut``.

    As `PairTokenizer` it holds just what its results depend on.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    max_length: int | None
    truncation: Truncation
    completion_only_loss: bool
    num_embeddings: int | None = None
    """Of the model, where token ids are to be below it."""

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Tokenise ``row``. Raises PreferenceFormatError that names the row if it is no example."""
        where = f"row {index} of the {self.name} dataset"
        if is_tokenised(row):
            prompt, completion = (token_ids(row[name], name, where) for name in TOKENISED[:2])
            ids, labels = prompt + completion, [IGNORE_INDEX] * len(prompt) + completion
            is_said, is_prefix = bool(completion), True
        else:
            example = parse_example(row, where)
            ids, labels, is_prefix = tokenize_example(example, self.tokenizer)
            is_said = not is_empty(example.completion)
        check_vocabulary(ids, self.num_embeddings, self.tokenizer, where)
        if not self.completion_only_loss:
            labels = ids
        verdict, is_cut = "" if is_prefix else "shifted", False
        if not is_said or not num_targets(labels):
            verdict = "empty"
        else:
            fitted = truncate_example(ids, labels, self.max_length, self.truncation)
            if fitted is None:
                verdict = "long"
            else:
                is_cut = len(fitted[0]) < len(ids)
                ids, labels = fitted
                verdict = verdict if num_targets(labels) else "cut"
        return {"input_ids": ids, "labels": labels, "verdict": verdict, "is_cut": is_cut}

    def measure(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Of a row of `SFT_COLUMNS`: ``is_usable``, whether it has a target; and its ``length``."""
        where = f"row {index} of the {self.name} dataset"
        check_vocabulary(row["input_ids"], self.num_embeddings, self.tokenizer, where)
        return {"is_usable": num_targets(row["labels"]) > 0, "length": len(row["input_ids"])}


def tokenize_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], bool]:
    """(ids, labels, whether the tokens of each beginning begin the whole unchanged); labels are ids or -100."""
    if example.prompt is not None:
        ids_of_prompt = prompt_ids(example.prompt, tokenizer, example.template_kwargs)
        whole = respond(example.prompt, example.completion, ids_of_prompt, tokenizer, example.template_kwargs)
        labels = [IGNORE_INDEX] * whole.prompt_length + whole.ids[whole.prompt_length :]
        return whole.ids, labels, whole.prompt_length >= len(ids_of_prompt)
    if isinstance(example.completion, str):
        ids = respond("", example.completion, [], tokenizer, {}).ids
        return ids, ids, True
    return _assistant_turns(example.completion, tokenizer, example.template_kwargs)


def _assistant_turns(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> tuple[list[int], list[int], bool]:
    """A conversation, with labels on what the assistant says.

    A turn that the template renders in another way once others follow it (some drop earlier reasoning) is not
    trained on: the model would not say it like that.
    """
    ids = apply_template(tokenizer, messages, template_kwargs)
    labels = [IGNORE_INDEX] * len(ids)
    all_prefixes = True
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or is_empty([message]):
            continue
        before = prompt_ids(messages[:i], tokenizer, template_kwargs) if i else []
        is_last = i == len(messages) - 1
        after = ids if is_last else apply_template(tokenizer, messages[: i + 1], template_kwargs)
        begin, end = common_length(before, ids), common_length(after, ids)
        is_prefix = begin == len(before) and end == len(after)
        all_prefixes &= is_prefix
        if is_prefix or is_last:
            labels[begin:end] = ids[begin:end]
    return ids, labels, all_prefixes


def truncate_example(
    ids: list[int], labels: list[int], max_length: int | None, truncation: Truncation
) -> tuple[list[int], list[int]] | None:
    """Ids and labels within ``max_length`` tokens, or None where ``truncation`` drops the row.

    ``keep_start`` cuts the end. ``keep_end`` first drops tokens from the start, as many as needed but never the one
    before the first label. ``drop`` cuts nothing.
    """
    if max_length is None or len(ids) <= max_length:
        return ids, labels
    if truncation == "drop":
        return None
    start = 0
    if truncation == "keep_end":
        first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        start = max(min(len(ids) - max_length, first - 1), 0)
    return ids[start : start + max_length], labels[start : start + max_length]


def num_targets(labels: Sequence[int]) -> int:
    """Tokens to train on that have a token before them to be predicted from."""
    return sum(label != IGNORE_INDEX for label in labels[1:])


def prepare_examples(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, args: SftConfig, name: str, num_embeddings: int | None = None
) -> Dataset | IterableDataset:
    """``dataset`` with the columns `SFT_COLUMNS`, ready to collate; otherwise as `prepare_dataset`."""
    settings = (args.max_length, args.truncation, args.completion_only_loss)
    function = ExampleTokenizer(tokenizer, name, *settings, num_embeddings)
    return prepare_rows(dataset, function, SFT_FEATURES, "rows", args.dataset_num_proc)


@dataclass(frozen=True)
class SftCollator:
    """Rows of `SFT_COLUMNS` to one batch."""

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    has_layout: bool = True
    """As in `PreferenceCollator`."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask``, ``labels``: (S, T) int64, padded on the right; and ``layout``."""
        sequences = [(row["input_ids"], row["labels"]) for row in rows]
        return pad_batch(sequences, self.pad_token_id, self.pad_to_multiple_of, has_layout=self.has_layout)
