"""Large scratch buffers on the CPU (the logits of a chunk, a float32 dW), kept from one call to the next.

A fresh buffer costs one page fault per 4 KiB: for the logits of 2048 rows x 32000 columns in bfloat16 50 ms, where
the three matrix products (D = 1024) take 900 ms on one core. Kept ones cost nothing, and have large pages. GPUs
have PyTorch's caching allocator; here nothing changes for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from slime_fused.backends.native import _C

LEAST_BYTES = 32 << 20
"""The largest size that glibc's malloc may serve from a heap, which it keeps itself. What is larger is a mapping of
its own, which comes and goes with the buffer."""


def new_scratch(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor on the device of ``like`` that no caller of the package gets to see.

    Its memory goes to the cache when the last tensor that views it dies, whenever and however that happens, and to
    nobody before.
    """
    dtype = dtype or like.dtype
    size = prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or _C is None or not LEAST_BYTES < size <= _C.cpu.cache_limit():
        return like.new_empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(_C.cpu.Scratch(size), dtype=dtype).view(tuple(shape))


def empty_cache() -> None:
    """Give the memory that is kept for the next CPU call back to the system.

    Buffers in use, also those of losses whose ``backward`` is still to come, are not touched. Of CUDA memory
    PyTorch's allocator takes care: ``torch.cuda.empty_cache``.
    """
    if _C is not None:
        _C.cpu.empty_cache()


def set_cache_limit(max_bytes: int) -> int:
    """Bound the memory that is kept between CPU calls, 256 MiB at first; 0 keeps none.

    Args:
        max_bytes: the most bytes of idle buffers, of all threads together. What is above is given back at once.

    Returns:
        The bound until now, for a caller who wants to set it back.

    Raises:
        TypeError: ``max_bytes`` is not an int.
        ValueError: it is negative.
    """
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise TypeError(f"max_bytes: expected an int, got {max_bytes!r}")
    if max_bytes < 0:
        raise ValueError(f"max_bytes: expected at least 0, got {max_bytes}")
    if _C is None:
        return 0
    before = int(_C.cpu.cache_limit())
    _C.cpu.set_cache_limit(min(max_bytes, 2**63 - 1))
    return before


def cached_bytes() -> int:
    """Bytes that are kept for the next CPU call now."""
    return 0 if _C is None else int(_C.cpu.cached_bytes())
