"""Builds the CUDA kernels for the CPU.

A build lives in ``build/cuda_emulator/<mode>``; ninja rebuilds what changed, so a second call costs a second. By
hand, from the repository's root::

    python tests/cuda_emulator/build.py _C_emulated plain
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

Mode = Literal["plain", "asan", "tsan"]
Target = Literal["planted_bugs", "_C_emulated"]

SOURCE = Path(__file__).resolve().parent
REPOSITORY = SOURCE.parent.parent
BUILD_JOBS = 2
REPORT_STATUS = 66  # the exit status of a process in which a sanitizer found something


class EmulatorUnavailable(RuntimeError):
    """The emulator cannot be built here; the message says what is missing."""


def toolkit_include() -> Path:
    """The CUDA toolkit's header folder: the emulator needs its vector, bf16 and fp16 types, not its compiler.

    Raises:
        EmulatorUnavailable: no toolkit in CUDA_HOME, CUDA_PATH, beside nvcc on PATH, or in /usr/local/cuda.
    """
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        roots.append(str(Path(nvcc).resolve().parent.parent))
    roots.append("/usr/local/cuda")
    for root in roots:
        if root and (Path(root) / "include" / "cuda_bf16.h").is_file():
            return Path(root) / "include"
    raise EmulatorUnavailable("no CUDA toolkit headers (cuda_bf16.h): set CUDA_HOME or put nvcc on PATH")


def _tool_path() -> str:
    """PATH with this interpreter's own folder first: that is where a virtual environment keeps cmake and ninja."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _run(command: list[str]) -> None:
    environment = {**os.environ, "PATH": _tool_path()}
    # Compilers quote in UTF-8 whatever locale something else in this process has set.
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}")


def build(target: Target, mode: Mode = "plain") -> Path:
    """Build ``target`` in ``mode`` and return the path of the program or module.

    Raises:
        EmulatorUnavailable: a tool or the toolkit's headers are missing.
        RuntimeError: the build failed; the message holds the compiler's output.
    """
    include = toolkit_include()
    for tool in ("g++", "cmake", "ninja"):
        if shutil.which(tool, path=_tool_path()) is None:
            raise EmulatorUnavailable(f"{tool} is not on PATH")
    folder = REPOSITORY / "build" / "cuda_emulator" / mode
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run(
            [
                *("cmake", "-S", str(SOURCE), "-B", str(folder), "-G", "Ninja"),
                "-DCMAKE_CXX_COMPILER=g++",
                f"-DCUDA_EMULATOR_MODE={mode}",
                f"-DCUDA_TOOLKIT_INCLUDE={include}",
                f"-DPython_EXECUTABLE={sys.executable}",
            ]
        )
        _run(["cmake", "--build", str(folder), "--target", target, "-j", str(BUILD_JOBS)])
    (product,) = [path for path in folder.glob(f"{target}*") if path.suffix in ("", ".so") and path.is_file()]
    return product


def sanitizer_environment(mode: Mode) -> dict[str, str]:
    """Variables under which a Python process can load an instrumented module.

    The sanitizer's runtime must be loaded before the interpreter allocates anything. Leaks are not looked for: the
    interpreter itself never frees everything.
    """
    libraries = {"plain": [], "asan": ["libasan.so", "libubsan.so"], "tsan": ["libtsan.so"]}[mode]
    paths = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in libraries
    ]
    return {
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={REPORT_STATUS}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={REPORT_STATUS}",
        "TSAN_OPTIONS": f"exitcode={REPORT_STATUS}",
    }


if __name__ == "__main__":
    print(build(*sys.argv[1:]))  # type: ignore[arg-type]
