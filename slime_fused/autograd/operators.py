"""The passes of the linear losses as `torch.library` operators, so that a compiled graph can hold them.

A compiled graph calls these; eager code calls the autograd functions of `token_losses.py` and `unit_losses.py`,
which hand their buffers out without a copy. An operator may not change its inputs or keep state: backward returns
new tensors here, and the per-token loss forms its logits again. Gradients that nobody wants are empty tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from slime_fused.autograd.gradient_store import refuse_transformed_backward
from slime_fused.autograd.token_losses import TokenPass, run_cross_entropy, statistic, token_kind
from slime_fused.autograd.unit_losses import run_unit_loss
from slime_fused.backends.base import HeadTransform, TokenLoss, acc_dtype
from slime_fused.engine.calls import HeadOptions, LabelledRows, LinearRequest, Wants, prepare_call
from slime_fused.engine.gradients import GradientDtypes, Gradients
from slime_fused.engine.sweeps import unscaled_dtype
from slime_fused.losses.registry import loss_of

# Schemas share these fragments; `flat_request` produces the values of the last one.
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? cu_seqlens"
_TOKEN_LOSS = "float label_smoothing, float z_loss"
_OPTIONS = (
    "bool shift, int ignore_index, float logit_scale, float? logit_softcap, float temperature, str backend, "
    "str workspace, str? tp_group, str? cp_group, str? dp_group, ScalarType? logits_dtype, "
    "ScalarType? compute_dtype, bool want_hidden, bool want_weight, bool want_bias"
)


def flat_request(request: LinearRequest) -> tuple[Any, ...]:
    """The values of the schemas' last fifteen arguments."""
    rows, o = request.rows, request.options
    head = (o.transform.scale, o.transform.softcap, o.transform.temperature, o.backend, str(o.workspace))
    groups = (o.tp_group, o.cp_group, o.dp_group)
    return rows.shift, rows.ignore_index, *head, *groups, o.logits_dtype, o.compute_dtype, *request.wants.flags


def _request(labels: Tensor, cu_seqlens: Tensor | None, flat: Sequence[Any]) -> LinearRequest:
    shift, ignore_index, scale, softcap, temperature, backend, workspace, *groups, logits_dtype, compute_dtype = (
        flat[:-3]
    )
    options = HeadOptions(
        HeadTransform(scale, softcap, temperature), logits_dtype, compute_dtype, backend, workspace, *groups
    )
    return LinearRequest(LabelledRows(labels, cu_seqlens, shift, ignore_index), options, Wants(*flat[-3:]))


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


