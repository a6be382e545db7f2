"""Forward passes over all labelled rows that a backward pass follows, once its coefficients are known.

One class per way to get from coefficients c = dL/d(token loss) to gradients:

============= ===================== =============================================================================
class         plan                  what forward leaves for backward
============= ===================== =============================================================================
RowSweep      resweep, eval         statistics, and R W where dX is wanted; logits are formed again for dW
KeptResidual  stream of tokens      as RowSweep, and the residual R of the only chunk
MixedSweep    those three           statistics, and the logits of the only chunk of "stream"; where a gradient may
                                    come for the entropy of a row, too
FusedSweep    fused                 statistics alone; logits are formed again by blocks of the vocabulary
============= ===================== =============================================================================
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from slime_fused.backends.base import LinearBlock, LinearStatsBackend
from slime_fused.engine import products
from slime_fused.engine.chunks import ChunkEngine, Head, Residual, RowSet
from slime_fused.engine.gradients import Gradients, waiting_dtype
from slime_fused.engine.head_sum import HeadSum
from slime_fused.engine.layout import TokenLayout
from slime_fused.engine.mix import Mix
from slime_fused.engine.plan import Plan
from slime_fused.engine.row_results import RowResults, empty_vocab_stats, finish_stats
from slime_fused.engine.vocab_sweep import VocabBlocks, vocab_sweep_backward


class Sweep(Protocol):
    """What the losses see of the four."""

    stats: RowResults
    """(N,) each: of all labelled rows, known after `forward`."""
    unscaled: Tensor | None
    """(N_all, D): R W, the hidden gradient of every token's own loss, where forward forms it."""

    def forward(self) -> None:
        """Form the statistics, and what else backward needs."""

    def backward(self, coefficient: Tensor, d_entropy: Tensor | None = None, *, keeps: bool = False) -> Gradients:
        """Gradients for the coefficients (N,), of the entropy too where the problem ``mixes_entropy``.

        ``keeps`` leaves the sweep fit for another backward.
        """


def plan_sweep(head: Head, layout: TokenLayout, plan: Plan) -> Sweep:
    """The sweep of a plan whose coefficients come after all log-probs."""
    if plan.kind == "fused":
        return FusedSweep(head, layout, plan)
    if plan.problem.mixes_entropy:
        return MixedSweep(head, layout, plan)
    is_kept = plan.kind == "stream" and plan.problem.wants_head_gradient and plan.chunks
    return KeptResidual(head, layout, plan) if is_kept else RowSweep(head, layout, plan)


def unscaled_dtype(compute: torch.dtype) -> torch.dtype:
    """The dtype of R W where it waits for its coefficients: it may be twice the head's largest weight."""
    return waiting_dtype(compute, compute)


def row_sets(layout: TokenLayout, plan: Plan) -> list[RowSet]:
    """The row blocks of a plan whose chunks are rows."""
    return [RowSet(layout, [(c.begin, c.end)]) for c in plan.chunks]


class RowSweep:
    """Row blocks: R W is formed in forward, and backward forms the logits again for dW and db alone."""

    def __init__(self, head: Head, layout: TokenLayout, plan: Plan) -> None:
        self._head = head
        self._layout = layout
        self._plan = plan
        self._blocks = row_sets(layout, plan)
        self.stats = head.empty_results(layout.num_rows)
        self.unscaled: Tensor | None = None

    def forward(self) -> None:
        """Statistics of all rows and, where dX is wanted, the rows of R W."""
        engine = ChunkEngine(self._head, self._layout, self._plan)
        self.unscaled = engine.new_hidden_grad(unscaled_dtype(self._head.weight.dtype))
        for rows in self._blocks:
            if self.unscaled is None:
                engine.stats(rows, self.stats.span(*rows.span))
            else:
                residual = engine.residual(rows, self.stats.span(*rows.span))
                engine.add_hidden_grad(self.unscaled, rows, residual, None)

    def backward(self, coefficient: Tensor, d_entropy: Tensor | None = None, *, keeps: bool = False) -> Gradients:
        """See `Sweep.backward`. Without ``keeps`` the rows of R W become those of dX."""
        problem, unscaled = self._plan.problem, self.unscaled
        if problem.want_hidden and unscaled is None:
            raise RuntimeError(
                "this loss handed its gradients out in the first backward(); call that with retain_graph=True "
                "to go through the graph again"
            )
        total = HeadSum(self._head, self._plan)
        if problem.wants_head_gradient:
            self._add_head_grads(total, coefficient)
        if unscaled is None:
            return total.gradients(None)
        if not keeps:
            # Before the rows change: a pass that is broken off here can be no pass again.
            self.unscaled = None
        dtype = self._head.waiting_dtypes.hidden
        return total.gradients(scale_rows(unscaled, coefficient, self._layout, dtype, owns=not keeps))

    def _add_head_grads(self, total: HeadSum, coefficient: Tensor) -> None:
        engine = ChunkEngine(self._head, self._layout, self._plan)
        for rows in self._blocks:
            residual = engine.residual_again(rows, self.stats.span(*rows.span))
            total.add(rows, residual, rows.of_labelled(coefficient))


