"""The autograd functions of cross-entropy and of per-token losses, with hand-written backward passes.

`CrossEntropyFunction`, and the losses of `unit_losses.py`, form their gradients in the forward pass, where the
residual lies in the workspace anyway; backward only multiplies them with the upstream scalar. `TokenLossFunction`
takes an arbitrary upstream gradient per token: R W is formed in forward, and backward scales its rows, or (plan
"fused") all gradients are formed in backward.

None is twice differentiable, and each says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slime_fused.autograd.gradient_store import (
    GradientStore,
    graph_is_kept,
    like_hidden,
    refuse_transformed_backward,
)
from slime_fused.backends import resolve_backend
from slime_fused.backends.base import Backend, TokenLoss, acc_dtype
from slime_fused.engine import streams
from slime_fused.engine.calls import Call, LinearRequest, LossKind, prepare_call
from slime_fused.engine.distributed import count_batch
from slime_fused.engine.gradients import GradientDtypes, Gradients
from slime_fused.engine.layout import TokenLayout, response_lengths
from slime_fused.engine.row_results import RowResults
from slime_fused.engine.sweeps import plan_sweep
from slime_fused.engine.units import Loss, Pairs


class CrossEntropyFunction(torch.autograd.Function):
    """The mean or summed token loss of a linear head: a scalar in acc dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        request: LinearRequest,
        mean: bool,
        token_loss: TokenLoss,
    ) -> Tensor:
        """Run the plan; keep the gradients."""
        loss, gradients, backend = run_cross_entropy(hidden, weight, bias, request, mean, token_loss)
        ctx.store = GradientStore(like_hidden(gradients, hidden), GradientDtypes.of(hidden, weight, bias), backend)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """The kept gradients times the upstream scalar."""
        return *ctx.store.hand_out(upstream), None, None, None


def run_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    request: LinearRequest,
    mean: bool,
    token_loss: TokenLoss,
) -> tuple[Tensor, Gradients, Backend]:
    """(loss, gradients in their waiting dtypes, backend)."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        call = prepare_call(LossKind("token", token_loss), hidden, weight, bias, request)
        rows = call.layout.num_rows
        if rows == 0 and mean:
            raise ValueError("labels: expected at least one label that is not ignore_index, got none")
        share = 1 / rows if mean else 1.0
        total, gradients = streams.cross_entropy_forward(call.head, call.layout, call.plan, share)
        return total * share, gradients, call.head.backend


STATISTICS = ("entropy", "mean_logit", "is_top1", "sum_sq_probs", "lse")
"""What a per-token loss can tell of each token beside its loss."""


class TokenLossFunction(torch.autograd.Function):
    """The loss of every token, in the shape of the labels, acc dtype, 0 where the label is ignored; and statistics.

    Of these, `STATISTICS` in the order asked for, the entropy is differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        request: LinearRequest,
        token_loss: TokenLoss,
        statistics: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        """Run the plan; keep the statistics and, as the plan has it, R W and R, or the logits."""
        ctx.set_materialize_grads(False)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            call = prepare_call(token_kind(token_loss, statistics), hidden, weight, bias, request)
            ctx.pass_ = TokenPass(call)
            # The inputs again, so that an in-place change of one before backward is noticed.
            ctx.save_for_backward(hidden, weight, *(() if bias is None else (bias,)))
            shape = request.rows.labels.shape
            loss = ctx.pass_.forward().view(shape)
            told = ctx.pass_.statistics(statistics, shape)
        ctx.statistics = statistics
        ctx.mark_non_differentiable(*(x for name, x in zip(statistics, told, strict=True) if name != "entropy"))
        return loss, *told

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *of_statistics: Tensor | None) -> tuple[Any, ...]:
        """dX, dW and db for one coefficient per token, or two."""
        d_entropy = dict(zip(ctx.statistics, of_statistics, strict=True)).get("entropy")
        given = [x for x in (upstream, d_entropy) if x is not None]
        if not given:
            return (None,) * 6
        for coefficient in given:
            refuse_transformed_backward(coefficient)
        d_loss = torch.zeros_like(given[0]) if upstream is None else upstream
        hidden, *_ = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = ctx.pass_.backward(d_loss, d_entropy, keeps=graph_is_kept())
            gradients = like_hidden(gradients, hidden)
        return gradients.hidden, gradients.weight, gradients.bias, None, None, None


