"""Preference pairs from files: JSON lines, JSON, Parquet, or a folder written by `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from slime_fused.trainer.formats import EXPECTED, PreferenceFormatError, parse_pair

_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")


def read_pairs(path: str | Path) -> Dataset:
    """The pairs in a ``.jsonl``, ``.json`` or ``.parquet`` file or a `Dataset.save_to_disk` folder.

    Every row of a JSON file is checked as it is read. Raises FileNotFoundError, and PreferenceFormatError that
    names the line for text that is no JSON, rows that are no pair, and an empty file.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"dataset: no such file or folder: {path}")
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".parquet":
        return Dataset.from_parquet(str(path))
    if path.suffix == ".json":
        return _checked_rows(_json_rows(path), path, "row")
    if path.suffix == ".jsonl":
        return _checked_rows(_json_lines(path), path, "line")
    raise ValueError(f"dataset: expected a .jsonl, .json or .parquet file or a datasets folder, got {path}")


def _read_folder(path: Path) -> Dataset:
    try:
        loaded = load_from_disk(str(path))
    except (FileNotFoundError, OSError) as error:
        raise ValueError(f"dataset: {path} is no folder written by Dataset.save_to_disk: {error}") from error
    if not isinstance(loaded, Dataset):
        raise ValueError(f"dataset: {path} holds the splits {sorted(loaded)}; name one of its subfolders")
    return loaded


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise PreferenceFormatError(f"line {number} of {path}: not valid JSON: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise PreferenceFormatError(
            f"{path}: not valid JSON: {error}; one object per line goes into .jsonl"
        ) from None
    if not isinstance(rows, list):
        raise PreferenceFormatError(f"{path}: expected a list of pairs, got {type(rows).__name__}")
    yield from enumerate(rows)


def _checked_rows(rows: Iterable[tuple[int, Any]], path: Path, unit: str) -> Dataset:
    kept: list[dict[str, Any]] = []
    first_is_chat = False
    for number, row in rows:
        where = f"{unit} {number} of {path}"
        if not isinstance(row, dict):
            raise PreferenceFormatError(f"{where}: expected an object with {EXPECTED}; got {row!r:.60}")
        pair = parse_pair(row, where)
        if not kept:
            first_is_chat = pair.is_chat
        elif pair.is_chat != first_is_chat:
            kinds = ("texts", "messages")
            raise PreferenceFormatError(
                f"{where}: holds {kinds[pair.is_chat]}, but the first row holds {kinds[first_is_chat]}; "
                "a file holds one kind"
            )
        # Some rows may repeat the prompt as a text or leave it out; one column holds one type.
        kept.append(
            {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            | {name: row[name] for name in _COLUMNS[3:] if row.get(name)}
        )
    if not kept:
        raise PreferenceFormatError(f"{path}: expected at least one pair, got an empty file")
    columns = [name for name in _COLUMNS if any(name in row for row in kept)]
    return Dataset.from_dict({name: [row.get(name) for row in kept] for name in columns})
