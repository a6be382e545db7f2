"""The autograd functions, with hand-written backward passes.

`SlimeLossFunction` and `CrossEntropyFunction` form their gradients in the forward pass, where the residual lies
in the workspace anyway; backward only multiplies them with the upstream scalar. `TokenLossFunction` takes an
arbitrary upstream gradient per token: R W is formed in forward, and backward scales its rows, or (plan "fused")
all gradients are formed in backward.

None is twice differentiable, and each says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slime_fused.autograd.tensors import is_batched
from slime_fused.backends import resolve_backend
from slime_fused.backends.base import Backend, SlimePairs, TokenLoss, TokenStats, acc_dtype
from slime_fused.engine import streams
from slime_fused.engine.calls import Call, HeadOptions, Wants, prepare_call
from slime_fused.engine.distributed import BatchShare, find_group
from slime_fused.engine.gradients import GradientDtypes, Gradients
from slime_fused.engine.layout import response_lengths
from slime_fused.engine.sweeps import plan_sweep


@dataclass(frozen=True)
class SlimeParameters:
    """`SlimeLossConfig` in the form that an operator schema can carry."""

    numbers: tuple[float, ...]
    """lambda_w, lambda_l, lambda_d, delta, margin_hard, margin_soft, kappa, power."""
    reduction: str


class _GradientStore:
    """Gradients formed in forward, handed out by backward without a copy unless the graph is kept."""

    def __init__(self, gradients: Gradients, dtypes: GradientDtypes, backend: Backend) -> None:
        self._gradients: Gradients | None = gradients
        self._dtypes = dtypes
        self._backend = backend

    def hand_out(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(d_hidden, d_weight, d_bias) times the scalar ``upstream``."""
        refuse_transformed_backward(upstream)
        stored = self._gradients
        if stored is None:
            raise RuntimeError(
                "this loss formed its gradients in the forward pass and handed them out in the first backward(); "
                "call that with retain_graph=True to go through the graph again"
            )
        keeps = graph_is_kept()
        if not keeps:
            # The store lets go of the tensors, so that autograd can adopt them as .grad instead of copying.
            self._gradients = None
        gradients = stored.times(upstream, self._dtypes, self._backend, keeps=keeps)
        return gradients.hidden, gradients.weight, gradients.bias


class SlimeLossFunction(torch.autograd.Function):
    """(loss, anchor, margin_loss, stabilizer, chosen_logps, rejected_logps); only the loss is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        parameters: SlimeParameters,
        options: HeadOptions,
        wants: Wants,
    ) -> tuple[Tensor, ...]:
        """Run the plan; keep the gradients."""
        ctx.set_materialize_grads(False)  # else backward fills a tensor of zeros for every output but the loss
        outputs, gradients, backend = run_slime(
            hidden, weight, bias, labels, cu_seqlens, parameters, options, wants
        )
        ctx.store = _GradientStore(_like(gradients, hidden), GradientDtypes.of(hidden, weight, bias), backend)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        """The kept gradients times the upstream scalar; None where nothing comes from upstream."""
        if upstream is None:
            return (None,) * 8
        return *ctx.store.hand_out(upstream), None, None, None, None, None


def run_slime(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    parameters: SlimeParameters,
    options: HeadOptions,
    wants: Wants,
) -> tuple[tuple[Tensor, ...], Gradients, Backend]:
    """(the six outputs of `SlimeLossFunction`, gradients in their waiting dtypes, backend)."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        call = prepare_call("slime", hidden, weight, labels, bias, cu_seqlens, options, wants, TokenLoss())
        share = BatchShare.of(call.lengths, find_group(options.dp_group), hidden.device)
        weights = streams.slime_weights(parameters.numbers, parameters.reduction, share)
        pairs, gradients = streams.slime_forward(call.head, call.layout, call.plan, weights, call.context)
        return loss_outputs(pairs), gradients, call.head.backend


def loss_outputs(pairs: SlimePairs) -> tuple[Tensor, ...]:
    """(loss, anchor, margin_loss, stabilizer, chosen_logps, rejected_logps) from the pairs' shares."""
    anchor, margin_loss, stabilizer = pairs.anchor.sum(), pairs.margin_loss.sum(), pairs.stabilizer.sum()
    return (
        anchor + margin_loss + stabilizer,
        anchor,
        margin_loss,
        stabilizer,
        pairs.chosen_logps,
        pairs.rejected_logps,
    )


class CrossEntropyFunction(torch.autograd.Function):
    """The mean or summed token loss of a linear head: a scalar in acc dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        mean: bool,
        token_loss: TokenLoss,
        options: HeadOptions,
        wants: Wants,
    ) -> Tensor:
        """Run the plan; keep the gradients."""
        loss, gradients, backend = run_cross_entropy(
            hidden, weight, bias, labels, cu_seqlens, mean, token_loss, options, wants
        )
        ctx.store = _GradientStore(_like(gradients, hidden), GradientDtypes.of(hidden, weight, bias), backend)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """The kept gradients times the upstream scalar."""
        return *ctx.store.hand_out(upstream), None, None, None, None, None, None


def run_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    mean: bool,
    token_loss: TokenLoss,
    options: HeadOptions,
    wants: Wants,
) -> tuple[Tensor, Gradients, Backend]:
    """(loss, gradients in their waiting dtypes, backend)."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        call = prepare_call("cross_entropy", hidden, weight, labels, bias, cu_seqlens, options, wants, token_loss)
        rows = call.layout.num_rows
        if rows == 0 and mean:
            raise ValueError("labels: expected at least one label that is not ignore_index, got none")
        share = 1 / rows if mean else 1.0
        total, gradients = streams.cross_entropy_forward(call.head, call.layout, call.plan, share)
        return total * share, gradients, call.head.backend