@contextmanager
def _autograd_inside() -> Iterator[None]:
    """Let autograd follow what an operator does inside, for a loss's derivative with respect to log-probs.

    An operator runs below autograd's dispatch keys, where ``enable_grad`` alone records nothing.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


# --- unit_loss: the tensors of UnitOutputs, the gradients as they wait, the scale of d_weight ---


def _unit_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any) -> tuple[Any, ...]:
    cu_seqlens, key, given, names, asked, *flat = rest
    request = _request(labels, cu_seqlens, flat)
    by_name = dict(zip(names.split(), given, strict=True))
    with _autograd_inside():
        outputs, gradients, _ = run_unit_loss(hidden, weight, bias, request, loss_of(key), by_name, asked.split())
    dtypes = _waiting(hidden, weight, bias, request.options.compute_dtype)
    tokens = outputs.tokens.view(outputs.tokens.shape[0], *labels.shape)
    return (
        outputs.loss,
        outputs.numbers,
        outputs.mean_logps,
        tokens,
        *_dense(gradients, hidden, dtypes),
        _scale_of(gradients, outputs.loss),
    )


def _unit_loss_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    cu_seqlens, key, _, _, asked, *_ = rest
    loss = loss_of(key)
    sequences = LabelledRows(labels, cu_seqlens).num_sequences
    numbers = len(loss.term_names) + len(loss.metric_names)
    shapes: tuple[Any, ...] = ((), numbers, sequences, (len(asked.split()), *labels.shape))
    dtype = acc_dtype(hidden.dtype)
    outputs = [hidden.new_empty(shape, dtype=dtype) for shape in shapes]
    gradients = _fake_gradients(hidden, weight, _waiting(hidden, weight, bias, rest[-4]), rest[-3:])
    return *outputs, *gradients, hidden.new_empty((), dtype=dtype)


def _unit_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_gradients(ctx, inputs, output[4:])
    ctx.num_given = len(inputs[6])
    ctx.mark_non_differentiable(*output[1:])


def _unit_loss_autograd(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = _scaled_gradients(ctx, upstream)
    # The list of what was given wants a list.
    return *gradients[:6], [None] * ctx.num_given, *gradients[7:]


unit_loss_op = torch.library.custom_op(
    "slime_fused::unit_loss",
    _unit_loss,
    mutates_args=(),
    schema=f"({_HEAD}, str loss, Tensor[] given, str names, str asked, {_OPTIONS})"
    f" -> ({', '.join(['Tensor'] * 8)})",
)
unit_loss_op.register_fake(_unit_loss_fake)
unit_loss_op.register_autograd(_unit_loss_autograd, setup_context=_unit_loss_setup)


# --- linear_cross_entropy: the mean or summed loss, its gradients as they wait, the scale of d_weight ---


def _cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    cu_seqlens, mean, label_smoothing, z_loss, *flat = rest
    request = _request(labels, cu_seqlens, flat)
    token_loss = TokenLoss(label_smoothing, z_loss)
    loss, gradients, _ = run_cross_entropy(hidden, weight, bias, request, mean, token_loss)
    dtypes = _waiting(hidden, weight, bias, request.options.compute_dtype)
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


# --- linear_token_loss: losses and entropies like labels; statistics (4 or 8, N_all); R W like hidden ---


def _token_pass(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rest: tuple[Any, ...]
) -> TokenPass:
    cu_seqlens, label_smoothing, z_loss, statistics, *flat = rest
    kind = token_kind(TokenLoss(label_smoothing, z_loss), statistics.split(), keeps_residual=False)
    return TokenPass(prepare_call(kind, hidden, weight, bias, _request(labels, cu_seqlens, flat)))


def _has_entropy(rest: tuple[Any, ...]) -> bool:
    return "entropy" in rest[3].split()


def _empty_unscaled(hidden: Tensor, rest: tuple[Any, ...]) -> Tensor:
    """Room for R W, where forward forms it as far as a trace knows."""
    has_unscaled = rest[-3] and not _has_entropy(rest)
    return hidden.new_empty(hidden.shape if has_unscaled else 0, dtype=unscaled_dtype(rest[-4] or hidden.dtype))


def _token_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        run = _token_pass(hidden, weight, bias, labels, rest)
        loss = run.forward()
        stats, unscaled = run.all_stats(), run.sweep.unscaled
        entropy = statistic("entropy", stats).view(labels.shape) if _has_entropy(rest) else loss.new_empty(0)
        if unscaled is None:
            # The graph was traced before the plan was known: where "fused" forms no R W, zeros stand for it.
            unscaled = _empty_unscaled(hidden, rest).zero_()
        elif rest[-3]:
            unscaled = unscaled.view(hidden.shape)
    return loss.view(labels.shape), entropy, stats, unscaled


def _token_loss_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    dtype = acc_dtype(hidden.dtype)
    count = 8 if token_kind(TokenLoss(), rest[3].split()).wants_distribution else 4
    return (
        hidden.new_empty(labels.shape, dtype=dtype),
        hidden.new_empty(labels.shape if _has_entropy(rest) else 0, dtype=dtype),
        hidden.new_empty(count, labels.numel(), dtype=dtype),
        _empty_unscaled(hidden, rest),
    )


def _token_loss_backward(
    upstream: Tensor,
    d_entropy: Tensor,
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
        run.resume(unscaled.view(-1, hidden.shape[-1]) if unscaled.numel() else None, stats)
        # keeps=True: the unscaled gradient is an input here and must not change.
        gradients = run.backward(upstream, d_entropy if _has_entropy(rest) else None, keeps=True)
        return _dense(gradients, hidden, GradientDtypes.of(hidden, weight, weight if bias is None else bias))


def _token_loss_backward_fake(
    upstream: Tensor,
    d_entropy: Tensor,
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
    ctx.save_for_backward(*output[2:], *inputs[:5])
    ctx.rest = inputs[5:]
    ctx.set_materialize_grads(False)  # else zeros come as real tensors where all others are fake
    ctx.mark_non_differentiable(*output[2:])


def _token_loss_autograd(ctx: Any, upstream: Tensor | None, d_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    for given in (upstream, d_entropy):
        if given is not None:
            refuse_transformed_backward(given)
    known = upstream if d_entropy is None else d_entropy
    if known is None:
        return (None,) * (5 + len(ctx.rest))
    upstream = torch.zeros_like(known) if upstream is None else upstream
    if d_entropy is None:
        d_entropy = torch.zeros_like(known) if _has_entropy((None, *ctx.rest)) else known.new_empty(0)
    gradients = token_loss_backward_op(upstream, d_entropy, *ctx.saved_tensors, *ctx.rest)
    wanted = zip(gradients, ctx.rest[-3:], strict=True)
    return *[g if want else None for g, want in wanted], *[None] * (2 + len(ctx.rest))


token_loss_op = torch.library.custom_op(
    "slime_fused::linear_token_loss",
    _token_loss,
    mutates_args=(),
    schema=f"({_HEAD}, {_TOKEN_LOSS}, str statistics, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
token_loss_backward_op = torch.library.custom_op(
    "slime_fused::linear_token_loss_backward",
    _token_loss_backward,
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor d_entropy, Tensor stats, Tensor unscaled, {_HEAD}, {_TOKEN_LOSS}, "
    f"str statistics, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
token_loss_op.register_fake(_token_loss_fake)
token_loss_backward_op.register_fake(_token_loss_backward_fake)
token_loss_op.register_autograd(_token_loss_autograd, setup_context=_token_loss_setup)
