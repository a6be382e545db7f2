"""The passes of the linear losses as `torch.library` operators, so that a compiled graph can hold them.

A compiled graph calls these; eager code calls the autograd functions of `functions.py`, which hand their buffers
out without a copy. An operator may not change its inputs or keep state, so backward returns new tensors here, and
the per-token loss forms its logits again. Gradients that nobody wants are empty tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slime_fused.autograd.functions import (
    SlimeParameters,
    TokenPass,
    refuse_transformed_backward,
    run_cross_entropy,
    run_slime,
)
from slime_fused.backends.base import TokenLoss, acc_dtype
from slime_fused.engine.calls import HeadOptions, Wants, prepare_call
from slime_fused.engine.gradients import GradientDtypes, Gradients
from slime_fused.engine.sweeps import unscaled_dtype

# Schemas share these fragments; `flat_options` produces the last one's values.
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? cu_seqlens"
_TOKEN_LOSS = "float label_smoothing, float z_loss"
_OPTIONS = (
    "bool shift, int ignore_index, float logit_scale, float? logit_softcap, str backend, str workspace, "
    "str? tp_group, str? cp_group, str? dp_group, ScalarType? logits_dtype, ScalarType? compute_dtype, "
    "bool want_hidden, bool want_weight, bool want_bias"
)


def flat_options(options: HeadOptions, wants: Wants) -> tuple[Any, ...]:
    """The values of the schemas' last fourteen arguments."""
    o = options
    workspace = str(o.workspace)
    fields = (o.shift, o.ignore_index, o.logit_scale, o.logit_softcap, o.backend, workspace)
    return *fields, o.tp_group, o.cp_group, o.dp_group, o.logits_dtype, o.compute_dtype, *wants.flags


def _options(flat: tuple[Any, ...]) -> tuple[HeadOptions, Wants]:
    return HeadOptions(*flat[:11]), Wants(*flat[11:])


def _waiting(hidden: Tensor, weight: Tensor, bias: Tensor | None, compute: torch.dtype | None) -> GradientDtypes:
    return GradientDtypes.of(hidden, weight, weight if bias is None else bias).waiting(compute or weight.dtype)


def _dense(gradients: Gradients, hidden: Tensor, dtypes: GradientDtypes) -> tuple[Tensor, ...]:
    d_hidden = None if gradients.hidden is None else gradients.hidden.view(hidden.shape)
    pairs = zip((d_hidden, gradients.weight, gradients.bias), dtypes, strict=True)
    return tuple(hidden.new_empty(0, dtype=dtype) if g is None else g for g, dtype in pairs)


def _fake_gradients(
    hidden: Tensor, weight: Tensor, dtypes: GradientDtypes, wants: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    shapes = zip((hidden.shape, weight.shape, weight.shape[:1]), dtypes, wants, strict=True)
    return tuple(hidden.new_empty(shape if want else (0,), dtype=dtype) for shape, dtype, want in shapes)


def _scale_of(gradients: Gradients, loss: Tensor) -> Tensor:
    """What d_weight is multiplied with; never ``loss`` itself, as outputs may not share memory."""
    scale = gradients.weight_scale
    return torch.ones_like(loss) if scale is None else scale.to(loss.dtype)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], gradients_and_scale: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*gradients_and_scale)
    hidden, weight, bias = inputs[:3]
    ctx.dtypes = GradientDtypes.of(hidden, weight, bias)
    ctx.wanted = inputs[-3:]
    ctx.num_rest = len(inputs) - 3


def _scaled_gradients(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    """Backward of the operators whose gradients were formed in forward."""
    refuse_transformed_backward(upstream)
    d_hidden, d_weight, d_bias, scale = ctx.saved_tensors
    scaled = (d_hidden, upstream), (d_weight, upstream / scale), (d_bias, upstream)
    gradients = [
        (grad * factor).to(dtype) if wanted else None
        for (grad, factor), dtype, wanted in zip(scaled, ctx.dtypes, ctx.wanted, strict=True)
    ]
    return *gradients, *[None] * ctx.num_rest


# --- slime_loss: the outputs of SlimeLossFunction, the gradients as they wait, the scale of d_weight ---


def _slime_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any) -> tuple[Any, ...]:
    cu_seqlens, numbers, reduction, *flat = rest
    parameters = SlimeParameters(tuple(numbers), reduction)
    options, wants = _options(tuple(flat))
    outputs, gradients, _ = run_slime(hidden, weight, bias, labels, cu_seqlens, parameters, options, wants)
    dtypes = _waiting(hidden, weight, bias, options.compute_dtype)
    return *outputs, *_dense(gradients, hidden, dtypes), _scale_of(gradients, outputs[0])


