"""Where rows come from: a file, a folder, or a data set of the hub; one split of it, and a part of that."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from slime_fused.trainer.files import KINDS, Columns, kind_of, read_file
from slime_fused.trainer.formats import pair_columns


def read_pairs(source: str | Path) -> Dataset:
    """The preference pairs of `load_rows`."""
    return load_rows(str(source), pair_columns)


def load_rows(
    source: str,
    columns: Columns,
    *,
    config: str | None = None,
    split: str | None = None,
    preferred: str = "train",
    option: str = "dataset",
) -> Dataset:
    """The rows of ``source``: a file (`read_file`), a folder, or the name of a data set of the hub.

    A folder is one that `datasets` has saved, or holds files that it can load. ``split`` names one of several
    splits; without it the only one is taken, or the one called ``preferred``. ``config`` is the configuration of a
    data set that has several. ``option`` is what errors call it all.

    Raises FileNotFoundError for a path that does not exist; ValueError for what cannot be loaded, an unknown split,
    and a split or configuration of a file.
    """
    path = Path(source).expanduser()
    if path.is_file() or (not path.is_dir() and _is_meant_as_path(source)):
        for name, value in (("split", split), ("config", config)):
            if value is not None:
                raise ValueError(f"{option}_{name}: a file has none; got {value!r} for {path}")
        if not path.is_file():
            raise FileNotFoundError(f"{option}: no such file or folder: {path}")
        return read_file(path, columns)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded: Any = load_from_disk(str(path))
        else:
            # In full: a folder called csv or json would be taken for the format of that name.
            loaded = load_dataset(str(path.resolve()) if path.is_dir() else source, config)
    # The libraries below raise errors of their own, of the network's and of many formats.
    except Exception as error:
        where = f"the folder {path}" if path.is_dir() else f"{source!r} (no file or folder here, so the hub's)"
        raise ValueError(f"{option}: cannot load {where}: {type(error).__name__}: {error}") from error
    return _split_of(loaded, split, preferred, f"{option}_split", source)


def _is_meant_as_path(source: str) -> bool:
    return source.startswith((".", "~", "/")) or source.count("/") > 1 or kind_of(Path(source)) in KINDS


def _split_of(loaded: Any, split: str | None, preferred: str, option: str, source: str) -> Dataset:
    if isinstance(loaded, Dataset):
        if split is not None:
            raise ValueError(f"{option}: {source} has no splits, got {split!r}")
        return loaded
    assert isinstance(loaded, DatasetDict)
    names = sorted(str(name) for name in loaded)
    if split is None and len(names) == 1:
        return loaded[names[0]]
    wanted = preferred if split is None else split
    if wanted not in names:
        raise ValueError(f"{option}: expected one of the splits {names} of {source}, got {split!r}")
    return loaded[wanted]


def take_slice(dataset: Dataset, text: str, seed: int, option: str = "dataset_slice") -> Dataset:
    """Rows ``START:STOP`` of ``dataset`` in the order that ``seed`` shuffles it to.

    Both ends are rows ("100:") or shares ("66%:100%", rounded up), and may be left out. Slices that meet hold
    every row once. Raises ValueError for another text, and for a slice without rows.
    """
    pattern = r"\s*(?:(\d+(?:\.\d+)?)(%?))?\s*"
    match = re.fullmatch(f"{pattern}:{pattern}", text)
    expected = f"{option}: expected START:STOP in rows or percent, such as 0:66%, got {text!r}"
    if match is None:
        raise ValueError(expected)
    size = len(dataset)
    ends = []
    for number, percent, missing in ((match[1], match[2], 0), (match[3], match[4], size)):
        if number is None:
            ends.append(missing)
        elif percent:
            ends.append(math.ceil(Fraction(number) * size / 100))
        elif "." in number:
            raise ValueError(f"{expected}; a row has no fraction")
        else:
            ends.append(int(number))
    start, stop = ends[0], min(ends[1], size)
    if stop <= start:
        raise ValueError(f"{expected}, of which {size} rows leave none")
    return dataset.shuffle(seed=seed).select(range(start, stop))
