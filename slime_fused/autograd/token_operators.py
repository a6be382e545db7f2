"""The passes over what a head has made, its logits and their log-probs, as `torch.library` operators.

As in `operators.py`: nothing is changed in place, and a gradient that nobody wants is an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slime_fused.autograd import logits_passes
from slime_fused.autograd.gradient_store import refuse_transformed_backward
from slime_fused.autograd.token_losses import run_slime_terms
from slime_fused.backends import resolve_backend
from slime_fused.backends.base import HeadTransform, TokenLoss, acc_dtype
from slime_fused.losses.registry import loss_of

# --- segment_sum: (N,) values over S segments ---


def _segment_sum(values: Tensor, cu_seqlens: Tensor, mean: bool, backend: str) -> Tensor:
    out = values.new_empty(cu_seqlens.shape[0] - 1)
    kernels = resolve_backend(backend, values.device, values.dtype)
    kernels.segment_sum(values.contiguous(), _bounds(cu_seqlens), out, mean=mean)
    return out


def _segment_sum_backward(d_out: Tensor, cu_seqlens: Tensor, size: int, mean: bool, backend: str) -> Tensor:
    # Values beyond the last boundary belong to no segment.
    d_values = d_out.new_zeros(size)
    kernels = resolve_backend(backend, d_out.device, d_out.dtype)
    kernels.segment_sum_backward(d_out.contiguous(), _bounds(cu_seqlens), d_values, mean=mean)
    return d_values


def _bounds(cu_seqlens: Tensor) -> Tensor:
    # Inductor makes an int64 tensor of an int32 one that is multiplied with a symbolic size.
    return cu_seqlens.to(torch.int32).contiguous()


def _segment_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, cu_seqlens, ctx.mean, ctx.backend = inputs
    ctx.size = values.shape[0]
    ctx.save_for_backward(cu_seqlens)


def _segment_sum_autograd(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    refuse_transformed_backward(upstream)
    (cu_seqlens,) = ctx.saved_tensors
    return segment_sum_backward_op(upstream, cu_seqlens, ctx.size, ctx.mean, ctx.backend), None, None, None


segment_sum_op = torch.library.custom_op(
    "slime_fused::segment_sum",
    _segment_sum,
    mutates_args=(),
    schema="(Tensor values, Tensor cu_seqlens, bool mean, str backend) -> Tensor",
)
segment_sum_backward_op = torch.library.custom_op(
    "slime_fused::segment_sum_backward",
    _segment_sum_backward,
    mutates_args=(),
    schema="(Tensor d_out, Tensor cu_seqlens, SymInt size, bool mean, str backend) -> Tensor",
)
segment_sum_op.register_fake(lambda values, cu_seqlens, mean, backend: values.new_empty(cu_seqlens.shape[0] - 1))
segment_sum_backward_op.register_fake(lambda d_out, cu_seqlens, size, mean, backend: d_out.new_empty(size))
segment_sum_op.register_autograd(_segment_sum_autograd, setup_context=_segment_sum_setup)


# --- slime_terms: the outputs of SlimeTermsFunction, and dL/dlogp ---


def _slime_terms(logp: Tensor, cu_seqlens: Tensor, loss: str, backend: str, want_logp: bool) -> tuple[Tensor, ...]:
    outputs, d_logp = run_slime_terms(logp, cu_seqlens, loss_of(loss), backend, want_logp)
    return *outputs, logp.new_empty(0) if d_logp is None else d_logp


def _slime_terms_fake(logp: Tensor, cu_seqlens: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shapes: tuple[Any, ...] = ((), 3, cu_seqlens.shape[0] - 1, logp.shape if rest[-1] else 0)
    return tuple(logp.new_empty(shape) for shape in shapes)


def _slime_terms_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[-1])
    ctx.mark_non_differentiable(*output[1:])


def _slime_terms_autograd(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    refuse_transformed_backward(upstream)
    (d_logp,) = ctx.saved_tensors
    return d_logp * upstream, None, None, None, None


slime_terms_op = torch.library.custom_op(
    "slime_fused::slime_terms",
    _slime_terms,
    mutates_args=(),
    schema="(Tensor logp, Tensor cu_seqlens, str loss, str backend, bool want_logp)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
slime_terms_op.register_fake(_slime_terms_fake)
slime_terms_op.register_autograd(_slime_terms_autograd, setup_context=_slime_terms_setup)


# --- cross_entropy of given logits: (N,) token losses; (3, N) row_max, row_sum and logp ---

_LOGITS_OPTIONS = (
    "float label_smoothing, float z_loss, float logit_scale, float? logit_softcap, str backend, int ignore_index"
)


def _logits_options(flat: tuple[Any, ...]) -> tuple[TokenLoss, HeadTransform, str]:
    label_smoothing, z_loss, scale, softcap, backend = flat
    return TokenLoss(label_smoothing, z_loss), HeadTransform(scale, softcap), backend


def _logits_loss(logits: Tensor, labels: Tensor, needs_label: bool, *rest: Any) -> tuple[Tensor, Tensor]:
    *flat, ignore_index = rest
    token_loss, head, backend_name = _logits_options(tuple(flat))
    targets = logits_passes.row_targets(labels, ignore_index, logits.shape[-1], needs_label=needs_label)
    backend = resolve_backend(backend_name, logits.device, logits.dtype)
    stats = logits_passes.logits_forward(backend, logits, targets, head, token_loss)
    return stats.loss, torch.stack([stats.row_max, stats.row_sum, stats.logp])


def _logits_loss_fake(logits: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, dtype = labels.numel(), acc_dtype(logits.dtype)
    return logits.new_empty(rows, dtype=dtype), logits.new_empty((3, rows), dtype=dtype)


def _logits_loss_backward(upstream: Tensor, stats: Tensor, logits: Tensor, labels: Tensor, *rest: Any) -> Tensor:
    *flat, ignore_index = rest
    token_loss, head, backend_name = _logits_options(tuple(flat))
    targets = logits_passes.row_targets(labels, ignore_index, logits.shape[-1], needs_label=False)
    backend = resolve_backend(backend_name, logits.device, logits.dtype)
    return logits_passes.logits_backward(backend, logits, targets, head, token_loss, stats.unbind(), upstream)


def _logits_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, _, *ctx.options = inputs
    ctx.save_for_backward(output[1], logits, labels)
    ctx.mark_non_differentiable(output[1])


def _logits_loss_autograd(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    refuse_transformed_backward(upstream)
    gradient = logits_loss_backward_op(upstream, *ctx.saved_tensors, *ctx.options)
    return gradient, *[None] * (2 + len(ctx.options))


logits_loss_op = torch.library.custom_op(
    "slime_fused::cross_entropy",
    _logits_loss,
    mutates_args=(),
    schema=f"(Tensor logits, Tensor labels, bool needs_label, {_LOGITS_OPTIONS}) -> (Tensor, Tensor)",
)
logits_loss_backward_op = torch.library.custom_op(
    "slime_fused::cross_entropy_backward",
    _logits_loss_backward,
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor stats, Tensor logits, Tensor labels, {_LOGITS_OPTIONS}) -> Tensor",
)
logits_loss_op.register_fake(_logits_loss_fake)
logits_loss_backward_op.register_fake(
    lambda upstream, stats, logits, *rest: torch.empty_like(logits, memory_format=torch.contiguous_format)
)
logits_loss_op.register_autograd(_logits_loss_autograd, setup_context=_logits_loss_setup)