class KeptResidual(RowSweep):
    """One chunk, whose residual stays alive until backward."""

    _residual: Residual | None = None

    def forward(self) -> None:
        """As `RowSweep.forward`, and the residual."""
        (rows,) = self._blocks
        engine = ChunkEngine(self._head, self._layout, self._plan)
        self.unscaled = engine.new_hidden_grad(unscaled_dtype(self._head.weight.dtype))
        self._residual = engine.residual(rows, self.stats)
        engine.add_hidden_grad(self.unscaled, rows, self._residual, None)

    def backward(self, coefficient: Tensor, d_entropy: Tensor | None = None, *, keeps: bool = False) -> Gradients:
        """See `Sweep.backward`."""
        gradients = super().backward(coefficient, keeps=keeps)
        if not keeps:
            self._residual = None
        return gradients

    def _add_head_grads(self, total: HeadSum, coefficient: Tensor) -> None:
        if self._residual is None:
            super()._add_head_grads(total, coefficient)
        else:
            total.add(self._blocks[0], self._residual, coefficient)


class MixedSweep:
    """Row blocks whose residual is a mix: nothing of it is known before backward."""

    unscaled: Tensor | None = None

    def __init__(self, head: Head, layout: TokenLayout, plan: Plan) -> None:
        self._head = head
        self._layout = layout
        self._plan = plan
        self._blocks = row_sets(layout, plan)
        self._logits: Tensor | None = None
        self.stats = head.empty_results(layout.num_rows)

    def forward(self) -> None:
        """Statistics of all rows; the logits stay where they are those of the only chunk of a stream."""
        engine = ChunkEngine(self._head, self._layout, self._plan)
        if self._plan.kind == "stream" and self._blocks:
            (rows,) = self._blocks
            self._logits = engine.logits_and_stats(rows, self.stats)
            return
        for rows in self._blocks:
            engine.stats(rows, self.stats.span(*rows.span))

    def backward(self, coefficient: Tensor, d_entropy: Tensor | None = None, *, keeps: bool = False) -> Gradients:
        """See `Sweep.backward`. Without ``keeps`` the residual takes the place of kept logits."""
        mix, coefficient = Mix.of(coefficient, d_entropy)
        engine, total = ChunkEngine(self._head, self._layout, self._plan), HeadSum(self._head, self._plan)
        d_hidden = engine.new_hidden_grad(self._head.waiting_dtypes.hidden)
        kept, self._logits = self._logits, self._logits if keeps else None
        for rows in self._blocks:
            own = None if mix is None else mix.span(*rows.span)
            if kept is not None:
                residual = engine.residual_of(kept, self.stats, own, keeps=keeps)
            else:
                residual = engine.residual_again(rows, self.stats.span(*rows.span), own)
            of_rows = rows.of_labelled(coefficient)
            engine.add_hidden_grad(d_hidden, rows, residual, of_rows)
            total.add(rows, residual, of_rows)
        return total.gradients(d_hidden)


class FusedSweep:
    """Statistics in the product's epilogue, then blocks of the vocabulary: see `vocab_sweep`."""

    unscaled: Tensor | None = None

    def __init__(self, head: Head, layout: TokenLayout, plan: Plan) -> None:
        self._head = head
        self._layout = layout
        self._plan = plan
        self._targets = layout.row_targets()
        self.stats = head.empty_results(layout.num_rows)

    def forward(self) -> None:
        """Statistics of all rows; no logits are written."""
        head = self._head
        if not isinstance(head.backend, LinearStatsBackend):
            raise TypeError(f"backend: the fused plan needs linear_stats, {head.backend.name!r} has none")
        for rows in row_sets(self._layout, self._plan):
            hidden = rows.take(head.hidden)
            hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
            wants = head.wants_distribution
            labels = rows.of_labelled(self._targets)
            stats = empty_vocab_stats(hidden, head.token_loss, with_distribution=wants)
            block = LinearBlock(hidden, head.weight, labels, head.bias, head.transform, head.logits_dtype)
            head.backend.linear_stats(block, stats)
            self.stats.span(*rows.span).copy_(finish_stats(stats, head.token_loss, head.vocab_size))

    def backward(self, coefficient: Tensor, d_entropy: Tensor | None = None, *, keeps: bool = False) -> Gradients:
        """See `Sweep.backward`. Nothing that forward left is used up."""
        mix, coefficient = Mix.of(coefficient, d_entropy)
        head, problem = self._head, self._plan.problem
        rows = RowSet(self._layout, [(0, problem.rows)])
        wants = (problem.want_hidden, problem.want_weight, problem.want_bias)
        blocks = VocabBlocks(self._plan.block_cols, self._plan.logits_rows, *wants)
        labelled_head = replace(head, hidden=rows.take(head.hidden))
        gradients = vocab_sweep_backward(labelled_head, self._targets, self.stats, coefficient, blocks, mix)
        labelled = gradients.hidden
        if labelled is None or self._layout.rows is None:
            return gradients
        d_hidden = labelled.new_zeros(head.hidden.shape)
        rows.put(d_hidden, labelled)
        return replace(gradients, hidden=d_hidden)


def scale_rows(
    unscaled: Tensor, coefficient: Tensor, layout: TokenLayout, dtype: torch.dtype, *, owns: bool
) -> Tensor:
    """(N_all, D) rows of R W -> dX of ``dtype``, in their place where ``owns`` and they have it.

    ``coefficient`` (N,). Rows without a label stay zero.
    """
    if layout.rows is not None:
        full = coefficient.new_zeros(unscaled.shape[0])
        coefficient = full.index_copy_(0, layout.rows, coefficient)
    return products.scale_rows(unscaled, coefficient, owns=owns, dtype=dtype)
