"""`slime_terms`: the SLIME loss of log-probs that exist already."""

from __future__ import annotations

import torch
from torch import Tensor

from slime_fused.autograd.tensors import is_traced, materialize, refuse_transforms, require_plain
from slime_fused.autograd.token_losses import SlimeTermsFunction
from slime_fused.autograd.token_operators import slime_terms_op
from slime_fused.backends import BACKEND_NAMES
from slime_fused.engine.layout import check_pairs
from slime_fused.functional import checks
from slime_fused.functional.arguments import int32_bounds
from slime_fused.losses import Slime, SlimeLossConfig
from slime_fused.output import SlimeOutput


def slime_terms(
    logp: Tensor, cu_seqlens: Tensor, config: SlimeLossConfig | None = None, *, backend: str = "auto"
) -> SlimeOutput:
    """The SLIME loss from token log-probs alone, differentiable with respect to them.

    Args:
        logp: (N,) log-probs of the labelled tokens, float32 or float64: the P chosen responses one after the
            other, then the P rejected ones.
        cu_seqlens: (2P + 1,) int32 boundaries of the responses.
        config: the loss's hyperparameters; None takes the paper's.
        backend: as in `slime_loss`.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, boundaries that do not fit, an empty response.
    """
    loss = Slime.of(config)
    require_plain("logp", logp)
    if logp.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logp: expected a float32 or float64 tensor, got {logp.dtype}")
    if logp.dim() != 1:
        raise ValueError(f"logp: expected (N,), got shape {tuple(logp.shape)}")
    checks.check_cu_seqlens(cu_seqlens, logp.device)
    check_pairs(cu_seqlens.shape[0] - 1, argument="cu_seqlens")
    checks.check_choice("backend", backend, ("auto", *BACKEND_NAMES))
    cu_seqlens = int32_bounds(cu_seqlens)
    wants = torch.is_grad_enabled() and logp.requires_grad
    if is_traced(logp, cu_seqlens):
        outputs = slime_terms_op(logp, cu_seqlens, loss.key, backend, wants)[:3]
    else:
        refuse_transforms(logp=logp, cu_seqlens=cu_seqlens)
        logp, cu_seqlens = materialize(logp), materialize(cu_seqlens)
        outputs = SlimeTermsFunction.apply(logp, cu_seqlens, loss, backend, wants)
    return SlimeOutput.of(*outputs)
