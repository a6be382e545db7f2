"""The CUDA backend: tensors become device addresses for the kernels of ``csrc/cuda``, nothing more.

Launches go to PyTorch's current stream of the tensors' device and return without waiting. The kernels work on
float32, bfloat16 and float16 logits with float32 accumulation and no atomics: the same call gives the same bits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .base import HeadTransform, SlimeWeights, TokenLoss
from .native import _C, matrix, residual_matrix, segments_of, vector

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # slime_fused::DType


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


class CudaBackend:
    """Kernels for CUDA tensors; the methods are those of :class:`slime_fused.backends.base.Backend`."""

    name = "cuda"

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

    def softmax_residual(
        self,
        logits: Tensor,
        out: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadTransform,
        token_loss: TokenLoss,
        *,
        row_max: Tensor,
        row_sum: Tensor,
        logp: Tensor,
        loss: Tensor | None,
        plan: Any = None,
    ) -> None:
        """See :meth:`Backend.softmax_residual`. ``plan``: a ``_C.cuda.RowPlan`` instead of the tuned one."""
        rows, cols = logits.shape
        device, stream = _placed(logits, out, labels, bias, row_max, row_sum, logp, loss)
        if rows == 0:
            return
        with _on(device):
            _native().softmax_residual(
                logits=logits.data_ptr(),
                out=out.data_ptr(),
                rows=rows,
                cols=cols,
                logits_stride=matrix("logits", logits),
                out_stride=residual_matrix(out, logits),
                dtype=_DTYPE_CODES[logits.dtype],
                out_dtype=_DTYPE_CODES[out.dtype],
                labels=vector("labels", labels, rows, torch.int64),
                bias=vector("bias", bias, cols, logits.dtype),
                scale=head.scale,
                softcap=head.softcap or 0.0,
                label_smoothing=token_loss.label_smoothing,
                z_loss=token_loss.z_loss,
                row_max=vector("row_max", row_max, rows, torch.float32),
                row_sum=vector("row_sum", row_sum, rows, torch.float32),
                logp=vector("logp", logp, rows, torch.float32),
                loss=vector("loss", loss, rows, torch.float32),
                plan=_row_plan(cols, logits.element_size(), device) if plan is None else plan,
                device=device,
                stream=stream,
            )

    def logits_stats(
        self,
        logits: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadTransform,
        *,
        col_offset: int,
        row_max: Tensor,
        row_sum: Tensor,
        label_logit: Tensor,
        logit_sum: Tensor | None,
        merge: bool,
    ) -> None:
        """See :meth:`Backend.logits_stats`."""
        rows, cols = logits.shape
        device, stream = _placed(logits, labels, bias, row_max, row_sum, label_logit, logit_sum)
        if rows == 0:
            return
        with _on(device):
            _native().logits_stats(
                logits=logits.data_ptr(),
                rows=rows,
                cols=cols,
                logits_stride=matrix("logits", logits),
                col_offset=col_offset,
                dtype=_DTYPE_CODES[logits.dtype],
                labels=vector("labels", labels, rows, torch.int64),
                bias=vector("bias", bias, cols, logits.dtype),
                scale=head.scale,
                softcap=head.softcap or 0.0,
                row_max=vector("row_max", row_max, rows, torch.float32),
                row_sum=vector("row_sum", row_sum, rows, torch.float32),
                label_logit=vector("label_logit", label_logit, rows, torch.float32),
                logit_sum=vector("logit_sum", logit_sum, rows, torch.float32),
                merge=merge,
                device=device,
                stream=stream,
            )

    def residual_from_stats(
        self,
        logits: Tensor,
        out: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadTransform,
        token_loss: TokenLoss,
        *,
        col_offset: int,
        vocab_size: int,
        row_max: Tensor,
        row_sum: Tensor,
        logp: Tensor,
        row_scale: Tensor | None,
    ) -> None:
        """See :meth:`Backend.residual_from_stats`."""
        rows, cols = logits.shape
        device, stream = _placed(logits, out, labels, bias, row_max, row_sum, logp, row_scale)
        if rows == 0:
            return
        with _on(device):
            _native().residual_from_stats(
                logits=logits.data_ptr(),
                out=out.data_ptr(),
                rows=rows,
                cols=cols,
                logits_stride=matrix("logits", logits),
                out_stride=residual_matrix(out, logits),
                col_offset=col_offset,
                vocab_size=vocab_size,
                dtype=_DTYPE_CODES[logits.dtype],
                out_dtype=_DTYPE_CODES[out.dtype],
                labels=vector("labels", labels, rows, torch.int64),
                bias=vector("bias", bias, cols, logits.dtype),
                scale=head.scale,
                softcap=head.softcap or 0.0,
                label_smoothing=token_loss.label_smoothing,
                z_loss=token_loss.z_loss,
                row_max=vector("row_max", row_max, rows, torch.float32),
                row_sum=vector("row_sum", row_sum, rows, torch.float32),
                logp=vector("logp", logp, rows, torch.float32),
                row_scale=vector("row_scale", row_scale, rows, torch.float32),
                device=device,
                stream=stream,
            )

    def segment_sum(self, values: Tensor, cu_seqlens: Tensor, out: Tensor, *, mean: bool) -> None:
        """See :meth:`Backend.segment_sum`."""
        segments = segments_of(cu_seqlens, values)
        device, stream = _placed(values, cu_seqlens, out)
        with _on(device):
            _native().segment_sum(
                values=vector("values", values, values.numel(), torch.float32),
                cu_seqlens=vector("cu_seqlens", cu_seqlens, segments + 1, torch.int32),
                segments=segments,
                out=vector("out", out, segments, torch.float32),
                mean=mean,
                device=device,
                stream=stream,
            )

    def segment_sum_backward(self, d_out: Tensor, cu_seqlens: Tensor, d_values: Tensor, *, mean: bool) -> None:
        """See :meth:`Backend.segment_sum_backward`."""
        segments = segments_of(cu_seqlens, d_values)
        device, stream = _placed(d_out, cu_seqlens, d_values)
        with _on(device):
            _native().segment_sum_backward(
                d_out=vector("d_out", d_out, segments, torch.float32),
                cu_seqlens=vector("cu_seqlens", cu_seqlens, segments + 1, torch.int32),
                segments=segments,
                d_values=vector("d_values", d_values, d_values.numel(), torch.float32),
                mean=mean,
                device=device,
                stream=stream,
            )

    def slime_terms(
        self,
        logp: Tensor,
        cu_seqlens: Tensor,
        weights: SlimeWeights,
        *,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        anchor: Tensor,
        margin_loss: Tensor,
        stabilizer: Tensor,
        d_logp: Tensor | None,
    ) -> None:
        """See :meth:`Backend.slime_terms`."""
        segments, tokens = segments_of(cu_seqlens, logp), logp.numel()
        pairs = segments // 2
        outputs = (chosen_logps, rejected_logps, anchor, margin_loss, stabilizer)
        device, stream = _placed(logp, cu_seqlens, *outputs, d_logp)
        with _on(device):
            _native().slime_terms(
                logp=vector("logp", logp, tokens, torch.float32),
                cu_seqlens=vector("cu_seqlens", cu_seqlens, segments + 1, torch.int32),
                pairs=pairs,
                chosen_logps=vector("chosen_logps", chosen_logps, pairs, torch.float32),
                rejected_logps=vector("rejected_logps", rejected_logps, pairs, torch.float32),
                anchor=vector("anchor", anchor, pairs, torch.float32),
                margin_loss=vector("margin_loss", margin_loss, pairs, torch.float32),
                stabilizer=vector("stabilizer", stabilizer, pairs, torch.float32),
                d_logp=vector("d_logp", d_logp, tokens, torch.float32),
                device=device,
                stream=stream,
                **vars(weights),
            )

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """See :meth:`Backend.scale_`."""
        if tensor.dtype not in _DTYPE_CODES:
            raise TypeError(f"tensor: expected float32, bfloat16 or float16, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"tensor: expected a contiguous tensor, got strides {tensor.stride()}")
        if factor.numel() != 1 or factor.dtype != torch.float32:
            raise ValueError(f"factor: expected one float32 number, got {tuple(factor.shape)} of {factor.dtype}")
        device, stream = _placed(tensor, factor)
        with _on(device):
            _native().scale_(
                data=tensor.data_ptr(),
                n=tensor.numel(),
                dtype=_DTYPE_CODES[tensor.dtype],
                factor=factor.data_ptr(),
                device=device,
                stream=stream,
            )
