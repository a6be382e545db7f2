"""Datasets of preference pairs to batches: tokenised once, then collated as rows [chosen..., rejected...]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

import slime_fused
from slime_fused.trainer.config import HeadConfig
from slime_fused.trainer.formats import (
    TOKENISED,
    PreferenceFormatError,
    is_empty,
    is_tokenised,
    parse_pair,
    token_ids,
)
from slime_fused.trainer.tokenization import RULES, TokenizedResponse, Truncation, tokenize_pair, truncate_pair

logger = logging.get_logger(__name__)

TOKEN_COLUMNS = ("chosen_ids", "chosen_prompt_length", "rejected_ids", "rejected_prompt_length")
TOKEN_FEATURES = Features(
    {name: Value("int64") if name.endswith("_length") else [Value("int64")] for name in TOKEN_COLUMNS}
)
IGNORE_INDEX = -100


@dataclass(frozen=True)
class PairTokenizer:
    """Maps one row to `TOKEN_COLUMNS`, a ``verdict`` ("" to keep it, else why it is dropped) and ``is_cut``.

    `datasets` keeps results by what the function holds: here, just what they depend on.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    max_length: int | None
    truncation: Truncation
    num_embeddings: int | None = None
    """Of the model, where token ids are to be below it."""

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Tokenise ``row``. Raises PreferenceFormatError that names the row if it is no preference pair."""
        where = f"row {index} of the {self.name} dataset"
        chosen, rejected, verdict = self._tokens(row, where)
        check_vocabulary([*chosen.ids, *rejected.ids], self.num_embeddings, self.tokenizer, where)
        is_cut = False
        if verdict == "empty" or min(chosen.num_targets, rejected.num_targets) < 1:
            verdict = "empty"
        else:
            fitted = truncate_pair(chosen, rejected, self.max_length, self.truncation)
            if fitted is None:
                verdict = "long"
            else:
                is_cut = fitted != (chosen, rejected)
                chosen, rejected = fitted
                if min(chosen.num_targets, rejected.num_targets) < 1:
                    verdict = "cut"
        return {
            "chosen_ids": chosen.ids,
            "chosen_prompt_length": chosen.prompt_length,
            "rejected_ids": rejected.ids,
            "rejected_prompt_length": rejected.prompt_length,
            "verdict": verdict,
            "is_cut": is_cut,
        }

    def measure(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Of a row of `TOKEN_COLUMNS`: ``is_usable``, whether each response has a target; and its ``length``."""
        pair = [
            TokenizedResponse(row[f"{kind}_ids"], row[f"{kind}_prompt_length"]) for kind in ("chosen", "rejected")
        ]
        where = f"row {index} of the {self.name} dataset"
        for response in pair:
            check_vocabulary(response.ids, self.num_embeddings, self.tokenizer, where)
        return {
            "is_usable": min(response.num_targets for response in pair) > 0,
            "length": max(len(response.ids) for response in pair),
        }

    def _tokens(self, row: Mapping[str, Any], where: str) -> tuple[TokenizedResponse, TokenizedResponse, str]:
        if is_tokenised(row):
            prompt, *responses = (token_ids(row[name], name, where) for name in TOKENISED)
            chosen, rejected = (TokenizedResponse(prompt + response, len(prompt)) for response in responses)
            return chosen, rejected, ""
        pair = parse_pair(row, where)
        chosen, rejected, is_prefix = tokenize_pair(pair, self.tokenizer)
        # Of an empty chat response the tokens that end a turn are left, which nobody wants to train on.
        is_pair = not (is_empty(pair.chosen) or is_empty(pair.rejected))
        return chosen, rejected, "" if is_pair and is_prefix else "shifted" if is_pair else "empty"


_REASONS = {
    "empty": "a response is empty",
    "long": "longer than max_length={max_length}, and truncation='drop'",
    "cut": "the prompt leaves no room for a response within max_length={max_length}",
}


