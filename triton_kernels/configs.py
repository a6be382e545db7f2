"""Every tile size of the Triton kernels, one frozen value per use, with the measurement behind it.

Until a row says otherwise, a configuration here is the best guess of its reasoning; `tests/test_triton_aot.py`
proves that each compiles for every listed target without spilling and within that target's shared memory.
`bench/micro/sweep.py` measures the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

# A product fused with the addition after it rounds otherwise than the same product elsewhere (see `numerics`).
# Triton 3.10 makes this its default.
LAUNCH: dict[str, Any] = {"enable_fp_fusion": False}
# A label outside the vocabulary must trap. Triton drops assertions unless `debug` is set, and `debug` alone also
# turns on an overflow check of every integer operation.
CHECKED_LAUNCH: dict[str, Any] = {**LAUNCH, "debug": True, "sanitize_overflow": False}


@dataclass(frozen=True)
class RowConfig:
    """How many columns one program takes per step, and with how many warps."""

    block: int
    num_warps: int

    def block_for(self, cols: int) -> int:
        """The block for rows of `cols` columns: no wider than the next power of two, so that short rows fit."""
        return min(self.block, max(128, 1 << (cols - 1).bit_length()))


# (rows of at most this many bytes, configuration of the kernels with one program per row). Not yet measured; why:
# `softmax_residual` reads a row twice, and the second time it should come from L2. An H100 has 50 MiB of it for 132
# multiprocessors, 397 KB each. A program holds half its row on average, since the second visit lets go of what it
# reads. At 80 % of L2, programs per multiprocessor times the bytes of a row must then stay below 635 KB: four
# programs up to 155 KiB (V = 79360 in 16 bits), two up to 310 KiB (V = 158720), one beyond. More than one hides the
# others' starts, ends and reductions. Registers keep their number: 65536 / (threads x registers per thread).
# A step is 2 or 4 vectors of 16 bytes a thread: 32 KiB in flight per multiprocessor, and 18 KB cover 700 ns at
# 3.35 TB/s. Blocks are in 16-bit elements; float32 takes half as many, or 32 warps would spill.
ROW_CONFIGS: tuple[tuple[float, RowConfig], ...] = (
    (16 * 1024, RowConfig(block=4096, num_warps=4)),
    (155 * 1024, RowConfig(block=8192, num_warps=8)),
    (310 * 1024, RowConfig(block=8192, num_warps=16)),
    (float("inf"), RowConfig(block=16384, num_warps=32)),
)
# A program of an AMD GPU has at most 1024 threads, and a wave 64.
HIP_ROW_CONFIG = RowConfig(block=8192, num_warps=16)


def row_config(family: str, cols: int, itemsize: int) -> RowConfig:
    """The configuration of the kernels with one program per row, of `cols` elements of `itemsize` bytes."""
    config = next(config for most, config in ROW_CONFIGS if cols * itemsize <= most)
    if family == "hip":
        config = min(config, HIP_ROW_CONFIG, key=lambda c: c.num_warps)
    return replace(config, block=config.block * 2 // max(itemsize, 2))


# One visit, no reduction: enough bytes in flight at any occupancy. H100: not yet measured.
STREAM_CONFIG = RowConfig(block=4096, num_warps=8)

# Segments are responses of tens to thousands of tokens; four bytes each, so these kernels are all latency.
SEGMENT_CONFIG = RowConfig(block=1024, num_warps=4)

# `scale_` strides over its tensor with a bounded grid: a factor of 1 then costs a thousand loads of one number.
SCALE_CONFIG = RowConfig(block=4096, num_warps=8)
SCALE_MAX_PROGRAMS = 1024


@dataclass(frozen=True)
class LinearConfig:
    """One tile of the fused head product: (block_m rows) x (block_n columns), block_k deep per step."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    """Row tiles that sweep the vocabulary together, so that a tile of the weight is read from L2 by all of them."""
    num_warps: int
    num_stages: int
    uses_descriptors: bool = False
    """Load through the tensor memory accelerator (sm_90 and later)."""


LINEAR_CONFIGS: dict[tuple[str, int], LinearConfig] = {
    # (target family, bytes of an element). None of these was measured yet; the reasoning:
    # sm_90: the widest tile of two warpgroups' accumulators, 3 stages of 48 KiB. At the full rate a step takes 1024
    # clocks: 48 bytes a clock and multiprocessor from L2, whose port gives 64, all of which 128 x 128 would need.
    # A persistent program that prefetches the next tile during the epilogue would spill 540 bytes a thread, asking
    # Triton 3.9 for warp specialization there changes nothing, and programs of a cluster do not share their loads.
    ("sm90", 2): LinearConfig(128, 256, 64, 16, 8, 3, uses_descriptors=True),
    # sm_100: accumulators live in tensor memory; same tile, one stage more fits.
    ("sm100", 2): LinearConfig(128, 256, 64, 16, 8, 3, uses_descriptors=True),
    # sm_80: 255 registers hold 128 x 256 only just; 128 x 128 leaves room for the epilogue.
    ("sm80", 2): LinearConfig(128, 128, 32, 8, 8, 4),
    # 99 KiB of shared memory (sm_86, sm_89, sm_120 and anything not listed).
    ("small", 2): LinearConfig(128, 128, 32, 8, 8, 4),
    # 64 KiB of LDS, 64 lanes a wave.
    ("hip", 2): LinearConfig(128, 128, 32, 8, 8, 2),
    # float32 runs in full precision, on the vector units: small tiles.
    ("small", 4): LinearConfig(64, 64, 16, 8, 8, 2),
    ("hip", 4): LinearConfig(64, 64, 16, 8, 8, 2),
}

# Where `linear_stats` also writes `centred_sum`, `square_sum` and `max_before`, and the tile above would spill.
# None of these was measured yet either.
MOMENTS_CONFIGS: dict[tuple[str, int], LinearConfig] = {
    # 248 bytes of stack with 128 x 256 and every feature, none with that tile upright: as many bytes of operands a
    # step, half as many columns per row of a thread.
    ("sm90", 2): LinearConfig(256, 128, 64, 8, 8, 3, uses_descriptors=True),
    # 360 to 1280 bytes with 128 x 256, 112 to 944 with 256 x 128. A third more of the operands is read from L2.
    ("sm100", 2): LinearConfig(128, 128, 64, 16, 8, 4, uses_descriptors=True),
}


def target_family(backend: str, capability: int) -> str:
    """The row of `LINEAR_CONFIGS` for a target: `capability` is 10 * major + minor, ignored for "hip"."""
    if backend == "hip":
        return "hip"
    if capability in (80, 87):
        return "sm80"
    if capability // 10 == 9:
        return "sm90"
    return "sm100" if capability // 10 == 10 else "small"


def linear_config(
    family: str, itemsize: int, *, can_use_descriptors: bool, has_moments: bool = False
) -> LinearConfig:
    """The configuration of the fused head product for a target family and an element size (2 or 4 bytes).

    Operands that descriptors cannot address take a smaller tile: pointers to unaligned rows need registers that the
    accumulators of a 128 x 256 tile leave none of (400 bytes of spills per thread on sm_90).
    """
    config = LINEAR_CONFIGS.get((family, itemsize), LINEAR_CONFIGS["small", itemsize])
    if config.uses_descriptors and not can_use_descriptors:
        return LINEAR_CONFIGS["small", itemsize]
    return MOMENTS_CONFIGS.get((family, itemsize), config) if has_moments else config


def narrowest_config(family: str, itemsize: int) -> LinearConfig:
    """Of the configurations that operands of this size may get, the one with the most tiles of the vocabulary."""
    configs = (
        linear_config(family, itemsize, can_use_descriptors=can_use, has_moments=has_moments)
        for can_use in (False, True)
        for has_moments in (False, True)
    )
    return min(configs, key=lambda config: config.block_n)


# The merge reads two floats per row and vocabulary tile: a row of the partials per step is enough.
MERGE_ROWS = 64
MERGE_TILES = 32


# What a sweep on an H100 or H200 should time beside the shipped ones: 16-bit rows, aligned 16-bit operands. All
# compile for sm_90 without spilling. A kernel takes one as `config=`; the winners belong in the tables above, which
# are read at every launch.
ROW_CANDIDATES = tuple(
    RowConfig(block, num_warps)
    for block, num_warps in (
        (4096, 4), (8192, 4), (4096, 8), (8192, 8), (16384, 8), (8192, 16), (16384, 16), (8192, 32), (16384, 32),
    )
)  # fmt: skip
STREAM_CANDIDATES = tuple(
    RowConfig(block, num_warps) for block, num_warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (16384, 16))
)
LINEAR_CANDIDATES = tuple(
    replace(LINEAR_CONFIGS["sm90", 2], **change)
    for change in (
        {"group_m": 8},
        {"group_m": 32},
        {"num_stages": 4},
        {"num_stages": 4, "group_m": 32},
        {"block_k": 128, "num_stages": 2},
        {"block_m": 256, "block_n": 128},
        {"block_m": 256, "block_n": 128, "num_stages": 4},
        {"block_n": 128, "num_warps": 4},
        {"block_n": 128, "num_stages": 4},
        {"block_m": 64, "num_warps": 4},
    )
)
