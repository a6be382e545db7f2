"""Rows from files: JSON lines, JSON and CSV, each also gzipped, and Parquet. What is wrong is named by its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from slime_fused.model.reference import REFERENCE_COLUMNS
from slime_fused.trainer.formats import PreferenceFormatError

Columns = Callable[[Mapping[str, Any], str], dict[str, Any]]
"""Brings a row to its common form: (row, how errors name it) -> columns. Raises PreferenceFormatError."""

KINDS = (".jsonl", ".json", ".csv", ".parquet")


def read_file(path: str | Path, columns: Columns) -> Dataset:
    """The rows of a ``.jsonl``, ``.json``, ``.csv`` (each also with ``.gz``) or ``.parquet`` file.

    Every row of a text file goes through ``columns`` as it is read; those of a Parquet file when they are
    tokenised. Text is UTF-8, with or without a byte order mark.

    Raises FileNotFoundError; ValueError for another kind of file; PreferenceFormatError that names the line for
    bytes that are no UTF-8, text that is no JSON, a key given twice, rows that ``columns`` refuses, rows of another
    kind than the first, and an empty file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"dataset: no such file: {path}")
    kind = kind_of(path)
    if kind == ".parquet":
        try:
            return Dataset.from_parquet(str(path))
        # pyarrow's errors and those of `datasets` around them have no base in common but this one.
        except Exception as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise PreferenceFormatError(f"{path}: not readable as Parquet: {reason}") from error
    if kind not in KINDS:
        raise ValueError(f"dataset: expected a {', '.join(KINDS)} file or a folder, got {path}")
    readers = {".json": (_json_rows, "row"), ".jsonl": (_json_lines, "line"), ".csv": (_csv_rows, "line")}
    rows_of, unit = readers[kind]
    try:
        return _checked_rows(rows_of(path), path, unit, columns)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise PreferenceFormatError(f"{path}: not a whole gzip file: {error}") from None


def kind_of(path: Path) -> str:
    """The suffix that says how to read a file: that before ``.gz``."""
    inner = path.with_suffix("").suffix
    return inner if path.suffix == ".gz" and inner in KINDS[:-1] else path.suffix


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _decode(raw: bytes, path: Path, first_line: int = 1) -> str:
    """``raw``, which begins at that line of the file, as text."""
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line = first_line + before.count(b"\n")
        byte = len(before) - (before.rfind(b"\n") + 1)
        raise PreferenceFormatError(
            f"line {line} of {path}: byte {byte + 1} (0x{error.object[error.start]:02x}) is not UTF-8; "
            "save the file in that encoding"
        ) from None


class _Object(dict[str, Any]):
    """A JSON object that remembers a key that it was given twice."""

    repeated: str | None = None


def _object(items: list[tuple[str, Any]]) -> _Object:
    result = _Object(items)
    if len(result) < len(items):
        names = [name for name, _ in items]
        result.repeated = next(name for i, name in enumerate(names) if name in names[:i])
    return result


def _repeated_key(value: Any) -> str | None:
    """A key that some object within ``value`` holds twice; JSON itself would keep the last without a word."""
    if isinstance(value, _Object) and value.repeated is not None:
        return value.repeated
    children: Iterable[Any] = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    )
    return next((key for key in map(_repeated_key, children) if key is not None), None)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with _open(path) as lines:
        for number, raw in enumerate(lines, start=1):
            line = _decode(raw, path, number)
            if line.strip():
                try:
                    yield number, json.loads(line, object_pairs_hook=_object)
                except json.JSONDecodeError as error:
                    raise PreferenceFormatError(f"line {number} of {path}: not valid JSON: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with _open(path) as file:
        text = _decode(file.read(), path)
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise PreferenceFormatError(
            f"{path}: not valid JSON: {error}; one object per line goes into .jsonl"
        ) from None
    if not isinstance(rows, list):
        got = f"an object with the keys {list(rows)!r:.80}" if isinstance(rows, dict) else f"{rows!r:.80}"
        raise PreferenceFormatError(f"{path}: expected a list of rows, got {got}")
    yield from enumerate(rows)


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with _open(path) as file:
        text = _decode(file.read(), path)
    # The library's own limit of 128 KiB a cell is less than a long conversation.
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = list(reader.fieldnames or ())
        repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if repeated is not None:
            raise PreferenceFormatError(f"line 1 of {path}: the column {repeated!r} is there twice")
        for row in reader:
            if None in row:
                cells = len(names) + len(row[None])
                raise PreferenceFormatError(
                    f"line {reader.line_num} of {path}: expected {len(names)} cells, got {cells}"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise PreferenceFormatError(f"line {reader.reader.line_num} of {path}: not valid CSV: {error}") from None


def _checked_rows(rows: Iterable[tuple[int, Any]], path: Path, unit: str, columns: Columns) -> Dataset:
    kept: list[dict[str, Any]] = []
    first = ""
    for number, row in rows:
        where = f"{unit} {number} of {path}"
        if not isinstance(row, dict):
            raise PreferenceFormatError(f"{where}: expected an object with named columns, got {row!r:.60}")
        repeated = _repeated_key(row)
        if repeated is not None:
            raise PreferenceFormatError(f"{where}: the key {repeated!r} is there twice")
        values = columns(row, where)
        kind = _kind_of_row(values)
        first = first or kind
        if kind != first:
            raise PreferenceFormatError(
                f"{where}: holds {kind}, but the first row holds {first}; a file holds one kind"
            )
        kept.append(values)
    if not kept:
        raise PreferenceFormatError(f"{path}: expected at least one row, got an empty file")
    names = list(dict.fromkeys(name for row in kept for name in row))
    return Dataset.from_dict({name: [row.get(name) for row in kept] for name in names})


def _kind_of_row(values: Mapping[str, Any]) -> str:
    """ "texts", "messages" or "token ids": of what the response is."""
    others = ("tools", "chat_template_kwargs", *REFERENCE_COLUMNS)
    value = [value for name, value in values.items() if name not in others][-1]
    if isinstance(value, str):
        return "texts"
    return "messages" if value and isinstance(value[0], Mapping) else "token ids"
