"""What every public function does with its arguments: cast under autocast, check, and gather the options."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from slime_fused.autograd.tensors import is_traced, materialize, refuse_transforms
from slime_fused.autograd.token_losses import STATISTICS
from slime_fused.backends import BACKEND_NAMES
from slime_fused.backends.base import HeadTransform
from slime_fused.engine.calls import HeadOptions, LabelledRows, LinearRequest, Wants
from slime_fused.engine.distributed import group_name
from slime_fused.engine.layout import IGNORED, TokenLayout, shift_labels
from slime_fused.functional import checks

if TYPE_CHECKING:  # a torch without distributed support has no such class
    from torch.distributed import ProcessGroup


class LinearOptions(TypedDict, total=False):
    """The keyword arguments of every linear loss, for signatures that say no more of them: see `slime_loss`."""

    bias: Tensor | None
    cu_seqlens: Tensor | None
    shift: bool
    ignore_index: int
    logit_scale: float
    logit_softcap: float | None
    temperature: float
    logits_dtype: torch.dtype | None
    backend: str
    workspace: int | str
    tp_group: ProcessGroup | None


def linear_request(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | TokenLayout,
    *,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float | None,
    temperature: float,
    logits_dtype: torch.dtype | None,
    backend: str,
    workspace: int | str,
    tp_group: object = None,
    cp_group: object = None,
    dp_group: object = None,
) -> tuple[Tensor, Tensor, Tensor | None, LinearRequest]:
    """(hidden, weight, bias, the rest) of a call: plain memory. Checks all that shows without reading values."""
    layout = None
    if isinstance(labels, TokenLayout):
        layout = labels
        checks.check_unset_beside_layout(cu_seqlens, shift, ignore_index)
        labels, cu_seqlens, ignore_index = layout.labels, layout.cu_seqlens, IGNORED
    compute_dtype = _autocast_dtype(hidden, weight, bias)
    checks.check_linear(
        hidden, weight, labels, bias, cu_seqlens, is_shard=tp_group is not None, is_cast=compute_dtype is not None
    )
    checks.check_transform(logit_scale, logit_softcap, hidden.dtype, temperature)
    operands = compute_dtype or hidden.dtype
    checks.check_logits_dtype(logits_dtype, operands)
    checks.check_flag("shift", shift)
    checks.check_ignore_index(ignore_index)
    checks.check_choice("backend", backend, ("auto", *BACKEND_NAMES))
    labels, cu_seqlens = labels.long(), None if cu_seqlens is None else int32_bounds(cu_seqlens)
    if not is_traced(hidden, weight, labels):
        refuse_transforms(hidden=hidden, weight=weight, bias=bias, labels=labels, cu_seqlens=cu_seqlens)
        hidden, weight, labels = map(materialize, (hidden, weight, labels))
        bias, cu_seqlens = (None if x is None else materialize(x) for x in (bias, cu_seqlens))
    softcap = None if logit_softcap is None else float(logit_softcap)
    options = HeadOptions(
        HeadTransform(float(logit_scale), softcap, float(temperature)),
        None if logits_dtype == operands else logits_dtype,
        compute_dtype,
        backend,
        _plain_int(workspace),
        group_name("tp_group", tp_group),
        group_name("cp_group", cp_group),
        group_name("dp_group", dp_group),
    )
    if options.cp_group is not None and shift:
        raise ValueError(
            "shift: expected False with cp_group (the label of a process's last token may lie on another one: "
            "shift the labels before they are split), got True"
        )
    rows = LabelledRows(labels, cu_seqlens, bool(shift), int(ignore_index), layout)
    return hidden, weight, bias, LinearRequest(rows, options, Wants.of(hidden, weight, bias))


def statistic_names(return_stats: Sequence[str] | None) -> tuple[str, ...]:
    """Those asked for, once each. Raises TypeError or ValueError for other names."""
    if isinstance(return_stats, str) or not isinstance(return_stats, (Sequence, type(None))):
        raise TypeError(f"return_stats: expected a sequence of names among {STATISTICS}, got {return_stats!r}")
    for name in return_stats or ():
        if name not in STATISTICS:
            raise ValueError(f"return_stats: expected names among {STATISTICS}, got {name!r}")
    return tuple(dict.fromkeys(return_stats or ()))


def _plain_int(workspace: int | str) -> int | str:
    """NumPy's integers as Python's."""
    is_number = isinstance(workspace, Integral) and not isinstance(workspace, bool)
    return int(workspace) if is_number else workspace


def _autocast_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """Under autocast, its dtype, where it casts all three (float64 is left alone, as autocast does); else None."""
    if not isinstance(hidden, Tensor) or hidden.is_meta or not torch.is_autocast_enabled(hidden.device.type):
        return None
    tensors = [hidden, weight] if bias is None else [hidden, weight, bias]
    if not all(isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 for x in tensors):
        return None
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return None if all(x.dtype == dtype for x in tensors) else dtype


def int32_bounds(cu_seqlens: Tensor) -> Tensor:
    """(S + 1,) int32. What does not fit stays too large, or negative, and is refused where the values are read."""
    limits = torch.iinfo(torch.int32)
    if cu_seqlens.dtype != torch.int32:
        cu_seqlens = cu_seqlens.clamp(limits.min, limits.max)
    return cu_seqlens.to(torch.int32)


def label_counts(rows: LabelledRows) -> Tensor:
    """(S,) labelled tokens of each sequence."""
    labels, cu_seqlens, shift, ignore_index = rows.labels, rows.cu_seqlens, rows.shift, rows.ignore_index
    has_target = (shift_labels(labels, cu_seqlens, ignore_index) if shift else labels) != ignore_index
    if cu_seqlens is None:
        return has_target.sum(-1).reshape(-1)
    cumulative = torch.nn.functional.pad(has_target.cumsum(0), (1, 0))
    at_bounds = cumulative[cu_seqlens.long()]
    return at_bounds[1:] - at_bounds[:-1]