def token_kind(token_loss: TokenLoss, statistics: Sequence[str], *, keeps_residual: bool = True) -> LossKind:
    """What the engine must know of a per-token loss."""
    return LossKind(
        "later",
        token_loss,
        wants_distribution=needs_distribution(statistics),
        mixes_entropy="entropy" in statistics,
        keeps_residual=keeps_residual,
    )


def needs_distribution(statistics: Sequence[str]) -> bool:
    """Whether one of `STATISTICS` takes more than the log-sum-exp."""
    return any(name != "lse" for name in statistics)


def statistic(name: str, known: Tensor) -> Tensor:
    """One of `STATISTICS` (...), from `spread_results` as (K, ...); 0 (False) where the label is ignored."""
    row_max, row_sum, _, _, *distribution = known.unbind()
    if name == "lse":
        # Of an ignored row both are 0; where all logits are -inf, the sum.
        return torch.where(row_sum == 0, row_max, row_max + row_sum.log())
    value = distribution[("entropy", "sum_sq_probs", "is_top1", "mean_logit").index(name)]
    return value > 0 if name == "is_top1" else value.clone()


def spread_results(results: RowResults, layout: TokenLayout) -> Tensor:
    """(4, N_all), or (8, N_all), from (N,) each: 0 where the label is ignored."""
    return torch.stack([layout.spread(values) for values in results.tensors()])


class TokenPass:
    """The two halves of a per-token loss and what the second needs of the first."""

    def __init__(self, call: Call) -> None:
        self._layout = call.layout
        self._head = call.head
        self.sweep = plan_sweep(call.head, call.layout, call.plan)

    def forward(self) -> Tensor:
        """(N_all,) token losses."""
        self.sweep.forward()
        return self._layout.spread(self.sweep.stats.loss)

    def all_stats(self) -> Tensor:
        """What `resume` needs of a forward pass: see `spread_results`."""
        return spread_results(self.sweep.stats, self._layout)

    def statistics(self, names: Sequence[str], shape: torch.Size) -> list[Tensor]:
        """In the ``shape`` of the labels each, in memory of their own, which callers may change."""
        if not names:
            return []
        known = self.all_stats()
        known = known.view(known.shape[0], *shape)
        return [statistic(name, known) for name in names]

    def resume(self, unscaled_hidden_grad: Tensor | None, stats: Tensor) -> None:
        """Take the place of a forward pass whose results these are."""
        self.sweep.unscaled = unscaled_hidden_grad
        self.sweep.stats = RowResults.of(self._layout.of_labelled(values) for values in stats)

    def backward(self, d_loss: Tensor, d_entropy: Tensor | None, *, keeps: bool) -> Gradients:
        """Gradients for one coefficient per token, in the shape of the labels, and one of its entropy if there is.

        ``keeps`` leaves this pass fit for another one.
        """
        coefficient, entropy = self._of_rows(d_loss), None if d_entropy is None else self._of_rows(d_entropy)
        gradients = self.sweep.backward(coefficient, entropy, keeps=keeps)
        # What a kept graph needs again is no part of these.
        return gradients.times(None, self._head.grad_dtypes, self._head.backend, keeps=False)

    def _of_rows(self, upstream: Tensor) -> Tensor:
        return self._layout.of_labelled(upstream.flatten().to(acc_dtype(self._head.hidden.dtype)))


class SlimeTermsFunction(torch.autograd.Function):
    """The SLIME loss from token log-probs (N,): loss, its three terms (3,), mean log-probs (2P,)."""

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, cu_seqlens: Tensor, loss: Loss, backend_name: str, wants: bool
    ) -> tuple[Tensor, ...]:
        """Terms and their derivative in one visit."""
        ctx.set_materialize_grads(False)
        outputs, d_logp = run_slime_terms(logp, cu_seqlens, loss, backend_name, wants)
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
    logp: Tensor, cu_seqlens: Tensor, loss: Loss, backend_name: str, wants: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """(the outputs of `SlimeTermsFunction`, dL/dlogp where wanted). Waits for the device to read the bounds."""
    lengths = response_lengths(cu_seqlens, logp.shape[0])
    batch = count_batch(lengths, None, logp.device)
    backend = resolve_backend(backend_name, logp.device, logp.dtype)
    bounds, logp = cu_seqlens.contiguous(), logp.contiguous()
    terms, d_logp = loss.evaluate(Pairs(logp, tuple(lengths), bounds, batch), backend, wants_gradient=wants)
    means = logp.new_empty(len(lengths))
    backend.segment_sum(logp, bounds, means, mean=True)
    return (terms.loss.sum(), torch.stack([terms.terms[name].sum() for name in loss.term_names]), means), d_logp
