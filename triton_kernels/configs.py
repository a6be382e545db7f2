"""Every tile size of the Triton kernels, one frozen value per use, with the measurement behind it.

Until a row says otherwise, a configuration here is the best guess of its reasoning; `tests/test_triton_aot.py`
proves that each compiles for every listed target without spilling and within that target's shared memory.
`bench/micro/triton_kernels.py` measures the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# A label outside the vocabulary must trap. Triton drops assertions unless `debug` is set, and `debug` alone also
# turns on an overflow check of every integer operation.
CHECKED_LAUNCH: dict[str, Any] = {"debug": True, "sanitize_overflow": False}


@dataclass(frozen=True)
class RowConfig:
    """How many columns one program takes per step, and with how many warps."""

    block: int
    num_warps: int

    def block_for(self, cols: int) -> int:
        """The block for rows of `cols` columns: no wider than the next power of two, so that short rows fit."""
        return min(self.block, max(128, 1 << (cols - 1).bit_length()))


# Two visits per row: wide blocks, because each costs one reduction over the program. 16 elements a lane.
# H100: not yet measured.
ROW_CONFIG = RowConfig(block=8192, num_warps=16)

# One visit, no reduction: enough bytes in flight at any occupancy. H100: not yet measured.
STREAM_CONFIG = RowConfig(block=4096, num_warps=8)

# Segments are responses of tens to thousands of tokens; four bytes each, so these kernels are all latency.
SEGMENT_CONFIG = RowConfig(block=1024, num_warps=4)

# `scale_` strides over its tensor with a bounded grid: a factor of 1 then costs a thousand loads of one number.
SCALE_CONFIG = RowConfig(block=4096, num_warps=8)
SCALE_MAX_PROGRAMS = 1024
