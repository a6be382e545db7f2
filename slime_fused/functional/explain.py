"""`explain_plan`: what a call would do, without doing it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from slime_fused.autograd.tensors import is_traced
from slime_fused.backends.base import TokenLoss
from slime_fused.engine.calls import Wants, prepare_call
from slime_fused.engine.layout import TokenLayout
from slime_fused.engine.plan import Plan
from slime_fused.functional import checks
from slime_fused.functional.arguments import prepare_arguments


def explain_plan(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | TokenLayout,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss: Literal["slime", "cross_entropy", "token"] = "slime",
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    workspace: int | str = "auto",
) -> Plan:
    """The plan that the same call would run with, as a printable value: chunks, bytes, FLOPs, and why.

    Arguments as `slime_loss`; ``loss`` names the function: "slime", "cross_entropy" (mean or sum), or "token"
    (`linear_logprobs`, `sequence_logprobs`, cross-entropy with reduction "none"). Which gradients are wanted is
    read off ``requires_grad``.
    """
    checks.check_choice("loss", loss, ("slime", "cross_entropy", "token"))
    hidden, weight, labels, bias, cu_seqlens, options = prepare_arguments(
        hidden,
        weight,
        labels,
        bias,
        cu_seqlens,
        shift,
        ignore_index,
        logit_scale,
        logit_softcap,
        logits_dtype,
        backend,
        workspace,
    )
    # A compiler breaks its graph here, and calls this with values.
    if is_traced(hidden, weight, labels) and not torch.compiler.is_compiling():
        raise ValueError(
            "labels: expected values to count, got a traced or a fake tensor: call explain_plan outside the trace"
        )
    wants = Wants.of(hidden, weight, bias)
    return prepare_call(loss, hidden, weight, labels, bias, cu_seqlens, options, wants, TokenLoss()).plan
