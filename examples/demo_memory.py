"""What a step needs in memory, measured so that nothing which ran before it changes the answer."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.profiler import ProfilerActivity, profile

import slime_fused


class TensorMemory:
    """The memory a block adds: the most bytes of tensors alive at once inside it, beyond those alive at its start.

    By PyTorch's own allocator, which sees every tensor, those inside operators too. Pages that the C library keeps
    after an earlier evaluation, and that a step then uses again, make the resident size of a process grow by less
    than the step needs; they do not matter here. Only the profiler's thread and those of autograd are seen. Scratch
    that slime_fused would keep between calls comes from PyTorch's allocator meanwhile, so that it is counted too.
    """

    peak: int

    def __enter__(self) -> TensorMemory:
        self._limit = slime_fused.set_cache_limit(0)
        self._profile: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)
        slime_fused.set_cache_limit(self._limit)
        events = self._profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        held = self.peak = 0
        for _, change in changes:
            held += change
            self.peak = max(self.peak, held)
        del self._profile


def reset_resident_peak() -> None:
    """Give back what the C library keeps for reuse, and begin the resident peak anew (where the system can)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int:
    """Most resident bytes of this process since `reset_resident_peak`; since its start where it cannot be reset."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
