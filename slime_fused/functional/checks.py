"""Checks of what a call's arguments show without being read: types, shapes, dtypes, devices.

Nothing here waits for a device or depends on values, so that a compiled graph can trace it.
"""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

from slime_fused.autograd.tensors import require_plain
from slime_fused.backends.base import acc_dtype

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
    require_plain("hidden", hidden)
    require_plain("weight", weight)
    require_plain("labels", labels)
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
        require_plain("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected ({weight.shape[0]},) (the rows of weight), got shape {_shape(bias)}")
        if not is_cast:
            _require_dtype("bias", bias, hidden)
        _require_device("bias", bias, hidden)
    if cu_seqlens is not None:
        if hidden.dim() != 2:
            raise ValueError(f"hidden: expected (N, D) together with cu_seqlens, got shape {_shape(hidden)}")
        check_cu_seqlens(cu_seqlens, hidden.device)


def check_labels(labels: Tensor, shape: torch.Size, device: torch.device, like: str = "hidden") -> None:
    """Refuse labels that are not integers of this shape on this device, those of the tensor ``like``."""
    require_plain("labels", labels)
    if labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"labels: expected int64 or int32, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(
            f"labels: expected shape {tuple(shape)} ({like} without its last dimension), got {_shape(labels)}"
        )
    if labels.device != device:
        raise ValueError(f"labels: expected on {device} like {like}, got {labels.device}")


def check_cu_seqlens(cu_seqlens: Tensor, device: torch.device) -> None:
    """Refuse boundaries that are not an integer vector of at least one entry on this device."""
    require_plain("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in _LABEL_DTYPES:
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected (S + 1,), got shape {_shape(cu_seqlens)}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected on {device} like hidden, got {cu_seqlens.device}")


def check_transform(
    logit_scale: float, logit_softcap: float | None, dtype: torch.dtype, temperature: float = 1.0
) -> None:
    """Refuse what is no finite number in the accumulation dtype of logits of ``dtype``.

    The kernels divide by the soft cap and by the temperature, or multiply with their inverses: both must be normal
    numbers, and so must what the raw logits are multiplied with in all.
    """
    limits = torch.finfo(acc_dtype(dtype))
    scale = _number("logit_scale", logit_scale, "a finite number")
    if not -limits.max <= scale <= limits.max:
        raise ValueError(
            f"logit_scale: expected a finite number of at most {limits.max:.3g} either way, got {logit_scale!r}"
        )
    divisor = _number("temperature", temperature, "a number > 0")
    if not limits.tiny <= divisor <= 1 / limits.tiny or abs(scale) / divisor > limits.max:
        raise ValueError(
            f"temperature: expected a number > 0 from {limits.tiny:.3g} to {1 / limits.tiny:.3g}, by which a scale "
            f"of {logit_scale!r} can be divided, got {temperature!r}"
        )
    if logit_softcap is None:
        return
    softcap = _number("logit_softcap", logit_softcap, "None or a number > 0")
    if not limits.tiny <= softcap <= 1 / limits.tiny:
        raise ValueError(
            f"logit_softcap: expected None or a number > 0 from {limits.tiny:.3g} to {1 / limits.tiny:.3g}, "
            f"got {logit_softcap!r}"
        )
    if softcap / divisor > limits.max:
        raise ValueError(
            f"temperature: expected a number by which a soft cap of {logit_softcap!r} can be divided, "
            f"got {temperature!r}"
        )


def check_logits_dtype(logits_dtype: torch.dtype | None, operands: torch.dtype) -> None:
    """Refuse what is neither the dtype of the product's operands nor float32 where these have 16 bits."""
    if logits_dtype is not None and not isinstance(logits_dtype, torch.dtype):
        raise TypeError(f"logits_dtype: expected None or a torch.dtype, got {logits_dtype!r}")
    allowed = {None, operands, torch.float32 if operands.itemsize < 4 else operands}
    if logits_dtype not in allowed:
        wider = " or torch.float32" if operands.itemsize < 4 else ""
        raise ValueError(
            f"logits_dtype: expected None, the dtype of the product's operands ({operands}){wider}, "
            f"got {logits_dtype}"
        )


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    is_numpy_bool = getattr(getattr(value, "dtype", None), "kind", None) == "b"
    if not isinstance(value, bool) and not is_numpy_bool:
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_ignore_index(value: int) -> None:
    """Refuse what no int64 label can be."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"ignore_index: expected an int, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index: expected an int64, got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_token_loss(label_smoothing: float, z_loss: float) -> None:
    """Refuse a smoothing outside [0, 1] and a z-loss weight that is negative or beyond float32."""
    if not 0 <= _number("label_smoothing", label_smoothing, "a number in [0, 1]") <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing!r}")
    if not 0 <= _number("z_loss", z_loss, "a finite number >= 0") <= torch.finfo(torch.float32).max:
        raise ValueError(f"z_loss: expected a finite number >= 0, got {z_loss!r}")


def check_unset_beside_layout(cu_seqlens: Tensor | None, shift: bool, ignore_index: int) -> None:
    """Refuse what a `TokenLayout` knows already."""
    given = {"cu_seqlens": cu_seqlens is not None, "shift": shift, "ignore_index": ignore_index != -100}
    for name, is_given in given.items():
        if is_given:
            raise ValueError(f"{name}: expected none beside a TokenLayout, which was made with one; got {name} too")


def _number(name: str, value: object, expected: str) -> float:
    """The value as Python's number, NumPy's included; a bool is a slip of the argument's place: TypeError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    # An int may be beyond float, and a graph's symbolic number is left as it is.
    return value if isinstance(value, (int, float)) else float(value)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _require_dtype(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.dtype != hidden.dtype:
        # Autocast leaves float64 alone.
        can_autocast = torch.float64 not in (value.dtype, hidden.dtype)
        raise ValueError(
            f"{name}: expected the dtype of hidden ({hidden.dtype}), got {value.dtype}; "
            f"cast one of them{', or run under torch.autocast' if can_autocast else ''}"
        )


def _require_device(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.device != hidden.device:
        raise ValueError(f"{name}: expected on {hidden.device} like hidden, got {value.device}")
