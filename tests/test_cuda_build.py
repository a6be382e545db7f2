"""The CUDA kernels compile for every architecture of a release, and none of them touches local memory.

A spilled register is a read and a write of device memory per thread that no profile of the source shows, so the
compiler's own report (`-Xptxas -v`) is the test. It needs nvcc and no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import cuda12

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
KERNELS = {
    "softmax_residual.cu": {"softmax_residual_kernel"},
    "logits_stats.cu": {"logits_stats_kernel", "residual_from_stats_kernel"},
    "segment_sum.cu": {"segment_sum_kernel", "segment_sum_backward_kernel"},
    "slime_terms.cu": {"slime_terms_kernel"},
    "scale.cu": {"scale_kernel"},
}
# printf takes its three 64-bit arguments through the stack, on the path that reports a label out of range.
PRINTF_BYTES = 24
REPORTING_KERNELS = {"softmax_residual_kernel", "residual_from_stats_kernel"}
# 64 registers let 1024 threads share a multiprocessor, which the row kernels need to hide the latency of memory.
MOST_REGISTERS = 64


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel on one architecture."""

    kernel: str  # mangled
    arch: str
    stack: int  # bytes
    spilled: int  # bytes of spill stores and loads
    registers: int


def parse_usage(log: str) -> list[Usage]:
    """Every kernel of a `-Xptxas -v` log; properties of device functions that are not kernels are skipped."""
    usages = []
    name = arch = ""
    stack = spilled = 0
    is_kernel = False
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            name, arch = match.groups()
        elif match := re.search(r"Function properties for (\w+)", line):
            is_kernel = match[1] == name
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            if is_kernel:
                stack, spilled = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            usages.append(Usage(name, arch, stack, spilled, int(match[1])))
    return usages


def nvcc() -> str | None:
    """The compiler on PATH or in the folder that CUDA_HOME names."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def check_usage(source: str, usages: list[Usage], architectures: set[str]) -> None:
    """Every kernel was compiled for every architecture, in registers alone."""
    for kernel in KERNELS[source]:
        found = [usage for usage in usages if re.search(rf"\d{kernel}", usage.kernel)]
        assert {usage.arch for usage in found} == architectures, f"{kernel} was not compiled for all of them"
        allowed = PRINTF_BYTES if kernel in REPORTING_KERNELS else 0
        wasteful = [u for u in found if u.spilled > 0 or u.stack > allowed or u.registers > MOST_REGISTERS]
        assert not wasteful, f"local memory or too many registers: {wasteful}"


def test_the_report_is_read_right() -> None:
    # Two kernels and a called function, whose own stack must not be charged to the kernel before it.
    log = """
ptxas info    : Compiling entry function '_Z1av' for 'sm_90'
ptxas info    : Function properties for _Z1av
    40 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 40 bytes cumulative stack size
ptxas info    : Function properties for _Z6helperv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z1bv' for 'sm_120'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers
"""
    assert parse_usage(log) == [Usage("_Z1av", "90", 40, 28, 40), Usage("_Z1bv", "120", 0, 0, 7)]


def test_every_source_is_covered() -> None:
    assert {path.name for path in SOURCES.glob("*.cu")} == set(KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(KERNELS))
def test_no_kernel_spills_on_any_architecture(source: str, tmp_path: Path) -> None:
    compiler = nvcc()
    if compiler is None:
        pytest.skip("nvcc is not on PATH and not under CUDA_HOME: the CUDA kernels cannot be compiled here")
    command = [compiler, "-std=c++20", "-O3", "--threads=2", "-Xptxas", "-v", "-c", str(SOURCES / source)]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    built = subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True)
    log = built.stdout + built.stderr
    assert built.returncode == 0, log[-4000:]
    assert "warning" not in log, log

    check_usage(source, parse_usage(log), set(ARCHITECTURES))


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(KERNELS))
def test_no_kernel_spills_with_cuda_12(source: str, tmp_path: Path) -> None:
    """CUDA 12's own optimiser and assembler, without the host side; 12.4, which ends at sm_90."""
    if cuda12.missing():
        pytest.skip(f"the extra cuda12 is not installed: {cuda12.missing()}")
    targets = set(ARCHITECTURES) & cuda12.architectures()
    assert "90" in targets
    for arch in sorted(targets):
        log = cuda12.assemble(cuda12.compile_ptx(SOURCES / source, arch), arch, tmp_path)
        check_usage(source, parse_usage(log), {arch})
