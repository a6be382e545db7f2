"""The Triton backend: the contract of `base.Backend` over the kernels of ``slime_fused.triton_kernels``.

Importing this module imports neither Triton nor a kernel; the first call does. `TRITON_INTERPRET=1`, set before
Triton is first imported, makes the backend take CPU tensors: every kernel then runs in Triton's interpreter, which
is how the tests check them without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from slime_fused.backends.base import HeadTransform, SlimeWeights, TokenLoss

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f"slime_fused.triton_kernels.{module}")


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@cache
def _target_family(device: torch.device) -> str:
    """Which row of the table of tile sizes this device uses."""
    if device.type == "cpu":
        return "small"
    major, minor = torch.cuda.get_device_capability(device)
    family: str = _kernels("configs").target_family("hip" if torch.version.hip else "cuda", 10 * major + minor)
    return family


def _row_config(logits: Tensor) -> Any:
    """How the kernels with one program per row are launched for these rows."""
    family = _target_family(logits.device)
    return _kernels("configs").row_config(family, logits.shape[1], logits.element_size())


def _check_labels_on_cpu(labels: Tensor, vocab_size: int) -> None:
    """The interpreter has no device assertion: an out-of-range label is reported here."""
    if labels.is_cuda or labels.numel() == 0 or int(labels.max()) < vocab_size:
        return
    position = int(labels.argmax())
    raise ValueError(f"labels: expected values below {vocab_size}, got {int(labels[position])} at row {position}")


class TritonBackend:
    """Triton kernels for NVIDIA and AMD GPUs; float32, bfloat16 and float16 logits."""

    name = "triton"

    def available(self) -> tuple[bool, str]:
        """Whether Triton is installed and a GPU (or the interpreter) can run its kernels."""
        if importlib.util.find_spec("triton") is None:
            return False, "Triton is not installed: pip install 'slime-fused[triton]'"
        if interpreting():
            return True, "Triton interpreter (TRITON_INTERPRET is set): CPU tensors, for tests only"
        if not torch.cuda.is_available():
            return False, "no CUDA or ROCm device is visible to PyTorch"
        return True, f"Triton {importlib.import_module('triton').__version__}"

    def supports(self, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        """Whether tensors of this device and dtype can be taken."""
        wanted = "cpu" if interpreting() else "cuda"
        if device.type != wanted:
            return False, f"device: the triton backend takes {wanted} tensors here, got {device.type}"
        if dtype not in _DTYPES:
            return False, f"dtype: the triton backend takes float32, bfloat16 and float16, got {dtype}"
        return True, ""

    def softmax_residual(
        self,
        logits: Tensor,  # [M, V]
        out: Tensor,  # [M, V]
        labels: Tensor,  # [M]
        bias: Tensor | None,  # [V]
        head: HeadTransform,
        token_loss: TokenLoss,
        *,
        row_max: Tensor,  # [M]
        row_sum: Tensor,  # [M]
        logp: Tensor,  # [M]
        loss: Tensor | None,  # [M]
    ) -> None:
        """See `base.Backend.softmax_residual`."""
        if logits.shape[0] == 0:
            return
        _check_labels_on_cpu(labels, logits.shape[1])
        with _on_device_of(logits):
            _kernels("rows").softmax_residual(
                logits,
                out,
                labels,
                bias,
                row_max,
                row_sum,
                logp,
                loss,
                scale=head.scale,
                softcap=head.softcap,
                label_smoothing=token_loss.label_smoothing,
                z_loss=token_loss.z_loss,
                config=_row_config(logits),
            )

    def logits_stats(
        self,
        logits: Tensor,  # [M, V]
        labels: Tensor,  # [M]
        bias: Tensor | None,  # [V]
        head: HeadTransform,
        *,
        col_offset: int,
        row_max: Tensor,  # [M]
        row_sum: Tensor,  # [M]
        label_logit: Tensor,  # [M]
        logit_sum: Tensor | None,  # [M]
        merge: bool,
    ) -> None:
        """See `base.Backend.logits_stats`."""
        if logits.shape[0] == 0:
            return
        with _on_device_of(logits):
            _kernels("rows").logits_stats(
                logits,
                labels,
                bias,
                row_max,
                row_sum,
                label_logit,
                logit_sum,
                scale=head.scale,
                softcap=head.softcap,
                col_offset=col_offset,
                merge=merge,
                config=_row_config(logits),
            )

    def residual_from_stats(
        self,
        logits: Tensor,  # [M, V]
        out: Tensor,  # [M, V]
        labels: Tensor,  # [M]
        bias: Tensor | None,  # [V]
        head: HeadTransform,
        token_loss: TokenLoss,
        *,
        col_offset: int,
        vocab_size: int,
        row_max: Tensor,  # [M]
        row_sum: Tensor,  # [M]
        logp: Tensor,  # [M]
        row_scale: Tensor | None,  # [M]
    ) -> None:
        """See `base.Backend.residual_from_stats`."""
        if logits.shape[0] == 0:
            return
        _check_labels_on_cpu(labels, vocab_size)
        with _on_device_of(logits):
            _kernels("rows").residual_from_stats(
                logits,
                out,
                labels,
                bias,
                row_max,
                row_sum,
                logp,
                row_scale,
                scale=head.scale,
                softcap=head.softcap,
                label_smoothing=token_loss.label_smoothing,
                z_loss=token_loss.z_loss,
                col_offset=col_offset,
                vocab_size=vocab_size,
            )

    def segment_sum(self, values: Tensor, cu_seqlens: Tensor, out: Tensor, *, mean: bool) -> None:
        """See `base.Backend.segment_sum`."""
        if out.shape[0] == 0:
            return
        with _on_device_of(values):
            _kernels("segments").segment_sum(values, cu_seqlens, out, mean=mean)

    def segment_sum_backward(self, d_out: Tensor, cu_seqlens: Tensor, d_values: Tensor, *, mean: bool) -> None:
        """See `base.Backend.segment_sum_backward`."""
        if d_out.shape[0] == 0:
            return
        with _on_device_of(d_out):
            _kernels("segments").segment_sum_backward(d_out, cu_seqlens, d_values, mean=mean)

    def slime_terms(
        self,
        logp: Tensor,  # [N]
        cu_seqlens: Tensor,  # [2P + 1]
        weights: SlimeWeights,
        *,
        chosen_logps: Tensor,  # [P]
        rejected_logps: Tensor,  # [P]
        anchor: Tensor,  # [P]
        margin_loss: Tensor,  # [P]
        stabilizer: Tensor,  # [P]
        d_logp: Tensor | None,  # [N]
    ) -> None:
        """See `base.Backend.slime_terms`."""
        if chosen_logps.shape[0] == 0:
            return
        with _on_device_of(logp):
            _kernels("segments").slime_terms(
                logp,
                cu_seqlens,
                (chosen_logps, rejected_logps, anchor, margin_loss, stabilizer),
                d_logp,
                (
                    weights.lambda_w,
                    weights.lambda_l,
                    weights.lambda_d,
                    weights.delta,
                    weights.margin_hard,
                    weights.margin_soft,
                    weights.kappa,
                    weights.power,
                    weights.pair_weight,
                    weights.token_weight,
                ),
            )

    def linear_stats_row_bytes(self, weight: Tensor) -> int:
        """See `base.LinearStatsBackend.linear_stats_row_bytes`: three partial sums per tile of the vocabulary."""
        if weight.stride(1) != 1:
            return 0
        family = _target_family(weight.device)
        config = _kernels("configs").narrowest_config(family, weight.element_size())
        return 12 * -(-weight.shape[0] // config.block_n)

    def linear_stats(
        self,
        hidden: Tensor,  # [M, D]
        weight: Tensor,  # [V, D]
        labels: Tensor,  # [M]
        bias: Tensor | None,  # [V]
        head: HeadTransform,
        *,
        col_offset: int,
        row_max: Tensor,  # [M]
        row_sum: Tensor,  # [M]
        label_logit: Tensor,  # [M]
        logit_sum: Tensor | None,  # [M]
        logits_dtype: torch.dtype | None = None,
    ) -> None:
        """See `base.LinearStatsBackend.linear_stats`."""
        if hidden.shape[0] == 0:
            return
        kernels = _kernels("linear_stats")
        config = kernels.choose_config(_target_family(hidden.device), hidden, weight)
        count = 2 if logit_sum is None else 3
        shape = kernels.partial_shape(hidden.shape[0], weight.shape[0], config)
        partials = torch.empty((count, *shape), dtype=torch.float32, device=hidden.device)
        with _on_device_of(hidden):
            kernels.linear_stats(
                hidden,
                weight,
                labels,
                bias,
                row_max,
                row_sum,
                label_logit,
                logit_sum,
                partials,
                scale=head.scale,
                softcap=head.softcap,
                col_offset=col_offset,
                config=config,
                rounds_product=logits_dtype in (None, hidden.dtype),
            )

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """See `base.Backend.scale_`."""
        if tensor.numel() == 0:
            return
        with _on_device_of(tensor):
            _kernels("segments").scale_(tensor, factor)
