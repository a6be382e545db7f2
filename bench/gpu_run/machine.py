"""`python -m bench.gpu_run.machine`: what the run happens on. Versions come from metadata: nothing is imported."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from importlib import metadata

from bench.clocks import read_clocks
from bench.gpu_run.settings import ROOT

DISTRIBUTIONS = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "pybind11",
    "cmake",
    "ninja",
    "liger-kernel",
    "cut-cross-entropy",
    "trl",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "unsloth-zoo",
)


def main() -> int:
    """Print it."""
    print(time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
    print("python", platform.python_version(), sys.executable)
    for name in DISTRIBUTIONS:
        try:
            print(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            print(name, "not installed")
    print("clocks", read_clocks())
    for command in (["git", "rev-parse", "HEAD"], ["nvcc", "--version"], ["nvidia-smi"]):
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
            print(f"$ {' '.join(command)}\n{done.stdout.strip()}")
        except (OSError, subprocess.SubprocessError) as error:
            print(f"$ {' '.join(command)}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
