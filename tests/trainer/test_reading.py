"""Files, folders and data sets of the hub to rows: the kinds that are read, and what bad ones are told."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from slime_fused.trainer import PreferenceFormatError, reading
from slime_fused.trainer.formats import pair_columns
from slime_fused.trainer.reading import load_rows, read_pairs, take_slice
from tests.tiny_models import make_pairs

PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("prompt", "chosen", "rejected"))
        writer.writeheader()
        writer.writerows(rows)


def test_every_kind_of_file_gives_the_same_pairs(tmp_path):
    rows = make_pairs(4)
    rows[1]["chosen"] = ' two\nlines, "quoted"'
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "pairs.jsonl").write_text(lines)
    (tmp_path / "bom.jsonl").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    (tmp_path / "bom.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    write_csv(tmp_path / "pairs.csv", rows)
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        file.write(lines)
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    write_csv(tmp_path / "files" / "train.csv", rows)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 10
    for path in paths:
        assert read_pairs(path).to_list() == rows, path.name


def test_a_reference_s_log_probs_are_read(tmp_path):
    sums = {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.0}
    for row in (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt_ids": [1], "chosen_ids": [3], "rejected_ids": [4]},
    ):
        (tmp_path / "pairs.jsonl").write_text(json.dumps({**row, **sums}) + "\n")
        assert read_pairs(tmp_path / "pairs.jsonl").to_list() == [{**row, **sums}]


def test_token_ids_as_trl_makes_them_are_read(tmp_path):
    row = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    assert read_pairs(tmp_path / "pairs.jsonl").to_list() == [row]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.jsonl", PAIR.encode() + '{"prompt": "é"}'.encode("latin-1"), r"line 2 of .*: byte 13 \(0xe9\)"),
        ("latin.json", b'[\n{"prompt": "\xff"}]', r"line 2 of .*: byte 13 \(0xff\) is not UTF-8"),
        ("latin.csv", b"prompt,chosen,rejected\na,b,c\na,\xe9,c\n", r"line 3 of .*: byte 3 \(0xe9\) is not UTF-8"),
        ("wide.jsonl", PAIR.encode("utf-16"), r"line 1 of .*: byte 1 \(0xff\) is not UTF-8"),
        ("twice.jsonl", (PAIR + '{"prompt": "a", "chosen": "b", "chosen": "x", "rejected": "c"}').encode(),
         "line 2 of .*: the key 'chosen' is there twice"),
        ("nested.json", b'[{"prompt": "a", "chosen": [{"role": "assistant", "content": "b", "content": "x"}], '
         b'"rejected": [{"role": "assistant", "content": "c"}]}]', "row 0 of .*: the key 'content' is there twice"),
        ("twice.csv", b"prompt,chosen,chosen\na,b,c\n", "line 1 of .*: the column 'chosen' is there twice"),
        ("long.csv", b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", "line 3 of .*: expected 3 cells, got 4"),
        ("short.csv", b"prompt,chosen,rejected\na,b\n", r"line 2 of .*got columns \['chosen', 'prompt'\]"),
        ("quote.csv", b'prompt,chosen,rejected\n"a"b,c,d\n', "line 2 of .*: not valid CSV"),
        ("cut.jsonl.gz", gzip.compress(PAIR.encode() * 99)[:40], "cut.jsonl.gz: not a whole gzip file"),
        ("plain.csv.gz", b"prompt,chosen,rejected\n", "plain.csv.gz: not a whole gzip file"),
        ("ids.jsonl", b'{"prompt_ids": [1], "chosen_ids": [2.5], "rejected_ids": [3]}', "'chosen_ids' must be"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PreferenceFormatError, match=message):
        read_pairs(tmp_path / name)


def test_a_folder_may_be_called_as_a_format_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "csv").mkdir()
    write_csv(tmp_path / "csv" / "train.csv", make_pairs(2))
    write_csv(tmp_path / "other.csv", make_pairs(3))
    assert read_pairs("csv").to_list() == make_pairs(2)


def test_splits_are_chosen_and_their_names_told(tmp_path):
    parts = {"train": make_pairs(3), "test": make_pairs(2, seed=1)}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(tmp_path / "saved")
    source = str(tmp_path / "saved")
    assert load_rows(source, pair_columns).to_list() == parts["train"]
    assert load_rows(source, pair_columns, split="test").to_list() == parts["test"]
    assert load_rows(source, pair_columns, preferred="test").to_list() == parts["test"]
    with pytest.raises(ValueError, match=r"dataset_split: expected one of the splits \['test', 'train'\] .* 'dev'"):
        load_rows(source, pair_columns, split="dev")
    (tmp_path / "pairs.jsonl").write_text(PAIR)
    with pytest.raises(ValueError, match="dataset_split: a file has none; got 'train'"):
        load_rows(str(tmp_path / "pairs.jsonl"), pair_columns, split="train")


def test_a_name_that_is_no_path_is_asked_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(*args):
        asked.append(args)
        if args[0] == "org/missing":
            raise ConnectionError("offline")
        return DatasetDict({"train": Dataset.from_list(make_pairs(2)), "test": Dataset.from_list(make_pairs(3))})

    monkeypatch.setattr(reading, "load_dataset", load_dataset)
    assert len(load_rows("org/name", pair_columns, config="small", split="test")) == 3
    assert asked == [("org/name", "small")]
    with pytest.raises(ValueError, match=r"cannot load 'org/missing' .* the hub's\): ConnectionError: offline"):
        load_rows("org/missing", pair_columns)
    for path in ("./name", "a/b/c", "name.jsonl", "/nowhere"):
        with pytest.raises(FileNotFoundError, match="dataset: no such file or folder"):
            load_rows(path, pair_columns)
    assert len(asked) == 2


@pytest.mark.parametrize("size", [7, 50, 101])
def test_slices_that_meet_hold_every_row_once(size):
    dataset = Dataset.from_dict({"n": list(range(size))})
    first, second = (list(take_slice(dataset, text, 0)["n"]) for text in ("0:66%", "66%:100%"))
    assert sorted(first + second) == list(range(size))
    assert first != sorted(first)
    # The split that the authors' script makes, whose "test" part is the one for preferences.
    parts = dataset.train_test_split(0.66, seed=0)
    assert sorted(parts["test"]["n"]) == sorted(first)
    assert sorted(parts["train"]["n"]) == sorted(second)
    assert list(take_slice(dataset, "2:5", 0)["n"]) == first[2:5]
    assert list(take_slice(dataset, ":", 0)["n"]) == first + second


@pytest.mark.parametrize("text", ["66%", "5:5", "a:b", "90:", "0.5:3", "-1:5"])
def test_unusable_slices_are_refused(text):
    with pytest.raises(ValueError, match="dataset_slice: expected START:STOP in rows or percent"):
        take_slice(Dataset.from_dict({"n": list(range(10))}), text, 0)
