"""The CPU backend: the kernels of ``csrc/cpu``.

They work on float32, bfloat16, float16 and float64 with float32 (float64) accumulation, use as many threads as
PyTorch is set to, and give the same bits for any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .native import _C, DTYPE_CODES, IMPORT_ERROR, NativeBackend


class CpuBackend(NativeBackend):
    """Kernels for CPU tensors; the methods are those of :class:`slime_fused.backends.base.Backend`."""

    name = "cpu"
    dtype_codes = DTYPE_CODES

    def available(self) -> tuple[bool, str]:
        """Whether the native module was built; if not, why not and how to build it."""
        if _C is not None:
            return True, ""
        return False, (
            f"the native module slime_fused._C cannot be imported ({IMPORT_ERROR}); build it with `pip install .` "
            "or, in a source tree, `cmake -S . -B build -G Ninja && cmake --build build`"
        )

    def supports(self, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        """Whether tensors of this device and dtype can be passed; if not, what can."""
        if device.type != "cpu":
            return False, f"the cpu backend takes cpu tensors, got {device}"
        if dtype not in DTYPE_CODES:
            return False, f"the cpu backend takes float32, bfloat16, float16 and float64, got {dtype}"
        return True, ""

    def _launch(self, kernel: str, tensors: Sequence[Tensor | None], arguments: dict[str, Any]) -> None:
        if _C is None:
            raise RuntimeError(self.available()[1])
        getattr(_C.cpu, kernel)(**arguments, num_threads=torch.get_num_threads())

    def _sizes(self, segments: int, values: Tensor) -> dict[str, int]:
        return {"segments": segments, "tokens": values.numel(), "dtype": DTYPE_CODES[values.dtype]}

    _pair_sizes = _sizes

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """See :meth:`Backend.scale_`."""
        if factor.item() != 1.0:
            # Not rounded to the dtype of the tensor: a loss scaler's 65536 would be infinite in float16.
            tensor.mul_(factor)
