"""Large buffers on the CPU: how their memory comes from the system.

A fresh buffer costs one page fault per 4 KiB: for the logits and dW of 2048 rows x 32000 columns x 1024 hidden in
bfloat16 that is a tenth of the matrix products' time. In pages of 2 MiB it is a hundredth, so that keeping
buffers from one call to the next is not worth the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slime_fused.backends.native import _C

HUGE_PAGE_LEAST_BYTES = 32 << 20
"""The largest size that glibc's malloc may serve from a heap: above it a buffer is a mapping of its own, and the
advice ends with it."""


def new_buffer(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor on the device of ``like``, in large pages where it is large and on the CPU."""
    buffer = like.new_empty(tuple(shape), dtype=dtype)
    size = buffer.numel() * buffer.element_size()
    if size > HUGE_PAGE_LEAST_BYTES and buffer.device.type == "cpu" and _C is not None:
        _C.cpu.advise_huge_pages(buffer.data_ptr(), size)
    return buffer