def _slime_loss_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    cu_seqlens = rest[0]
    sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = acc_dtype(hidden.dtype)
    scalars = [hidden.new_empty((), dtype=dtype) for _ in range(5)]
    pairs = [hidden.new_empty(sequences // 2, dtype=dtype) for _ in range(2)]
    gradients = _fake_gradients(hidden, weight, _waiting(hidden, weight, bias, rest[-4]), rest[-3:])
    return *scalars[:4], *pairs, *gradients, scalars[4]


def _slime_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_gradients(ctx, inputs, output[6:])
    ctx.mark_non_differentiable(*output[1:])


slime_loss_op = torch.library.custom_op(
    "slime_fused::slime_loss",
    _slime_loss,
    mutates_args=(),
    schema=f"({_HEAD}, float[] numbers, str reduction, {_OPTIONS}) -> ({', '.join(['Tensor'] * 10)})",
)
slime_loss_op.register_fake(_slime_loss_fake)
slime_loss_op.register_autograd(_scaled_gradients, setup_context=_slime_loss_setup)


# --- linear_cross_entropy: the mean or summed loss, its gradients as they wait, the scale of d_weight ---


def _cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    cu_seqlens, mean, label_smoothing, z_loss, *flat = rest
    token_loss = TokenLoss(label_smoothing, z_loss)
    options, wants = _options(tuple(flat))
    loss, gradients, _ = run_cross_entropy(
        hidden, weight, bias, labels, cu_seqlens, mean, token_loss, options, wants
    )
    dtypes = _waiting(hidden, weight, bias, options.compute_dtype)
    return loss, *_dense(gradients, hidden, dtypes), _scale_of(gradients, loss)


def _cross_entropy_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    loss, scale = (hidden.new_empty((), dtype=acc_dtype(hidden.dtype)) for _ in range(2))
    return loss, *_fake_gradients(hidden, weight, _waiting(hidden, weight, bias, rest[-4]), rest[-3:]), scale


def _cross_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_gradients(ctx, inputs, output[1:])
    ctx.mark_non_differentiable(*output[1:])


cross_entropy_op = torch.library.custom_op(
    "slime_fused::linear_cross_entropy",
    _cross_entropy,
    mutates_args=(),
    schema=f"({_HEAD}, bool mean, {_TOKEN_LOSS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
cross_entropy_op.register_fake(_cross_entropy_fake)
cross_entropy_op.register_autograd(_scaled_gradients, setup_context=_cross_entropy_setup)


# --- linear_token_loss: losses like labels; statistics (4, N_all); R W like hidden ---


def _token_pass(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rest: tuple[Any, ...]
) -> TokenPass:
    cu_seqlens, label_smoothing, z_loss, *flat = rest
    token_loss = TokenLoss(label_smoothing, z_loss)
    options, wants = _options(tuple(flat))
    call = prepare_call(
        "token", hidden, weight, labels, bias, cu_seqlens, options, wants, token_loss, keeps_residual=False
    )
    return TokenPass(call)


def _token_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        run = _token_pass(hidden, weight, bias, labels, rest)
        loss = run.forward()
        stats, unscaled = run.all_stats(), run.sweep.unscaled
    if unscaled is not None:
        d_hidden = unscaled.view(hidden.shape)
    else:
        # The graph was traced before the plan was known: where "fused" forms no R W, zeros stand for it.
        dtype = unscaled_dtype(rest[-4] or hidden.dtype)
        d_hidden = hidden.new_zeros(hidden.shape if rest[-3] else 0, dtype=dtype)
    return loss.view(labels.shape), stats, d_hidden


def _token_loss_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    dtype = acc_dtype(hidden.dtype)
    stats = hidden.new_empty(4, labels.numel(), dtype=dtype)
    unscaled = hidden.new_empty(hidden.shape if rest[-3] else (0,), dtype=unscaled_dtype(rest[-4] or hidden.dtype))
    return hidden.new_empty(labels.shape, dtype=dtype), stats, unscaled


def _token_loss_backward(
    upstream: Tensor,
    stats: Tensor,
    unscaled: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        run = _token_pass(hidden, weight, bias, labels, rest)
        want_hidden = rest[-3]
        run.resume(unscaled.view(-1, hidden.shape[-1]) if want_hidden else None, stats)
        # keeps=True: the unscaled gradient is an input here and must not change.
        gradients = run.backward(upstream.flatten(), keeps=True)
        return _dense(gradients, hidden, GradientDtypes.of(hidden, weight, weight if bias is None else bias))


def _token_loss_backward_fake(
    upstream: Tensor,
    stats: Tensor,
    unscaled: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dtypes = GradientDtypes.of(hidden, weight, weight if bias is None else bias)
    return _fake_gradients(hidden, weight, dtypes, rest[-3:])


def _token_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:5])
    ctx.rest = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])


def _token_loss_autograd(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    refuse_transformed_backward(upstream)
    gradients = token_loss_backward_op(upstream, *ctx.saved_tensors, *ctx.rest)
    wanted = zip(gradients, ctx.rest[-3:], strict=True)
    return *[g if want else None for g, want in wanted], *[None] * (2 + len(ctx.rest))


token_loss_op = torch.library.custom_op(
    "slime_fused::linear_token_loss",
    _token_loss,
    mutates_args=(),
    schema=f"({_HEAD}, {_TOKEN_LOSS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
token_loss_backward_op = torch.library.custom_op(
    "slime_fused::linear_token_loss_backward",
    _token_loss_backward,
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor stats, Tensor unscaled, {_HEAD}, {_TOKEN_LOSS}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
)
token_loss_op.register_fake(_token_loss_fake)
token_loss_backward_op.register_fake(_token_loss_backward_fake)
token_loss_op.register_autograd(_token_loss_autograd, setup_context=_token_loss_setup)
