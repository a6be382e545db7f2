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

from slime_fused.backends.base import (
    NO_FACTORS,
    LinearBlock,
    LogitsBlock,
    RowFactors,
    RowStats,
    SlimePairs,
    SlimeWeights,
    TokenLoss,
    VocabStats,
    losses_of,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def _is_installed() -> bool:
    """Looked up once: each search goes through every folder that Python imports from."""
    return importlib.util.find_spec("triton") is not None


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


def _moment_arguments(stats: VocabStats) -> dict[str, Tensor]:
    return {} if stats.moments is None else vars(stats.moments)


class TritonBackend:
    """Triton kernels for NVIDIA and AMD GPUs; float32, bfloat16 and float16 logits."""

    name = "triton"

    def available(self) -> tuple[bool, str]:
        """Whether Triton is installed and a GPU (or the interpreter) can run its kernels."""
        if not _is_installed():
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

    def softmax_residual(self, block: LogitsBlock, out: Tensor, token_loss: TokenLoss, stats: RowStats) -> None:
        """See `base.Backend.softmax_residual`."""
        logits = block.logits
        if logits.shape[0] == 0:
            return
        _check_labels_on_cpu(block.labels, logits.shape[1])
        with _on_device_of(logits):
            _kernels("rows").softmax_residual(
                logits,
                out,
                block.labels,
                block.bias,
                stats.row_max,
                stats.row_sum,
                stats.logp,
                losses_of(stats),
                **vars(block.transform),
                **vars(token_loss),
                config=_row_config(logits),
            )

    def logits_stats(self, block: LogitsBlock, stats: VocabStats, *, merge: bool = False) -> None:
        """See `base.Backend.logits_stats`."""
        logits = block.logits
        if logits.shape[0] == 0:
            return
        with _on_device_of(logits):
            _kernels("rows").logits_stats(
                logits,
                block.labels,
                block.bias,
                stats.row_max,
                stats.row_sum,
                stats.label_logit,
                stats.logit_sum,
                **_moment_arguments(stats),
                **vars(block.transform),
                col_offset=block.col_offset,
                merge=merge,
                config=_row_config(logits),
            )

    def residual_from_stats(
        self,
        block: LogitsBlock,
        out: Tensor,
        token_loss: TokenLoss,
        stats: RowStats,
        factors: RowFactors = NO_FACTORS,
    ) -> None:
        """See `base.Backend.residual_from_stats`."""
        logits = block.logits
        if logits.shape[0] == 0:
            return
        _check_labels_on_cpu(block.labels, block.whole_vocab_size)
        with _on_device_of(logits):
            _kernels("rows").residual_from_stats(
                logits,
                out,
                block.labels,
                block.bias,
                stats.row_max,
                stats.row_sum,
                stats.logp,
                factors.scale,
                factors.entropy,
                factors.entropy_scale,
                **vars(block.transform),
                **vars(token_loss),
                col_offset=block.col_offset,
                vocab_size=block.whole_vocab_size,
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
        self, logp: Tensor, cu_seqlens: Tensor, weights: SlimeWeights, out: SlimePairs, d_logp: Tensor | None
    ) -> None:
        """See `base.Backend.slime_terms`."""
        if out.anchor.shape[0] == 0:
            return
        with _on_device_of(logp):
            _kernels("segments").slime_terms(
                logp, cu_seqlens, tuple(vars(out).values()), d_logp, tuple(vars(weights).values())
            )

    def linear_stats_row_bytes(self, weight: Tensor, *, with_moments: bool = False) -> int:
        """See `base.LinearStatsBackend.linear_stats_row_bytes`: at most 3 (6) sums per tile of the vocabulary."""
        if weight.stride(1) != 1:
            return 0
        family = _target_family(weight.device)
        config = _kernels("configs").narrowest_config(family, weight.element_size())
        return (24 if with_moments else 12) * -(-weight.shape[0] // config.block_n)

    def linear_stats(self, block: LinearBlock, stats: VocabStats) -> None:
        """See `base.LinearStatsBackend.linear_stats`."""
        hidden, weight = block.hidden, block.weight
        if hidden.shape[0] == 0:
            return
        kernels = _kernels("linear_stats")
        has_moments = stats.moments is not None
        config = kernels.choose_config(_target_family(hidden.device), hidden, weight, has_moments=has_moments)
        count = 2 + (stats.logit_sum is not None) + 3 * has_moments
        shape = kernels.partial_shape(hidden.shape[0], weight.shape[0], config)
        partials = torch.empty((count, *shape), dtype=torch.float32, device=hidden.device)
        with _on_device_of(hidden):
            kernels.linear_stats(
                hidden,
                weight,
                block.labels,
                block.bias,
                stats.row_max,
                stats.row_sum,
                stats.label_logit,
                stats.logit_sum,
                partials,
                **_moment_arguments(stats),
                **vars(block.transform),
                col_offset=0,
                config=config,
                rounds_product=block.logits_dtype in (None, hidden.dtype),
            )

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """See `base.Backend.scale_`."""
        if tensor.numel() == 0:
            return
        with _on_device_of(tensor):
            _kernels("segments").scale_(tensor, factor)
