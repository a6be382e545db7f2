"""The CUDA backend: the kernels of ``csrc/cuda``.

Launches go to PyTorch's current stream of the tensors' device and return without waiting. The kernels work on
float32, bfloat16 and float16 logits with float32 accumulation and no atomics: the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .base import LogitsBlock, RowStats, TokenLoss
from .native import _C, DTYPE_CODES, NativeBackend

_DTYPE_CODES = {dtype: code for dtype, code in DTYPE_CODES.items() if dtype != torch.float64}


def _native() -> ModuleType:
    """The CUDA half of the extension module; RuntimeError with the reason where it cannot run."""
    if _C is None or not hasattr(_C, "cuda"):
        raise RuntimeError(CudaBackend().available()[1])
    return _C.cuda  # type: ignore[no-any-return]


@cache
def _row_plan(cols: int, elem_bytes: int, device: int) -> Any:
    """The launch plan of ``softmax_residual`` (csrc/cuda/row_plan.h) for rows of ``cols`` elements.

    For what the kernel was compiled for: a build for older GPUs runs on newer ones without what these added.
    """
    major, minor = torch.cuda.get_device_capability(device)
    with _on(device):
        compiled = _native().row_kernel_capability(device)
    return _native().choose_row_plan(cols, elem_bytes, min(10 * major + minor, compiled))


def _placed(*tensors: Tensor | None) -> tuple[int, int]:
    """The one CUDA device of all tensors and the address of its current stream; ValueError if they differ."""
    present = [tensor.device for tensor in tensors if tensor is not None]
    if present[0].type != "cuda" or any(device != present[0] for device in present):
        raise ValueError(f"tensors: expected one CUDA device for all, got {sorted({str(d) for d in present})}")
    index = present[0].index
    return index, torch.cuda.current_stream(index).cuda_stream


def _on(device: int) -> AbstractContextManager[Any]:
    """Make ``device`` current, as the launches of the extension do for their own copy of the CUDA runtime."""
    return nullcontext() if torch.cuda.current_device() == device else torch.cuda.device(device)


def _require_float32(values: Tensor) -> None:
    if values.dtype != torch.float32:
        raise TypeError(f"values: expected dtype {torch.float32}, got {values.dtype}")


class CudaBackend(NativeBackend):
    """Kernels for CUDA tensors; the methods are those of :class:`slime_fused.backends.base.Backend`."""

    name = "cuda"
    dtype_codes = _DTYPE_CODES

    def available(self) -> tuple[bool, str]:
        """Whether the CUDA kernels were built and a GPU is seen; if not, which, and how to get it."""
        if _C is None:
            return False, (
                "the native module slime_fused._C is not built; build it where nvcc is found: "
                "`SLIME_FUSED_CUDA=ON pip install .`"
            )
        if not hasattr(_C, "cuda"):
            return False, (
                "slime_fused._C was built without CUDA kernels; rebuild it with the CUDA toolkit installed: "
                "`SLIME_FUSED_CUDA=ON pip install .`"
            )
        if not torch.cuda.is_available():
            error = _C.cuda.runtime_info()["error"]
            why = f"the CUDA runtime says: {error}" if error else "this PyTorch was built without CUDA"
            return (
                False,
                f"PyTorch sees no GPU ({why}); it needs one, its driver and a CUDA build of PyTorch",
            )
        return True, ""

    def supports(self, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        """Whether tensors of this device and dtype can be passed; if not, what can."""
        if device.type != "cuda":
            return False, f"the cuda backend takes CUDA tensors, got {device}"
        if dtype not in _DTYPE_CODES:
            return False, f"the cuda backend takes float32, bfloat16 and float16, got {dtype}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            return False, f"the cuda backend takes GPUs of compute capability 8.0 or later, got {name}"
        return True, ""

    def _launch(self, kernel: str, tensors: Sequence[Tensor | None], arguments: dict[str, Any]) -> None:
        device, stream = _placed(*tensors)
        with _on(device):
            getattr(_native(), kernel)(**arguments, device=device, stream=stream)

    def softmax_residual(
        self, block: LogitsBlock, out: Tensor, token_loss: TokenLoss, stats: RowStats, *, plan: Any = None
    ) -> None:
        """See :meth:`Backend.softmax_residual`. ``plan``: a ``_C.cuda.RowPlan`` instead of the tuned one."""
        if plan is None:
            device, _ = _placed(block.logits)
            plan = _row_plan(block.logits.shape[1], block.logits.element_size(), device)
        super().softmax_residual(block, out, token_loss, stats, plan=plan)

    def _sizes(self, segments: int, values: Tensor) -> dict[str, int]:
        _require_float32(values)
        return {"segments": segments}

    def _pair_sizes(self, segments: int, values: Tensor) -> dict[str, int]:
        _require_float32(values)
        return {"pairs": segments // 2}

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """See :meth:`Backend.scale_`."""
        if tensor.dtype not in _DTYPE_CODES:
            raise TypeError(f"tensor: expected float32, bfloat16 or float16, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"tensor: expected a contiguous tensor, got strides {tensor.stride()}")
        if factor.numel() != 1 or factor.dtype != torch.float32:
            raise ValueError(f"factor: expected one float32 number, got {tuple(factor.shape)} of {factor.dtype}")
        arguments = {
            "data": tensor.data_ptr(),
            "n": tensor.numel(),
            "dtype": _DTYPE_CODES[tensor.dtype],
            "factor": factor.data_ptr(),
        }
        self._launch("scale_", [tensor, factor], arguments)
