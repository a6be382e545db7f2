"""The native extension module, and the checks under which a tensor may become an address for it.

Shared by the CPU and the CUDA backend, whose kernels take the same arguments.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # slime_fused::DType

_C: Any
try:
    _C, IMPORT_ERROR = import_module("slime_fused._C"), ""
except ImportError as error:
    _C, IMPORT_ERROR = None, str(error)


def matrix(name: str, tensor: Tensor, dtype: torch.dtype | None = None, shape: torch.Size | None = None) -> int:
    """Check a (M, V) tensor with contiguous columns and return its row stride in elements."""
    if tensor.dim() != 2 or (shape is not None and tensor.shape != shape):
        expected = "(M, V)" if shape is None else tuple(shape)
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype and (dtype is not None or tensor.dtype not in DTYPE_CODES):
        raise TypeError(f"{name}: expected dtype {dtype or sorted(map(str, DTYPE_CODES))}, got {tensor.dtype}")
    rows, cols = tensor.shape
    if cols > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}: expected contiguous columns (stride(1) == 1), got strides {tensor.stride()}")
    return tensor.stride(0) if rows > 1 else cols


def residual_matrix(out: Tensor, logits: Tensor) -> int:
    """As `matrix`, for the residual of ``logits``: of their dtype, or of 16 bits where they are float32."""
    is_narrower = logits.dtype == torch.float32 and out.dtype in (torch.bfloat16, torch.float16)
    return matrix("out", out, out.dtype if is_narrower else logits.dtype, logits.shape)


def vector(name: str, tensor: Tensor | None, size: int, dtype: torch.dtype) -> int:
    """Check a contiguous (size,) tensor and return its address; 0 for None."""
    if tensor is None:
        return 0
    if tensor.shape != (size,):
        raise ValueError(f"{name}: expected shape ({size},), got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if size > 1 and tensor.stride(0) != 1:
        raise ValueError(f"{name}: expected a contiguous tensor, got stride {tensor.stride(0)}")
    return tensor.data_ptr()


def segments_of(cu_seqlens: Tensor, values: Tensor) -> int:
    """Check the offsets (S + 1,) int32 and the dtype of the values they cut; return S."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens: expected shape (S + 1,), got {tuple(cu_seqlens.shape)}")
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"values: expected float32 or float64, got {values.dtype}")
    return cu_seqlens.numel() - 1