class TokenLossFunction(torch.autograd.Function):
    """The loss of every token, in the shape of ``labels``, acc dtype, 0 where the label is ignored."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        token_loss: TokenLoss,
        options: HeadOptions,
        wants: Wants,
    ) -> Tensor:
        """Run the plan; keep the statistics and, as the plan has it, R W and R."""
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            call = prepare_call("token", hidden, weight, labels, bias, cu_seqlens, options, wants, token_loss)
            ctx.pass_ = TokenPass(call)
            # The inputs again, so that an in-place change of one before backward is noticed.
            ctx.save_for_backward(hidden, weight, *(() if bias is None else (bias,)))
            return ctx.pass_.forward().view(labels.shape)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """dX, dW and db for one coefficient per token."""
        refuse_transformed_backward(upstream)
        hidden, *_ = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = _like(ctx.pass_.backward(upstream.flatten(), keeps=graph_is_kept()), hidden)
        return gradients.hidden, gradients.weight, gradients.bias, None, None, None, None, None


class TokenPass:
    """The two halves of a per-token loss and what the second needs of the first."""

    def __init__(self, call: Call) -> None:
        self._layout = call.layout
        self._head = call.head
        self.sweep = plan_sweep(call.head, call.layout, call.plan)

    def forward(self) -> Tensor:
        """(N_all,) token losses."""
        self.sweep.forward()
        return self.spread(self.sweep.stats.loss)

    def spread(self, values: Tensor) -> Tensor:
        """(N,) of the labelled rows -> (N_all,), 0 elsewhere."""
        rows = self._layout.rows
        if rows is None:
            return values
        return values.new_zeros(self._layout.targets.shape[0]).index_copy_(0, rows, values)

    def all_stats(self) -> Tensor:
        """(4, N_all): what `resume` needs of a forward pass, 0 where the label is ignored."""
        return torch.stack([self.spread(values) for values in self.sweep.stats.tensors()])

    def resume(self, unscaled_hidden_grad: Tensor | None, stats: Tensor) -> None:
        """Take the place of a forward pass whose results these are."""
        self.sweep.unscaled = unscaled_hidden_grad
        self.sweep.stats = TokenStats(*(self._labelled(values) for values in stats))

    def backward(self, upstream: Tensor, *, keeps: bool) -> Gradients:
        """Gradients for the coefficients ``upstream`` (N_all,); ``keeps`` leaves this pass fit for another one."""
        coefficient = self._labelled(upstream.to(acc_dtype(self._head.hidden.dtype)))
        gradients = self.sweep.backward(coefficient, keeps=keeps)
        # What a kept graph needs again is no part of these.
        return gradients.times(None, self._head.grad_dtypes, self._head.backend, keeps=False)

    def _labelled(self, values: Tensor) -> Tensor:
        rows = self._layout.rows
        return values if rows is None else values.index_select(0, rows)


class SlimeTermsFunction(torch.autograd.Function):
    """The SLIME loss from token log-probs (N,): the outputs of `SlimeLossFunction`."""

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, cu_seqlens: Tensor, parameters: SlimeParameters, backend_name: str, wants: bool
    ) -> tuple[Tensor, ...]:
        """Terms and their derivative in one visit."""
        ctx.set_materialize_grads(False)
        outputs, d_logp = run_slime_terms(logp, cu_seqlens, parameters, backend_name, wants)
        if d_logp is not None:
            ctx.save_for_backward(d_logp)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        """G times the upstream scalar; None where nothing comes from upstream."""
        if upstream is None:
            return (None,) * 5
        refuse_transformed_backward(upstream)
        (d_logp,) = ctx.saved_tensors
        return d_logp * upstream, None, None, None, None


def run_slime_terms(
    logp: Tensor, cu_seqlens: Tensor, parameters: SlimeParameters, backend_name: str, wants: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """(the six outputs of `SlimeTermsFunction`, dL/dlogp where wanted). Waits for the device to read the bounds."""
    lengths = response_lengths(cu_seqlens, logp.shape[0])
    share = BatchShare.of(lengths, None, logp.device)
    weights = streams.slime_weights(parameters.numbers, parameters.reduction, share)
    backend = resolve_backend(backend_name, logp.device, logp.dtype)
    pairs, d_logp = streams.slime_terms(backend, logp.contiguous(), cu_seqlens.contiguous(), weights, wants)
    return loss_outputs(pairs), d_logp


def refuse_transformed_backward(upstream: Tensor) -> None:
    """Backward runs with gradients enabled only under create_graph=True; ``upstream`` may stand for a batch."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "slime_fused losses are not twice differentiable: backward was called with create_graph=True; "
            "use slime_fused.reference for second derivatives"
        )
    if is_batched(upstream):
        raise RuntimeError(
            "slime_fused losses take one upstream gradient at a time, got a batch (is_grads_batched=True or vmap): "
            "call torch.autograd.grad(..., retain_graph=True) for each; slime_fused.reference takes batches"
        )


def graph_is_kept() -> bool:
    """Whether the running backward was called with retain_graph=True."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _like(gradients: Gradients, hidden: Tensor) -> Gradients:
    """With d_hidden in the shape of ``hidden``."""
    if gradients.hidden is None:
        return gradients
    return replace(gradients, hidden=gradients.hidden.view(hidden.shape))
