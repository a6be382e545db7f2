"""The row kernels' machine code for Hopper does not grow: instructions per element, fences, widths of stores.

``softmax_residual`` moves 4 bytes per 16-bit element. At 3 TB/s an H100 has about 40 issue slots for that long, in
which the instructions of both visits must fit with room to spare. No GPU is needed: nvcc compiles, nvdisasm lists.
Counts are of the shortest path, so that compilers that differ a little pass.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import sass
from tests.test_cuda_build import SOURCES, nvcc

pytestmark = pytest.mark.slow

TILE = 4  # vectors of a lane, csrc/cuda/row_slice.cuh
VECTOR = 8  # 16-bit elements


@dataclass(frozen=True)
class Cost:
    """Instructions of one thread for one row of a cluster of several blocks."""

    staging: sass.Way
    first_visit: sass.Way
    second_visit: sass.Way
    once: int  # what does not depend on the number of tiles

    def per_element(self, cols: int, cluster: int, threads: int) -> float:
        """Over all threads; the staging of a thread's first tile is in ``once``."""
        tile = self.staging.instructions + self.first_visit.instructions + self.second_visit.instructions
        block_vectors = -(-cols // (VECTOR * cluster))
        tiles = -(-block_vectors // (32 * TILE))
        block = 32 * tiles * tile + threads * (self.once - self.staging.instructions)
        return cluster * block / cols


def compiled(source: str, folder: Path) -> dict[str, sass.Kernel]:
    compiler = nvcc()
    if compiler is None:
        pytest.skip("nvcc is not on PATH and not under CUDA_HOME: the CUDA kernels cannot be compiled here")
    if sass.nvdisasm() is None:
        pytest.skip("nvdisasm is not on PATH, not under CUDA_HOME and not in an installed Triton")
    cubin = folder / f"{source}.cubin"
    command = [compiler, "-std=c++20", "-O3", "-cubin", "-arch=sm_90", str(SOURCES / source)]
    subprocess.run([*command, "-o", str(cubin)], check=True, capture_output=True)
    return sass.kernels(cubin)


@pytest.fixture(scope="module")
def row_kernels(tmp_path_factory) -> dict[str, sass.Kernel]:
    return compiled("softmax_residual.cu", tmp_path_factory.mktemp("sass"))


@pytest.fixture(scope="module")
def stats_kernels(tmp_path_factory) -> dict[str, sass.Kernel]:
    return compiled("logits_stats.cu", tmp_path_factory.mktemp("sass"))


def main_kernel(kernels: dict[str, sass.Kernel], dtype: str, residual: str = "") -> sass.Kernel:
    """That of a plain head whose rows wait in shared memory, by its mangled name; ``residual``: another dtype."""
    out = residual or ("f" if dtype == "f" else "")  # a repeated type is mangled as a back reference
    (kernel,) = [k for name, k in kernels.items() if f"kernelI{dtype}LNS0_8HeadModeE0ELb0E{out}" in name]
    return kernel


def cost_of(kernel: sass.Kernel) -> Cost:
    blocks = range(len(kernel.blocks))
    loops = {n: way for n in blocks if (way := kernel.loop(n)) is not None}

    def has(way: sass.Way, opcode: str) -> bool:
        return any(kernel.blocks[n].count(opcode) for n in way.blocks)

    def only(opcode: str, least: int, **ways: bool) -> int:
        (found,) = [
            n
            for n, way in loops.items()
            if kernel.blocks[n].count(opcode) >= least
            and all(has(way, other) == wanted for other, wanted in ways.items())
        ]
        return found

    staging = only("LDGSTS", TILE)
    first = only("MUFU", TILE * VECTOR, LDS=True, STG=False)
    second = only("MUFU", TILE * VECTOR, LDS=True, STG=True)
    (exchange,) = [n for n in blocks if kernel.blocks[n].count("STAS")]
    ends = [
        way
        for n in blocks
        if kernel.blocks[n].count("EXIT")
        and (way := kernel.path(0, staging, first, exchange, second, n)) is not None
    ]
    whole = len(kernel.blocks[0].code) + min(way.instructions for way in ends)
    visits = [loops[n] for n in (staging, first, second)]
    return Cost(*visits, once=whole - sum(way.instructions for way in visits))


@pytest.mark.parametrize("dtype", ["13__nv_bfloat16", "6__half"])
def test_instructions_per_element(row_kernels, dtype):
    """CUDA 13.0: 25, 171 and 169 for a tile of 32 elements a lane, and 282 once."""
    cost = cost_of(main_kernel(row_kernels, dtype))
    assert cost.staging.instructions <= 28
    assert cost.first_visit.instructions <= 178
    assert cost.second_visit.instructions <= 176
    assert cost.once <= 300
    # The chosen plans (tests/test_cuda_emulated.py): 13.7, 13.7, 13.9 and 13.4 with CUDA 13.0.
    for cols, cluster, threads in ((32_000, 1, 256), (128_256, 4, 256), (151_936, 4, 320), (262_144, 8, 256)):
        assert cost.per_element(cols, cluster, threads) <= 14.5


@pytest.mark.parametrize(
    ("dtype", "residual", "width"),
    [
        ("13__nv_bfloat16", "", ".128"),
        ("6__half", "", ".128"),
        ("f", "", ".128"),
        ("f", "13__nv_bfloat16", ".64"),
        ("f", "6__half", ".64"),
    ],
)
def test_stores_of_the_second_visit_are_as_wide_as_a_vector(row_kernels, dtype, residual, width):
    """A compiler that merges them with the unaligned path makes four stores of each, without a word."""
    kernel = main_kernel(row_kernels, dtype, residual)
    visits = [
        way
        for n in range(len(kernel.blocks))
        if kernel.blocks[n].count("STG") >= TILE and (way := kernel.loop(n)) is not None
        if sum(kernel.blocks[k].count("MUFU") for k in way.blocks) >= 16
    ]
    assert visits
    for visit in visits:
        stores = [line for n in visit.blocks for line in kernel.blocks[n].code if "STG." in line]
        assert len(stores) == 2 * TILE  # with the evict-first hint, or without it
        assert all(width in line for line in stores), stores


def test_no_row_kernel_fences(row_kernels):
    """Of all dtypes, heads and stages: a fence waits for every load and store that a thread has under way."""
    fences = {name: [line for line in kernel.code if "MEMBAR" in line] for name, kernel in row_kernels.items()}
    assert sum("softmax_residual_kernel" in name for name in fences) == 12 + 6  # 6: float32 logits, 16-bit residual
    assert not any(fences.values()), fences


def instructions_of_two_vectors(kernels: dict[str, sass.Kernel], name: str, dtype: str, *, stores: bool) -> int:
    """The shortest way round a loop with an exponential for each of 2 * VECTOR elements, any head, no bias."""
    (kernel,) = [k for mangled, k in kernels.items() if f"{name}I{dtype}LNS0_8HeadModeE3E" in mangled]
    ways = [way for n in range(len(kernel.blocks)) if (way := kernel.loop(n)) is not None]

    def count(way: sass.Way, opcode: str) -> int:
        return sum(kernel.blocks[n].count(opcode) for n in way.blocks)

    return min(
        way.instructions
        for way in ways
        if count(way, "MUFU.EX2") >= 2 * VECTOR and (count(way, "STG") == 2 if stores else not count(way, "STG"))
    )


@pytest.mark.parametrize("dtype", ["13__nv_bfloat16", "6__half"])
def test_instructions_of_moments_and_entropy(stats_kernels, dtype):
    """CUDA 13.0: 235 (bfloat16) for two vectors of a lane with all statistics, 289 for the residual with entropy.

    An H100 at 3 TB/s has 20 issue slots for an element that is read, 40 for one that is read and written: 320 and
    640 for two vectors.
    """
    moments = instructions_of_two_vectors(stats_kernels, "logits_stats_kernel", dtype, stores=False)
    entropy = instructions_of_two_vectors(stats_kernels, "residual_from_stats_kernel", dtype, stores=True)
    assert moments <= 245
    assert entropy <= 302


def test_no_statistics_kernel_fences(stats_kernels):
    """Of moments and entropy there is one kernel a dtype, whatever the head."""
    fences = {name: [line for line in kernel.code if "MEMBAR" in line] for name, kernel in stats_kernels.items()}
    assert sum("logits_stats_kernel" in name for name in fences) == 12 + 3
    assert sum("residual_from_stats_kernel" in name for name in fences) == 15 + 5
    assert not any(fences.values()), fences


def test_paths_are_the_shortest_through_their_stops():
    listing = """
        /*0000*/ MOV R0, R1 ;
.L_x_0:
        /*0010*/ @P0 BRA `(.L_x_1) ;
        /*0020*/ FADD R1, R1, R2 ;
        /*0030*/ FADD R1, R1, R2 ;
.L_x_1:
        /*0040*/ @!P1 STG.E.128 [R2], R4 ;
        /*0050*/ @P2 BRA `(.L_x_0) ;
        /*0060*/ EXIT ;
""".splitlines()
    kernel = sass.Kernel(listing)
    assert [len(block.code) for block in kernel.blocks][:5] == [1, 1, 2, 2, 1]
    assert kernel.loop(3) == sass.Way((1, 3), 3)
    assert kernel.path(0, 2, 4) == sass.Way((1, 2, 3, 4), 6)
    assert kernel.loop(4) is None
    assert kernel.blocks[3].count("STG") == 1
    assert kernel.blocks[2].count("FADD") == 2
