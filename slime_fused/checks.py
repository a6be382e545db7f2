"""Checks of what a call's arguments show without being read: types, shapes, dtypes, devices.

Nothing here waits for a device or depends on values, so that a compiled graph can trace it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LABEL_DTYPES = (torch.int64, torch.int32)


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    is_shard: bool = False,
    is_cast: bool = False,
) -> None:
    """Refuse tensors that do not make a linear head over labelled tokens. Raises TypeError or ValueError.

    Where ``weight`` is a shard (``is_shard``), whether it has a row is left to those who know the other shards.
    ``is_cast``: all are cast to one dtype before use.
    """
    _require_tensor("hidden", hidden)
    _require_tensor("weight", weight)
    _require_tensor("labels", labels)
    if not hidden.is_floating_point():
        raise TypeError(f"hidden: expected a floating dtype, got {hidden.dtype}")
    if hidden.is_meta:
        raise ValueError("hidden: expected a tensor that holds data, got one on the meta device")
    if hidden.dim() < 2:
        raise ValueError(f"hidden: expected (S, T, D) or (N, D), got shape {_shape(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected (V, D) with D = {hidden.shape[-1]} (the last dimension of hidden), "
            f"got shape {_shape(weight)}"
        )
    if weight.shape[1] == 0 or (weight.shape[0] == 0 and not is_shard):
        raise ValueError(f"weight: expected at least one row and one column, got shape {_shape(weight)}")
    if not is_cast:
        _require_dtype("weight", weight, hidden)
    _require_device("weight", weight, hidden)
    check_labels(labels, hidden.shape[:-1], hidden.device)
    if bias is not None:
        _require_tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected ({weight.shape[0]},) (the rows of weight), got shape {_shape(bias)}")
        if not is_cast:
            _require_dtype("bias", bias, hidden)
        _require_device("bias", bias, hidden)
    if cu_seqlens is not None:
        if hidden.dim() != 2:
            raise ValueError(f"hidden: expected (N, D) together with cu_seqlens, got shape {_shape(hidden)}")
        check_cu_seqlens(cu_seqlens, hidden.device)


def check_labels(labels: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Refuse labels that are not integers of this shape on this device."""
    _require_tensor("labels", labels)
    if labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"labels: expected int64 or int32, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(
            f"labels: expected shape {tuple(shape)} (hidden without its last dimension), got {_shape(labels)}"
        )
    if labels.device != device:
        raise ValueError(f"labels: expected on {device} like hidden, got {labels.device}")


def check_cu_seqlens(cu_seqlens: Tensor, device: torch.device) -> None:
    """Refuse boundaries that are not an integer vector of at least one entry on this device."""
    _require_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in _LABEL_DTYPES:
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected (S + 1,), got shape {_shape(cu_seqlens)}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected on {device} like hidden, got {cu_seqlens.device}")


def check_transform(logit_scale: float, logit_softcap: float | None) -> None:
    """Refuse a scale or soft cap that is no finite number, or a soft cap that is not positive."""
    if not isinstance(logit_scale, (int, float)) or not _is_finite(logit_scale):
        raise ValueError(f"logit_scale: expected a finite number, got {logit_scale!r}")
    if logit_softcap is not None and not (isinstance(logit_softcap, (int, float)) and 0 < logit_softcap < math.inf):
        raise ValueError(f"logit_softcap: expected None or a number > 0, got {logit_softcap!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_token_loss(label_smoothing: float, z_loss: float) -> None:
    """Refuse a smoothing outside [0, 1] and a negative or non-finite z-loss weight."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing!r}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: expected a finite number >= 0, got {z_loss!r}")


def check_pairs(num_sequences: int, argument: str = "labels") -> None:
    """Refuse a number of sequences that is not 2P with P >= 1; ``argument`` is what it was read off."""
    if num_sequences == 0:
        raise ValueError(f"{argument}: expected at least one pair (two sequences), got none")
    if num_sequences % 2:
        raise ValueError(
            f"{argument}: expected an even number of sequences (P chosen, then P rejected), got {num_sequences}"
        )


def _is_finite(value: float) -> bool:
    """As `math.isfinite`, which a graph with symbolic numbers (dynamic=True) cannot hold."""
    return -math.inf < value < math.inf


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _require_dtype(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.dtype != hidden.dtype:
        raise ValueError(
            f"{name}: expected the dtype of hidden ({hidden.dtype}), got {value.dtype}; "
            "cast one of them, or run under torch.autocast"
        )


def _require_device(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.device != hidden.device:
        raise ValueError(f"{name}: expected on {hidden.device} like hidden, got {value.device}")
