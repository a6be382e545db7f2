"""The backends over the native extension module: tensors become addresses for its kernels, nothing more.

The kernels of ``csrc/cpu`` and ``csrc/cuda`` take the same arguments, which are checked and gathered here; what
differs, where a launch goes and what sizes it is told, is `NativeBackend`'s three hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import (
    NO_FACTORS,
    LogitsBlock,
    Moments,
    RowFactors,
    RowStats,
    SlimePairs,
    SlimeWeights,
    TokenLoss,
    VocabStats,
    acc_dtype,
    losses_of,
)

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


class NativeBackend:
    """The methods of :class:`slime_fused.backends.base.Backend` that both halves of the module share."""

    dtype_codes: ClassVar[dict[torch.dtype, int]]
    """Those of the logits that it takes."""

    def _launch(self, kernel: str, tensors: Sequence[Tensor | None], arguments: dict[str, Any]) -> None:
        """Call the native function on the device of ``tensors``, which are all that it touches."""
        raise NotImplementedError

    def _sizes(self, segments: int, values: Tensor) -> dict[str, int]:
        """What a segment kernel is told of its sizes and dtype."""
        raise NotImplementedError

    def _pair_sizes(self, segments: int, values: Tensor) -> dict[str, int]:
        """As `_sizes`, for ``slime_terms``."""
        raise NotImplementedError

    def softmax_residual(
        self, block: LogitsBlock, out: Tensor, token_loss: TokenLoss, stats: RowStats, *, plan: Any = None
    ) -> None:
        """See :meth:`Backend.softmax_residual`. ``plan``: of the launch, for kernels that take one."""
        logits, loss = block.logits, losses_of(stats)
        rows = logits.shape[0]
        arguments = {
            **self._block_arguments(block),
            **self._residual_arguments(block, out, token_loss, stats),
            "loss": vector("loss", loss, rows, stats.row_max.dtype),
        }
        if plan is not None:
            arguments["plan"] = plan
        if rows:
            touched = [logits, out, block.labels, block.bias, stats.row_max, stats.row_sum, stats.logp, loss]
            self._launch("softmax_residual", touched, arguments)

    def logits_stats(self, block: LogitsBlock, stats: VocabStats, *, merge: bool = False) -> None:
        """See :meth:`Backend.logits_stats`."""
        logits, moments = block.logits, stats.moments
        rows, acc = logits.shape[0], acc_dtype(logits.dtype)
        touched = [logits, block.labels, block.bias]
        touched += [stats.row_max, stats.row_sum, stats.label_logit, stats.logit_sum]
        arguments = {
            **self._block_arguments(block),
            "col_offset": block.col_offset,
            "row_max": vector("row_max", stats.row_max, rows, acc),
            "row_sum": vector("row_sum", stats.row_sum, rows, acc),
            "label_logit": vector("label_logit", stats.label_logit, rows, acc),
            "logit_sum": vector("logit_sum", stats.logit_sum, rows, acc),
            "merge": merge,
        }
        if moments is not None:
            arguments |= _moment_arguments(moments, rows, acc)
            touched += [moments.centred_sum, moments.square_sum, moments.max_before]
        if rows:
            self._launch("logits_stats", touched, arguments)

    def residual_from_stats(
        self,
        block: LogitsBlock,
        out: Tensor,
        token_loss: TokenLoss,
        stats: RowStats,
        factors: RowFactors = NO_FACTORS,
    ) -> None:
        """See :meth:`Backend.residual_from_stats`."""
        logits = block.logits
        rows, acc = logits.shape[0], acc_dtype(logits.dtype)
        arguments = {
            **self._block_arguments(block),
            **self._residual_arguments(block, out, token_loss, stats),
            "col_offset": block.col_offset,
            "vocab_size": block.whole_vocab_size,
            "row_scale": vector("row_scale", factors.scale, rows, acc),
        }
        if factors.entropy is not None:
            arguments |= _entropy_arguments(factors, rows, acc)
        if rows:
            touched = [logits, out, block.labels, block.bias, stats.row_max, stats.row_sum, stats.logp]
            touched += [factors.scale, factors.entropy, factors.entropy_scale]
            self._launch("residual_from_stats", touched, arguments)

    def segment_sum(self, values: Tensor, cu_seqlens: Tensor, out: Tensor, *, mean: bool) -> None:
        """See :meth:`Backend.segment_sum`."""
        segments = segments_of(cu_seqlens, values)
        arguments = {
            "values": vector("values", values, values.numel(), values.dtype),
            "cu_seqlens": vector("cu_seqlens", cu_seqlens, segments + 1, torch.int32),
            "out": vector("out", out, segments, values.dtype),
            "mean": mean,
            **self._sizes(segments, values),
        }
        self._launch("segment_sum", [values, cu_seqlens, out], arguments)

    def segment_sum_backward(self, d_out: Tensor, cu_seqlens: Tensor, d_values: Tensor, *, mean: bool) -> None:
        """See :meth:`Backend.segment_sum_backward`."""
        segments = segments_of(cu_seqlens, d_values)
        arguments = {
            "d_out": vector("d_out", d_out, segments, d_values.dtype),
            "cu_seqlens": vector("cu_seqlens", cu_seqlens, segments + 1, torch.int32),
            "d_values": vector("d_values", d_values, d_values.numel(), d_values.dtype),
            "mean": mean,
            **self._sizes(segments, d_values),
        }
        self._launch("segment_sum_backward", [d_out, cu_seqlens, d_values], arguments)

    def slime_terms(
        self, logp: Tensor, cu_seqlens: Tensor, weights: SlimeWeights, out: SlimePairs, d_logp: Tensor | None
    ) -> None:
        """See :meth:`Backend.slime_terms`."""
        segments, tokens, acc = segments_of(cu_seqlens, logp), logp.numel(), logp.dtype
        outputs = vars(out)
        arguments = {
            "logp": vector("logp", logp, tokens, acc),
            "cu_seqlens": vector("cu_seqlens", cu_seqlens, segments + 1, torch.int32),
            "d_logp": vector("d_logp", d_logp, tokens, acc),
            **{name: vector(name, tensor, segments // 2, acc) for name, tensor in outputs.items()},
            **vars(weights),
            **self._pair_sizes(segments, logp),
        }
        self._launch("slime_terms", [logp, cu_seqlens, d_logp, *outputs.values()], arguments)

    def _block_arguments(self, block: LogitsBlock) -> dict[str, Any]:
        """A block of logits, as all three row kernels take it."""
        logits, transform = block.logits, block.transform
        stride = matrix("logits", logits)
        rows, cols = logits.shape
        return {
            "logits": logits.data_ptr(),
            "rows": rows,
            "cols": cols,
            "logits_stride": stride,
            "dtype": self.dtype_codes[logits.dtype],
            "labels": vector("labels", block.labels, rows, torch.int64),
            "bias": vector("bias", block.bias, cols, logits.dtype),
            "scale": transform.scale,
            "softcap": transform.softcap or 0.0,
            "temperature": transform.temperature,
        }

    def _residual_arguments(
        self, block: LogitsBlock, out: Tensor, token_loss: TokenLoss, stats: RowStats
    ) -> dict[str, Any]:
        """What the two kernels that write a residual share beyond the block."""
        logits = block.logits
        rows, acc = logits.shape[0], acc_dtype(logits.dtype)
        return {
            "out": out.data_ptr(),
            "out_stride": residual_matrix(out, logits),
            "out_dtype": self.dtype_codes[out.dtype],
            "label_smoothing": token_loss.label_smoothing,
            "z_loss": token_loss.z_loss,
            "row_max": vector("row_max", stats.row_max, rows, acc),
            "row_sum": vector("row_sum", stats.row_sum, rows, acc),
            "logp": vector("logp", stats.logp, rows, acc),
        }


def _moment_arguments(moments: Moments, rows: int, acc: torch.dtype) -> dict[str, int]:
    return {name: vector(name, tensor, rows, acc) for name, tensor in vars(moments).items()}


def _entropy_arguments(factors: RowFactors, rows: int, acc: torch.dtype) -> dict[str, int]:
    return {
        "entropy": vector("entropy", factors.entropy, rows, acc),
        "entropy_scale": vector("entropy_scale", factors.entropy_scale, rows, acc),
    }
