"""What the environment variables of `bench/gpu.sh` say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("machine", "build", "tests", "bench", "micro", "end_to_end", "sweep", "sanitizer")
"""All steps; the environment and the wheels belong to every run."""


@dataclass(frozen=True)
class Settings:
    """One run."""

    out: Path
    archive: Path
    env: Path
    python: str = sys.executable
    """The interpreter that holds PyTorch; the environment is made on top of it."""
    steps: tuple[str, ...] = STEPS
    limit: float = 560.0
    """Seconds for everything."""
    cases: tuple[str, ...] = ()
    wheels: tuple[Path, ...] = ()
    prebuilt: Path | None = None
    cuda: bool = True
    device: str = "cuda"
    dry_run: bool = False

    @property
    def is_toy(self) -> bool:
        """Tiny problems and stand-in kernels on the CPU, to try the script itself."""
        return self.device == "cpu"

    @property
    def env_python(self) -> str:
        """The interpreter of the environment."""
        return str(self.env / "bin" / "python")


def ask_gpu(field: str) -> str:
    """One field of the first GPU from nvidia-smi, empty without one."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0].strip()


def slug(text: str) -> str:
    """A folder name: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def read_settings(variables: Mapping[str, str] = os.environ) -> Settings:
    """The settings of a run; ValueError names the variable that cannot be read."""
    device = variables.get("DEVICE") or "cuda"
    if device not in ("cuda", "cpu"):
        raise ValueError(f"DEVICE: expected cuda or cpu, got {device!r}")
    steps = tuple((variables.get("STEPS") or " ".join(STEPS)).split())
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        raise ValueError(f"STEPS: expected some of {' '.join(STEPS)}, got {' '.join(unknown)}")
    cuda = variables.get("CUDA") or ("OFF" if device == "cpu" else "ON")
    if cuda not in ("ON", "OFF"):
        raise ValueError(f"CUDA: expected ON or OFF, got {cuda!r}")
    try:
        limit = float(variables.get("LIMIT") or 560)
    except ValueError:
        raise ValueError(f"LIMIT: expected seconds, got {variables['LIMIT']!r}") from None
    # Toy numbers must not lie where results are committed.
    place = "build/gpu-toy" if device == "cpu" else f"bench/results/{slug(ask_gpu('name') or 'no-gpu')}"
    out = Path(variables.get("OUT") or ROOT / place).absolute()
    python = shutil.which(variables.get("PYTHON") or sys.executable) or sys.executable
    prebuilt = variables.get("PREBUILT")
    return Settings(
        out=out,
        archive=Path(variables.get("ARCHIVE") or out / "results.tar.gz").absolute(),
        env=Path(variables.get("ENV") or ROOT / "build" / "gpu-env").absolute(),
        python=os.path.abspath(python),
        steps=steps,
        limit=limit,
        cases=tuple((variables.get("CASES") or "").split()),
        wheels=tuple(Path(folder).absolute() for folder in (variables.get("WHEELS") or "").split(":") if folder),
        prebuilt=Path(prebuilt).absolute() if prebuilt else None,
        cuda=cuda == "ON",
        device=device,
        dry_run=variables.get("DRY_RUN") == "1",
    )
