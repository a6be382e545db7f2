"""Wheels of the peers, whole or in pieces, from several folders over several runs.

    python -m bench.gpu_run.wheels split big.whl --bytes 40000000 --out pieces
    python -m bench.gpu_run.wheels install           # as `bench/gpu.sh` does, with WHEELS and ENV

A machine may take less in one transfer than a wheel is long. `split` writes big.whl.1of3, big.whl.2of3, ...;
`install` collects wheels and pieces of all WHEELS folders in ENV/wheels, where they stay for the next run, joins
what is complete, and installs each wheel by itself: one for another Python must not keep the others out.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu_run.settings import read_settings

_PIECE = re.compile(r"(?P<wheel>.+\.whl)\.(?P<number>\d+)of(?P<count>\d+)")


def split(wheel: Path, size: int, out: Path) -> list[Path]:
    """Write the pieces of a wheel, each of at most ``size`` bytes."""
    out.mkdir(parents=True, exist_ok=True)
    data = wheel.read_bytes()
    count = -(-len(data) // size)
    pieces = []
    for i in range(count):
        piece = out / f"{wheel.name}.{i + 1}of{count}"
        piece.write_bytes(data[i * size : (i + 1) * size])
        pieces.append(piece)
    return pieces


def collect(folders: Sequence[Path], store: Path) -> None:
    """Copy wheels and pieces into the store, and join the wheels of which every piece is there."""
    store.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        if not folder.is_dir():
            print(f"WHEELS: {folder} is not a folder")
            continue
        for path in sorted(folder.iterdir()):
            if path.suffix == ".whl" or _PIECE.fullmatch(path.name):
                shutil.copyfile(path, store / path.name)
    pieces: dict[tuple[str, int], dict[int, Path]] = {}
    for path in store.iterdir():
        match = _PIECE.fullmatch(path.name)
        if match:
            key = (match["wheel"], int(match["count"]))
            pieces.setdefault(key, {})[int(match["number"])] = path
    for (name, count), found in sorted(pieces.items()):
        missing = [number for number in range(1, count + 1) if number not in found]
        if missing:
            print(f"{name}: waits for pieces {', '.join(map(str, missing))} of {count}")
            continue
        with (store / f"{name}.partial").open("wb") as whole:
            for number in range(1, count + 1):
                whole.write(found[number].read_bytes())
        (store / f"{name}.partial").replace(store / name)
        for path in found.values():
            path.unlink()


def install(store: Path, python: str) -> int:
    """Install every wheel of the store that was not installed yet; how many could not be."""
    record = store / "installed.json"
    try:
        installed = json.loads(record.read_text())
    except (OSError, ValueError):
        installed = {}
    failed = 0
    for wheel in sorted(store.glob("*.whl")):
        if installed.get(wheel.name) == wheel.stat().st_size:
            print(f"{wheel.name}: installed already")
            continue
        command = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", str(wheel)]
        if subprocess.run(command).returncode:
            print(f"{wheel.name}: could not be installed")
            failed += 1
            continue
        print(f"{wheel.name}: installed")
        installed[wheel.name] = wheel.stat().st_size
        record.write_text(json.dumps(installed) + "\n")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Split a wheel, or install what is there; the exit code says whether one could not be installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    splitting = commands.add_parser("split")
    splitting.add_argument("wheel", type=Path)
    splitting.add_argument("--bytes", type=int, default=40_000_000)
    splitting.add_argument("--out", type=Path, required=True)
    commands.add_parser("install")
    args = parser.parse_args(argv)
    if args.command == "split":
        for piece in split(args.wheel, args.bytes, args.out):
            print(piece)
        return 0
    settings = read_settings()
    store = settings.env / "wheels"
    collect(settings.wheels, store)
    return int(install(store, settings.env_python) > 0)


if __name__ == "__main__":
    sys.exit(main())