def check_vocabulary(
    ids: Sequence[int], num_embeddings: int | None, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Refuse, with a PreferenceFormatError, token ids that the model cannot embed."""
    largest = max(ids, default=0)
    if num_embeddings is not None and largest >= num_embeddings:
        raise PreferenceFormatError(
            f"{where}: expected token ids below {num_embeddings}, the model's number of embeddings, got {largest}; "
            f"processing_class has {len(tokenizer)} tokens: give the tokenizer of this model, or enlarge the model "
            "(resize_token_embeddings)"
        )


def prepare_dataset(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: HeadConfig,
    name: str,
    carried: Sequence[str] = (),
    num_embeddings: int | None = None,
) -> Dataset | IterableDataset:
    """``dataset`` with the columns `TOKEN_COLUMNS`, ready to collate: see `prepare_rows`.

    Raises PreferenceFormatError for a row that is no preference pair, or whose tokens are not below
    ``num_embeddings``.
    """
    function = PairTokenizer(tokenizer, name, args.max_length, args.truncation, num_embeddings)
    return prepare_rows(dataset, function, TOKEN_FEATURES, "pairs", args.dataset_num_proc, carried)


def prepare_rows(
    dataset: Any,
    function: Any,
    columns: Features,
    rows: str,
    num_proc: int | None,
    carried: Sequence[str] = (),
) -> Dataset | IterableDataset:
    """``dataset`` with ``columns``, by a `PairTokenizer` or what is like one; ``rows`` is what reports call them.

    Takes a `datasets.Dataset`, a streaming `datasets.IterableDataset` or any iterable of rows (which is read
    whole). Rows without a response token are dropped; a map-style dataset logs how many and why, and how many were
    cut. A dataset that already has ``columns`` keeps its tokens. ``carried``: columns about whole responses, kept
    where a dataset has all of them (a stream: where it says so).

    Raises what ``function`` raises, ValueError if no row is left or one with ``carried`` would be cut, TypeError
    for another kind of dataset.
    """
    name = function.name
    if not isinstance(dataset, (Dataset, IterableDataset)):
        if isinstance(dataset, (str, Mapping)) or not isinstance(dataset, Iterable):
            raise TypeError(
                f"{name}_dataset: expected a datasets.Dataset or an iterable of rows, got {type(dataset).__name__}"
            )
        dataset = Dataset.from_list([dict(row) for row in dataset])
    present = dataset.column_names
    is_prepared = present is not None and set(columns) <= set(present)
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{name}_dataset: expected at least one row, got an empty dataset")
    if is_prepared:
        return _usable(dataset, function, rows, num_proc)
    carried = tuple(carried) if set(carried) <= set(present or ()) else ()
    keeps = _Keeps(name, carried, function.max_length)
    if isinstance(dataset, IterableDataset):
        # A stream need not know its columns before it runs, so the unwanted ones go last. It knows those whose
        # types it is told, by which it is seen to be prepared.
        features = Features({**columns, **{column: Value("float64") for column in carried}})
        tokens = dataset.map(function, with_indices=True).filter(keeps)
        return tokens.select_columns(list(features)).cast(features)
    tokens = dataset.map(
        function,
        with_indices=True,
        remove_columns=[column for column in present if column not in carried],
        num_proc=num_proc,
        desc=f"Tokenising the {name} {rows}",
    )
    kept = tokens.filter(keeps, num_proc=num_proc, desc=f"Filtering the {name} {rows}")
    report(Counter(tokens["verdict"]), sum(kept["is_cut"]), function, rows)
    return kept.remove_columns(["verdict", "is_cut"])


@dataclass(frozen=True)
class _Keeps:
    """Whether the verdict of a row lets it stay."""

    name: str
    carried: tuple[str, ...]
    max_length: int | None

    def __call__(self, row: Mapping[str, Any]) -> bool:
        is_kept = row["verdict"] in ("", "shifted")
        for column in self.carried if is_kept else ():
            if not isinstance(row[column], (int, float)):
                raise ValueError(
                    f"{self.name}_dataset: expected a number in {column!r} of every row, got {row[column]!r}; "
                    "remove the column to have it computed"
                )
        if is_kept and row["is_cut"] and self.carried:
            raise ValueError(
                f"{self.name}_dataset: expected rows with {self.carried}, which tell of whole responses, to fit "
                f"max_length={self.max_length}, got a longer one; raise max_length, take truncation='drop', or "
                "remove these columns to have them computed"
            )
        return is_kept


def _is_usable(function: Any, row: Mapping[str, Any], index: int) -> bool:
    return bool(function.measure(row, index)["is_usable"])


def _usable(dataset: Any, function: Any, rows: str, num_proc: int | None) -> Any:
    """A prepared ``dataset`` without the rows that hold nothing to train on; what is longer than others is told."""
    if isinstance(dataset, IterableDataset):
        return dataset.filter(partial(_is_usable, function), with_indices=True)
    name, total = function.name, len(dataset)
    told = dataset.map(
        function.measure,
        with_indices=True,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc=f"Checking the {name} {rows}",
    )
    usable = [i for i, is_usable in enumerate(told["is_usable"]) if is_usable]
    if not usable:
        raise ValueError(f"{name}_dataset: none of its {total} {rows} has a response token to train on")
    num_long = sum(length > (function.max_length or length) for length in told["length"])
    if num_long:
        logger.warning(
            f"{name} dataset: {num_long} of {total} {rows} are longer than max_length={function.max_length} and "
            "stay so: they came tokenised"
        )
    if len(usable) == total:
        return dataset
    logger.warning(f"{name} dataset: dropped {total - len(usable)} of {total} {rows}: no response token")
    return dataset.select(usable)


def report(verdicts: Counter[str], num_cut: int, function: Any, rows: str) -> None:
    """Log what was dropped and what was cut, of how many and why. Raises ValueError where nothing is left."""
    name, max_length = function.name, function.max_length
    total = sum(verdicts.values())
    dropped = {
        reason.format(max_length=max_length): verdicts[key] for key, reason in _REASONS.items() if verdicts[key]
    }
    detail = "; ".join(f"{count} because {reason}" for reason, count in dropped.items())
    num_dropped = sum(dropped.values())
    if num_dropped == total:
        raise ValueError(f"{name}_dataset: none of its {total} {rows} can be used: {detail}")
    if dropped:
        logger.warning(f"{name} dataset: dropped {num_dropped} of {total} {rows}: {detail}")
    if num_cut:
        logger.warning(
            f"{name} dataset: cut {num_cut} of {total} {rows} to max_length={max_length}: "
            f"{RULES[function.truncation]} (truncation={function.truncation!r})"
        )
    if verdicts["shifted"]:
        logger.warning(
            f"{name} dataset: in {verdicts['shifted']} of {total} {rows} the prompt's tokens change when a "
            "response follows them; the response then begins at the first token that differs"
        )


@dataclass(frozen=True)
class PreferenceCollator:
    """Rows of `TOKEN_COLUMNS` to one batch of 2P sequences: the P chosen ones, then the P rejected ones."""

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    has_layout: bool = True
    """Whether batches hold their `TokenLayout` too. Processes that cut up each other's batches cannot cut that."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask``, ``labels``: (2P, T) int64, padded on the right; and ``layout``.

        ``labels`` repeats the ids of the response and is -100 on the prompt and the padding. ``layout`` is made
        here, where the labels are on the host, so that the loss need not wait for the device.
        """
        sequences = []
        for kind in ("chosen", "rejected"):
            for row in rows:
                ids, prompt_length = row[f"{kind}_ids"], row[f"{kind}_prompt_length"]
                sequences.append((ids, [IGNORE_INDEX] * prompt_length + list(ids[prompt_length:])))
        return pad_batch(sequences, self.pad_token_id, self.pad_to_multiple_of, has_layout=self.has_layout)


def pad_batch(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    pad_token_id: int,
    pad_to_multiple_of: int | None,
    *,
    has_layout: bool,
) -> dict[str, Any]:
    """(ids, labels) of S sequences to (S, T) tensors on the host, padded on the right, and their layout."""
    length = max(len(ids) for ids, _ in sequences)
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(sequences), length), pad_token_id, dtype=torch.long, device="cpu")
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for n, (ids, targets) in enumerate(sequences):
        input_ids[n, : len(ids)] = torch.as_tensor(ids, dtype=torch.long, device="cpu")
        attention_mask[n, : len(ids)] = 1
        labels[n, : len(ids)] = torch.as_tensor(targets, dtype=torch.long, device="cpu")
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {**batch, "layout": slime_fused.token_layout(labels, shift=True)} if has_layout else batch
