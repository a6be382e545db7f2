"""`explain_plan`: what a call would do, without doing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slime_fused.autograd.tensors import is_traced
from slime_fused.autograd.token_losses import token_kind
from slime_fused.autograd.unit_losses import kind_of
from slime_fused.backends.base import TokenLoss
from slime_fused.engine.calls import LossKind, prepare_call
from slime_fused.engine.layout import TokenLayout
from slime_fused.engine.plan import Plan
from slime_fused.engine.units import Loss
from slime_fused.functional import checks
from slime_fused.functional.arguments import linear_request, statistic_names
from slime_fused.losses import as_loss

_KINDS = {
    "slime": LossKind("pair", is_paired=True),
    "cross_entropy": LossKind("token"),
    "token": LossKind("later"),
}


def explain_plan(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | TokenLayout,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss: str | Loss | Callable[..., Any] = "slime",
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    workspace: int | str = "auto",
    return_stats: Sequence[str] | None = None,
) -> Plan:
    """The plan that the same call would run with, as a printable value: chunks, bytes, FLOPs, and why.

    Arguments as `slime_loss`; ``loss`` is what `preference_loss` takes, or names the function: "slime",
    "cross_entropy" (mean or sum), or "token" (`linear_logprobs`, `sequence_logprobs`, cross-entropy with reduction
    "none"). ``return_stats`` as theirs, for "token" or a value. Which gradients are wanted is read off
    ``requires_grad``.
    """
    statistics = statistic_names(return_stats)
    if isinstance(loss, str):
        checks.check_choice("loss", loss, tuple(_KINDS))
        if statistics and loss != "token":
            raise ValueError(f"return_stats: expected none for loss {loss!r}, got {return_stats!r}")
        kind = token_kind(TokenLoss(), statistics) if statistics else _KINDS[loss]
    else:
        kind = kind_of(as_loss(loss), statistics)
    hidden, weight, bias, request = linear_request(
        hidden,
        weight,
        labels,
        bias=bias,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        logits_dtype=logits_dtype,
        backend=backend,
        workspace=workspace,
    )
    # A compiler breaks its graph here, and calls this with values.
    if is_traced(hidden, weight, request.rows.labels) and not torch.compiler.is_compiling():
        raise ValueError(
            "labels: expected values to count, got a traced or a fake tensor: call explain_plan outside the trace"
        )
    return prepare_call(kind, hidden, weight, bias, request).plan
