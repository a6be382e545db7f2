"""Runs a plan: chunks of units whose coefficients come with their log-probs, over the chunk engine.

What a loss makes of log-probs comes in as an `Evaluation`; nothing here knows which loss it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from slime_fused.engine.calls import Call
from slime_fused.engine.chunks import ChunkEngine, Head, RowSet
from slime_fused.engine.gradients import Gradients
from slime_fused.engine.head_sum import HeadSum
from slime_fused.engine.layout import TokenLayout
from slime_fused.engine.plan import Chunk, Plan
from slime_fused.engine.row_results import RowResults
from slime_fused.engine.sweeps import plan_sweep, row_sets


@dataclass(frozen=True)
class Part:
    """Some units of a batch: all their rows on this process, and what a loss is told of them."""

    begin: int
    end: int
    """Half-open range of units; of labelled rows for a loss of tokens."""
    rows: RowSet
    sequences: Sequence[int]
    """Whose rows these are, in order; empty for a loss of tokens."""
    bounds: Tensor | None
    """(s + 1,) int32: where each of the sequences begins in the rows."""


class Evaluation(Protocol):
    """A loss with all that it needs beside log-probs."""

    def __call__(self, logps: Tensor, part: Part) -> Tensor | None:
        """Take the log-probs (m,) of a part's rows; return dL/dlogps (m,) where a gradient is wanted."""


def unit_forward(call: Call, evaluate: Evaluation) -> tuple[RowResults, Gradients]:
    """((N,) results of the labelled rows, the gradients of the loss that ``evaluate`` sees in parts)."""
    if call.plan.kind == "stream":
        return _stream(call, evaluate)
    return _sweep(call, evaluate)


def _stream(call: Call, evaluate: Evaluation) -> tuple[RowResults, Gradients]:
    """Whole units at a time: their coefficients are known as soon as their own log-probs are."""
    head, layout, plan = call.head, call.layout, call.plan
    engine, total = ChunkEngine(head, layout, plan), HeadSum(head, plan)
    d_hidden = engine.new_hidden_grad(head.waiting_dtypes.hidden)
    results = head.empty_results(layout.num_rows)
    for part in _parts(layout, plan):
        is_all = part.rows.count == layout.num_rows
        stats = results if is_all else head.empty_results(part.rows.count)
        residual = engine.residual(part.rows, stats)
        if not is_all:
            for of_all, of_part in zip(results.tensors(), stats.tensors(), strict=True):
                part.rows.put_labelled(of_all, of_part)
        d_logps = evaluate(stats.logp, part)
        if d_logps is not None:
            coefficient = d_logps.neg_()
            engine.add_hidden_grad(d_hidden, part.rows, residual, coefficient)
            total.add(part.rows, residual, coefficient)
    engine.release_buffer()
    return results, total.gradients(d_hidden)


def _sweep(call: Call, evaluate: Evaluation) -> tuple[RowResults, Gradients]:
    """All log-probs first, then (where a gradient is wanted) the coefficients; logits are formed again for dW."""
    head, layout, plan = call.head, call.layout, call.plan
    sweep = plan_sweep(head, layout, plan)
    sweep.forward()
    d_logps = evaluate(sweep.stats.logp, _whole(layout, plan))
    if d_logps is None:
        return sweep.stats, Gradients(None, None, None)
    return sweep.stats, sweep.backward(d_logps.neg_())


def _parts(layout: TokenLayout, plan: Plan) -> list[Part]:
    """The chunks of a plan, their boundaries taken to the device in one copy."""
    if plan.problem.unit == "token":
        chunks = [Part(c.begin, c.end, RowSet(layout, [(c.begin, c.end)]), (), None) for c in plan.chunks]
        # A process may hold no token of a batch that others have some of.
        return chunks or [_whole(layout, plan)]
    if plan.problem.unit == "batch" or len(plan.chunks) == 1:
        return [_whole(layout, plan)]
    starts = cumulative(layout.lengths)
    sequences = [_sequences_of(chunk, layout, plan) for chunk in plan.chunks]
    bounds = layout.ints([bound for of in sequences for bound in cumulative([layout.lengths[s] for s in of])])
    parts, first = [], 0
    for chunk, of in zip(plan.chunks, sequences, strict=True):
        half = len(of) // 2
        sides = [of] if plan.problem.unit == "sequence" else [of[:half], of[half:]]
        spans = [(starts[side[0]], starts[side[-1] + 1]) for side in sides]
        size = len(of) + 1
        parts.append(Part(chunk.begin, chunk.end, RowSet(layout, spans), of, bounds[first : first + size]))
        first += size
    return parts


def _sequences_of(chunk: Chunk, layout: TokenLayout, plan: Plan) -> list[int]:
    """Of a chunk of sequences, or of pairs: their chosen ones, then their rejected ones."""
    if plan.problem.unit == "sequence":
        return list(range(chunk.begin, chunk.end))
    pairs = len(layout.lengths) // 2
    return [side + i for side in (0, pairs) for i in range(chunk.begin, chunk.end)]


def _whole(layout: TokenLayout, plan: Plan) -> Part:
    """All units at once."""
    rows = RowSet(layout, [(0, layout.num_rows)])
    if plan.problem.unit == "token":
        return Part(0, layout.num_rows, rows, (), None)
    count = len(layout.lengths)
    bounds = layout.ints(cumulative(layout.lengths))
    return Part(0, count // 2 if plan.problem.unit == "pair" else count, rows, range(count), bounds)


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
    stats = RowResults.empty(layout.num_rows, head.hidden)
    for rows in row_sets(layout, plan):
        residual = engine.residual(rows, stats.span(*rows.span))
        factors = stats.loss.new_full((rows.count,), coefficient)
        engine.add_hidden_grad(d_hidden, rows, residual, factors)
        total.add(rows, residual, factors)
    engine.release_buffer()
    return stats.loss.sum(), total.gradients(d_hidden)


def cumulative(lengths: Sequence[int]) -> list[int]:
    """[2, 3] -> [0, 2, 5]."""
    total, result = 0, [0]
    for length in lengths:
        total += length
        result.append(total)
    return result
