"""Runs a plan: one function per loss, over the chunk engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slime_fused.backends.base import Backend, SlimePairs, SlimeWeights, TokenStats
from slime_fused.engine.chunks import ChunkEngine, Head, RowSet, join
from slime_fused.engine.distributed import BatchShare, ContextShard
from slime_fused.engine.gradients import Gradients
from slime_fused.engine.head_sum import HeadSum
from slime_fused.engine.layout import TokenLayout
from slime_fused.engine.plan import Plan
from slime_fused.engine.sweeps import plan_sweep, row_sets


def slime_forward(
    head: Head,
    layout: TokenLayout,
    plan: Plan,
    weights: SlimeWeights,
    context: ContextShard | None = None,
) -> tuple[SlimePairs, Gradients]:
    """The SLIME loss by pair and, where wanted, the gradients of its sum."""
    run = _slime_stream if plan.kind == "stream" else _slime_sweep
    return run(head, layout, plan, weights, context)


def _slime_stream(
    head: Head,
    layout: TokenLayout,
    plan: Plan,
    weights: SlimeWeights,
    context: ContextShard | None,
) -> tuple[SlimePairs, Gradients]:
    """Whole pairs at a time: their coefficients are known as soon as their own log-probs are."""
    num_pairs = len(layout.lengths) // 2
    starts = cumulative(layout.lengths)
    bounds = layout.ints(_chunk_bounds(layout, plan))
    engine, total = ChunkEngine(head, layout, plan), HeadSum(head, plan)
    d_hidden = engine.new_hidden_grad(head.waiting_dtypes.hidden)
    parts = []
    first = 0
    for chunk in plan.chunks:
        spans = [
            (starts[chunk.begin], starts[chunk.end]),
            (starts[num_pairs + chunk.begin], starts[num_pairs + chunk.end]),
        ]
        rows = RowSet(layout, spans)
        stats = TokenStats.empty(rows.count, head.hidden)
        residual = engine.residual(rows, stats)
        size = 2 * (chunk.end - chunk.begin) + 1
        chunk_bounds = bounds[first : first + size]
        sequences = [side + i for side in (0, num_pairs) for i in range(chunk.begin, chunk.end)]
        pairs, d_logp = _whole_terms(head.backend, stats.logp, chunk_bounds, weights, True, context, sequences)
        first += size
        parts.append(pairs)
        if d_logp is not None:
            coefficient = d_logp.neg_()
            engine.add_hidden_grad(d_hidden, rows, residual, coefficient)
            total.add(rows, residual, coefficient)
    engine.release_buffer()
    return _join_pairs(parts), total.gradients(d_hidden)


def _slime_sweep(
    head: Head,
    layout: TokenLayout,
    plan: Plan,
    weights: SlimeWeights,
    context: ContextShard | None,
) -> tuple[SlimePairs, Gradients]:
    """All log-probs first, then (where a gradient is wanted) the coefficients; logits are formed again for dW."""
    sweep = plan_sweep(head, layout, plan)
    sweep.forward()
    bounds = layout.ints(cumulative(layout.lengths))
    wants, sequences = plan.problem.wants_gradient, range(len(layout.lengths))
    pairs, d_logp = _whole_terms(head.backend, sweep.stats.logp, bounds, weights, wants, context, sequences)
    if d_logp is None:
        return pairs, Gradients(None, None, None)
    return pairs, sweep.backward(d_logp.neg_())


def cross_entropy_forward(
    head: Head, layout: TokenLayout, plan: Plan, coefficient: float
) -> tuple[Tensor, Gradients]:
    """(sum of all token losses, gradients of ``coefficient`` times that sum)."""
    if plan.kind == "stream":
        return _cross_entropy_stream(head, layout, plan, coefficient)
    sweep = plan_sweep(head, layout, plan)
    sweep.forward()
    loss = sweep.stats.loss
    if not plan.problem.wants_gradient:
        return loss.sum(), Gradients(None, None, None)
    return loss.sum(), sweep.backward(torch.full_like(loss, coefficient))


def _cross_entropy_stream(
    head: Head, layout: TokenLayout, plan: Plan, coefficient: float
) -> tuple[Tensor, Gradients]:
    """Row blocks: the coefficient of every row is known beforehand."""
    engine, total = ChunkEngine(head, layout, plan), HeadSum(head, plan)
    d_hidden = engine.new_hidden_grad(head.waiting_dtypes.hidden)
    stats = TokenStats.empty(layout.num_rows, head.hidden)
    for rows in row_sets(layout, plan):
        residual = engine.residual(rows, stats.span(*rows.span))
        factors = stats.loss.new_full((rows.count,), coefficient)
        engine.add_hidden_grad(d_hidden, rows, residual, factors)
        total.add(rows, residual, factors)
    engine.release_buffer()
    return stats.loss.sum(), total.gradients(d_hidden)


def slime_weights(lambdas: Sequence[float], reduction: str, share: BatchShare) -> SlimeWeights:
    """Hyperparameters (in the order of `SlimeLossConfig`) with the normalisers of this batch."""
    token_weight = 1 / share.rejected_tokens if reduction == "token" else 0.0
    return SlimeWeights(*(*lambdas, 1 / share.pairs, token_weight))


def slime_terms(
    backend: Backend, logp: Tensor, cu_seqlens: Tensor, weights: SlimeWeights, want_gradient: bool
) -> tuple[SlimePairs, Tensor | None]:
    """The terms of P pairs from (N,) log-probs, and dL/dlogp (N,) where wanted."""
    num_pairs = (cu_seqlens.shape[0] - 1) // 2
    pairs = SlimePairs(*(logp.new_empty(num_pairs) for _ in range(5)))
    d_logp = torch.empty_like(logp) if want_gradient else None
    backend.slime_terms(logp, cu_seqlens, weights, pairs, d_logp)
    return pairs, d_logp


def _whole_terms(
    backend: Backend,
    logp: Tensor,
    bounds: Tensor,
    weights: SlimeWeights,
    want_gradient: bool,
    context: ContextShard | None,
    sequences: Sequence[int],
) -> tuple[SlimePairs, Tensor | None]:
    """As `slime_terms`, from this process's tokens of ``sequences`` and their boundaries."""
    if context is None:
        return slime_terms(backend, logp, bounds, weights, want_gradient)
    whole, whole_bounds, own = context.complete(logp, sequences)
    pairs, d_logp = slime_terms(backend, whole, whole_bounds, weights, want_gradient)
    return pairs, None if d_logp is None else d_logp.index_select(0, own)


def _chunk_bounds(layout: TokenLayout, plan: Plan) -> list[int]:
    """The cu_seqlens of every chunk, one after the other, so that one copy takes them to the device."""
    num_pairs = len(layout.lengths) // 2
    bounds: list[int] = []
    for chunk in plan.chunks:
        chosen = layout.lengths[chunk.begin : chunk.end]
        rejected = layout.lengths[num_pairs + chunk.begin : num_pairs + chunk.end]
        bounds += cumulative([*chosen, *rejected])
    return bounds


def _join_pairs(parts: list[SlimePairs]) -> SlimePairs:
    names = SlimePairs.__dataclass_fields__
    return SlimePairs(*(join([getattr(p, name) for p in parts]) for name in names))


def cumulative(lengths: Sequence[int]) -> list[int]:
    """[2, 3] -> [0, 2, 5]."""
    total, result = 0, [0]
    for length in lengths:
        total += length
        result.append(total)
    return result
