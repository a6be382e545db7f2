"""What a run leaves behind: rows, the machine they were taken on, and one JSON file."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.clocks import read_clocks
from bench.gpu_run.build import digest
from bench.gpu_run.settings import ROOT
from bench.peers import peer_versions

RESULTS = Path(__file__).parent / "results"
OK, UNSUPPORTED, FAILED = "ok", "unsupported", "failed"
# Out of time, which says nothing about the contestant.
NOT_FINISHED = "not finished"
NOT_FINISHED_CODE = 3
"""The exit code of a command that left something out for want of time and found nothing wrong."""


@dataclass(frozen=True)
class Row:
    """One contestant on one case. Times in milliseconds, sizes in bytes, errors relative to float64."""

    case: str
    contestant: str
    objective: str
    status: str
    reason: str = ""
    note: str = ""
    median_ms: float | None = None
    spread: float | None = None
    samples_ms: tuple[float, ...] = ()
    products_ms: float | None = None
    peak_bytes: int | None = None
    error_loss: float | None = None
    error_d_hidden: float | None = None
    error_d_weight: float | None = None
    ratios: tuple[float, ...] = ()
    """Per round: the median of its samples over that of the bare products' samples in the same round."""
    ran: dict[str, Any] = field(default_factory=dict)
    """This package's rows: the backends whose kernels ran, the plan, and `build_info()`."""
    warning: str = ""
    """Why the row is not what its name says: it ran on another backend."""

    @property
    def over_products(self) -> float | None:
        """Time over the time of the bare matrix products of the same run: the median over the rounds."""
        if self.ratios:
            return statistics.median(self.ratios)
        if self.median_ms is None or not self.products_ms:
            return None
        return self.median_ms / self.products_ms

    @property
    def ratio_range(self) -> tuple[float, float] | None:
        """The lowest and the highest ratio of a round; None with fewer than two."""
        return (min(self.ratios), max(self.ratios)) if len(self.ratios) > 1 else None


@dataclass(frozen=True)
class Run:
    """One result file: the cases are stored whole, so that old files outlive changes of the code."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    cases: dict[str, dict[str, Any]]
    rows: tuple[Row, ...]

    def case(self, name: str) -> Case:
        """A case as it was when the run was taken."""
        return Case(**self.cases[name])

    def row(self, case: str, contestant: str) -> Row | None:
        """The row of one contestant on one case, or None."""
        found = [row for row in self.rows if row.case == case and row.contestant == contestant]
        return found[0] if found else None


def slug(text: str) -> str:
    """A folder name: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _command_output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The hardware and software behind the numbers."""
    machine: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        # A copy of the tree without its history can be told which commit it is.
        "commit": os.environ.get("BENCH_COMMIT")
        or _command_output("git", "-C", str(ROOT), "rev-parse", "HEAD")
        or "unknown",
        # And a changed tree, which has the same commit, is told apart by what it runs.
        "sources": digest([ROOT / name for name in ("csrc", "slime_fused", "triton_kernels")]),
        "modified": bool(_command_output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _module_version("triton"),
        "peers": peer_versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "l2": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": read_clocks(),
        }
    return machine


def _module_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine_slug(machine: dict[str, Any]) -> str:
    """The folder of a machine's results."""
    return slug(machine.get("gpu") or f"{machine['cpu']}-{machine['cores']}-cores")


def write_run(
    path: Path, machine: dict[str, Any], settings: dict[str, Any], cases: Iterable[Case], rows: Sequence[Row]
) -> None:
    """Write (or rewrite) a result file; called after every batch of rows, so that a cut run keeps what it has."""
    payload = {
        "machine": machine,
        "settings": settings,
        "cases": {case.name: asdict(case) for case in cases},
        "rows": [asdict(row) for row in rows],
    }
    write_json(path, payload)


def write_json(path: Path, payload: dict[str, Any]) -> None:
    """Write (or rewrite) a JSON file so that no reader ever finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(payload, indent=1) + "\n")
    partial.replace(path)


def row_from(record: dict[str, Any]) -> Row:
    """A row from its JSON object."""
    lists = {name: tuple(record.get(name, ())) for name in ("samples_ms", "ratios")}
    return Row(**{**record, **lists})


def read_run(path: Path) -> Run:
    """Read a result file."""
    payload = json.loads(path.read_text())
    rows = tuple(row_from(record) for record in payload["rows"])
    return Run(payload["machine"], payload["settings"], payload["cases"], rows)
