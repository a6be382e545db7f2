"""The CPU backend: tensors become addresses for the native kernels of ``csrc/cpu``, nothing more.

The kernels work on float32, bfloat16, float16 and float64 with float32 (float64) accumulation, use as many
threads as PyTorch is set to, and give the same bits for any number of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import HeadTransform, SlimeWeights, TokenLoss, acc_dtype
from .native import _C, DTYPE_CODES, IMPORT_ERROR, matrix, residual_matrix, segments_of, vector


def _native() -> Any:
    """The CPU half of the extension module; RuntimeError with the reason where it was not built."""
    if _C is None:
        raise RuntimeError(CpuBackend().available()[1])
    return _C.cpu


class CpuBackend:
    """Kernels for CPU tensors; the methods are those of :class:`slime_fused.backends.base.Backend`."""

    name = "cpu"

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
    ) -> None:
        """See :meth:`Backend.softmax_residual`."""
        rows, cols = logits.shape
        acc = acc_dtype(logits.dtype)
        _native().softmax_residual(
            logits=logits.data_ptr(),
            out=out.data_ptr(),
            rows=rows,
            cols=cols,
            logits_stride=matrix("logits", logits),
            out_stride=residual_matrix(out, logits),
            dtype=DTYPE_CODES[logits.dtype],
            out_dtype=DTYPE_CODES[out.dtype],
            labels=vector("labels", labels, rows, torch.int64),
            bias=vector("bias", bias, cols, logits.dtype),
            scale=head.scale,
            softcap=head.softcap or 0.0,
            label_smoothing=token_loss.label_smoothing,
            z_loss=token_loss.z_loss,
            row_max=vector("row_max", row_max, rows, acc),
            row_sum=vector("row_sum", row_sum, rows, acc),
            logp=vector("logp", logp, rows, acc),
            loss=vector("loss", loss, rows, acc),
            num_threads=torch.get_num_threads(),
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
        acc = acc_dtype(logits.dtype)
        _native().logits_stats(
            logits=logits.data_ptr(),
            rows=rows,
            cols=cols,
            logits_stride=matrix("logits", logits),
            col_offset=col_offset,
            dtype=DTYPE_CODES[logits.dtype],
            labels=vector("labels", labels, rows, torch.int64),
            bias=vector("bias", bias, cols, logits.dtype),
            scale=head.scale,
            softcap=head.softcap or 0.0,
            row_max=vector("row_max", row_max, rows, acc),
            row_sum=vector("row_sum", row_sum, rows, acc),
            label_logit=vector("label_logit", label_logit, rows, acc),
            logit_sum=vector("logit_sum", logit_sum, rows, acc),
            merge=merge,
            num_threads=torch.get_num_threads(),
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
        acc = acc_dtype(logits.dtype)
        _native().residual_from_stats(
            logits=logits.data_ptr(),
            out=out.data_ptr(),
            rows=rows,
            cols=cols,
            logits_stride=matrix("logits", logits),
            out_stride=residual_matrix(out, logits),
            col_offset=col_offset,
            vocab_size=vocab_size,
            dtype=DTYPE_CODES[logits.dtype],
            out_dtype=DTYPE_CODES[out.dtype],
            labels=vector("labels", labels, rows, torch.int64),
            bias=vector("bias", bias, cols, logits.dtype),
            scale=head.scale,
            softcap=head.softcap or 0.0,
            label_smoothing=token_loss.label_smoothing,
            z_loss=token_loss.z_loss,
            row_max=vector("row_max", row_max, rows, acc),
            row_sum=vector("row_sum", row_sum, rows, acc),
            logp=vector("logp", logp, rows, acc),
            row_scale=vector("row_scale", row_scale, rows, acc),
            num_threads=torch.get_num_threads(),
        )

    def segment_sum(self, values: Tensor, cu_seqlens: Tensor, out: Tensor, *, mean: bool) -> None:
        """See :meth:`Backend.segment_sum`."""
        segments, tokens = segments_of(cu_seqlens, values), values.numel()
        _native().segment_sum(
            values=vector("values", values, tokens, values.dtype),
            cu_seqlens=vector("cu_seqlens", cu_seqlens, segments + 1, torch.int32),
            segments=segments,
            tokens=tokens,
            out=vector("out", out, segments, values.dtype),
            dtype=DTYPE_CODES[values.dtype],
            mean=mean,
            num_threads=torch.get_num_threads(),
        )

    def segment_sum_backward(self, d_out: Tensor, cu_seqlens: Tensor, d_values: Tensor, *, mean: bool) -> None:
        """See :meth:`Backend.segment_sum_backward`."""
        segments, tokens = segments_of(cu_seqlens, d_values), d_values.numel()
        _native().segment_sum_backward(
            d_out=vector("d_out", d_out, segments, d_values.dtype),
            cu_seqlens=vector("cu_seqlens", cu_seqlens, segments + 1, torch.int32),
            segments=segments,
            tokens=tokens,
            d_values=vector("d_values", d_values, tokens, d_values.dtype),
            dtype=DTYPE_CODES[d_values.dtype],
            mean=mean,
            num_threads=torch.get_num_threads(),
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
        segments, tokens, acc = segments_of(cu_seqlens, logp), logp.numel(), logp.dtype
        pairs = segments // 2
        _native().slime_terms(
            logp=vector("logp", logp, tokens, acc),
            cu_seqlens=vector("cu_seqlens", cu_seqlens, segments + 1, torch.int32),
            segments=segments,
            tokens=tokens,
            dtype=DTYPE_CODES[acc],
            chosen_logps=vector("chosen_logps", chosen_logps, pairs, acc),
            rejected_logps=vector("rejected_logps", rejected_logps, pairs, acc),
            anchor=vector("anchor", anchor, pairs, acc),
            margin_loss=vector("margin_loss", margin_loss, pairs, acc),
            stabilizer=vector("stabilizer", stabilizer, pairs, acc),
            d_logp=vector("d_logp", d_logp, tokens, acc),
            num_threads=torch.get_num_threads(),
            **vars(weights),
        )

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """See :meth:`Backend.scale_`."""
        if factor.item() != 1.0:
            # Not rounded to the dtype of the tensor: a loss scaler's 65536 would be infinite in float16.
            tensor.mul_(factor)
