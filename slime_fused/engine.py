"""The chunk engine: forms logits and residuals in one reused buffer and gathers the gradients.

It serves all losses, and makes every allocation that grows with rows or vocabulary. With a chunk's residual
R = d(token loss)/d(logits), written over its logits (beside them where they are float32 and it is not), and the
coefficients c = dL/d(token loss) of its rows::

    dX = c * (R W)        dW = R^T (c * X)        db = R^T c

c is applied to (rows x hidden) arrays, never as another pass over (rows x vocabulary). For the negative
log-likelihood R is softmax - onehot, and for the SLIME loss c = -dL/dlogp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slime_fused import buffers, products
from slime_fused.backends.base import Backend, HeadTransform, TokenLoss, acc_dtype
from slime_fused.distributed import VocabShard
from slime_fused.gradients import GradientDtypes, Gradients, float16_scale
from slime_fused.layout import TokenLayout
from slime_fused.plan import Plan
from slime_fused.problem import padded_cols
from slime_fused.stats import TokenStats, VocabStats


@dataclass(frozen=True)
class Head:
    """The tensors of one call and the backend that works on them."""

    hidden: Tensor
    """(N_all, D)"""
    weight: Tensor
    """(V, D), any strides: only the matrix products read it."""
    bias: Tensor | None
    """(V,) in the dtype of the logits."""
    transform: HeadTransform
    token_loss: TokenLoss
    backend: Backend
    grad_dtypes: GradientDtypes
    """Of the tensors that ``hidden``, ``weight`` and ``bias`` are, or were cast from under autocast."""
    logits_dtype: torch.dtype
    """That of ``weight``, or float32: in which the products are stored."""
    shard: VocabShard | None = None
    """Which columns of the logits these are, where several processes share the head."""

    @property
    def waiting_dtypes(self) -> GradientDtypes:
        """In which the gradients are formed."""
        return self.grad_dtypes.waiting(self.weight.dtype)

    @property
    def col_offset(self) -> int:
        """Index in the vocabulary of the first row of ``weight``."""
        return 0 if self.shard is None else self.shard.offset

    @property
    def vocab_size(self) -> int:
        """Of the whole head."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab_size


class RowSet:
    """Some of the labelled rows, as spans of their order; ``take`` and ``put`` move them from and to (N_all, D)."""

    def __init__(self, layout: TokenLayout, spans: Sequence[tuple[int, int]]) -> None:
        merged = [spans[0]]
        for begin, end in spans[1:]:
            if begin == merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((begin, end))
        self.spans = merged
        self.count = sum(end - begin for begin, end in merged)
        self.index = None if layout.rows is None else join([layout.rows[a:b] for a, b in merged])

    def take(self, source: Tensor) -> Tensor:
        """(N_all, ...) -> (M, ...): a view where the rows are contiguous, else a copy."""
        if self.index is not None:
            return source.index_select(0, self.index)
        return self.of_labelled(source)

    @property
    def span(self) -> tuple[int, int]:
        """Begin and end of the only span, where rows follow each other."""
        (only,) = self.spans
        return only

    @property
    def copies(self) -> bool:
        """Whether `take` makes a copy."""
        return self.index is not None or len(self.spans) > 1

    def put(self, target: Tensor, value: Tensor, coefficient: Tensor | None = None) -> None:
        """Write (M, D), times a ``coefficient`` (M,) if any, to these rows of (N_all, D); rounded once."""
        if self.index is not None:
            if coefficient is not None:
                value = products.scale_rows(value, coefficient, dtype=target.dtype, owns=True)
            target.index_copy_(0, self.index, value.to(target.dtype))
            return
        done = 0
        for begin, end in self.spans:
            part = slice(done, done + end - begin)
            if coefficient is None:
                target[begin:end] = value[part]
            else:
                products.scale_rows(value[part], coefficient[part], out=target[begin:end])
            done = part.stop

    def of_labelled(self, source: Tensor) -> Tensor:
        """(N, ...) -> (M, ...), for a tensor that holds the labelled rows alone."""
        return join([source[a:b] for a, b in self.spans])


@dataclass(frozen=True)
class _LogitsBlock:
    """Raw logits (m, V) of the rows begin to end of a chunk, and their labels (m,)."""

    begin: int
    end: int
    logits: Tensor
    targets: Tensor


class ChunkEngine:
    """Forms logits and residuals chunk by chunk in one reused buffer, and gathers the gradients."""

    def __init__(
        self, head: Head, layout: TokenLayout, plan: Plan, *, hidden_grad_dtype: torch.dtype | None = None
    ) -> None:
        """``hidden_grad_dtype``: of ``d_hidden``, where it is no finished gradient."""
        self.head = head
        self.layout = layout
        self.plan = plan
        self.targets = layout.row_targets()
        self._buffer: Tensor | None = None
        self._wide_buffer: Tensor | None = None
        p, hidden = plan.problem, head.hidden
        self.d_hidden: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None
        self._weight_scale: Tensor | None = None
        if p.want_hidden:
            # Rows that no chunk visits keep their zeros.
            new = hidden.new_empty if layout.rows is None else hidden.new_zeros
            self.d_hidden = new(hidden.shape, dtype=hidden_grad_dtype or head.waiting_dtypes.hidden)

    def release_buffer(self) -> None:
        """Give the buffers of logits and residual back."""
        self._buffer = self._wide_buffer = None

    def stats(self, rows: RowSet, out: TokenStats) -> None:
        """(M,) statistics of a chunk, to ``out``, without its residual."""
        for block in self._blocks(rows):
            out.span(block.begin, block.end).copy_(self._stats_of(block))

    def residual(self, rows: RowSet, out: TokenStats) -> Tensor:
        """(M, V) residual of a chunk, until the next one; its (M,) statistics go to ``out``."""
        head, residual = self.head, self._residual_buffer(rows.count)
        for block in self._blocks(rows):
            stats, target = out.span(block.begin, block.end), residual[block.begin : block.end]
            if head.shard is not None:
                # One visit cannot see the row: the others' statistics come first.
                stats.copy_(self._stats_of(block))
                self._write_residual(block, target, stats)
                continue
            head.backend.softmax_residual(
                block.logits,
                target,
                block.targets,
                head.bias,
                head.transform,
                head.token_loss,
                row_max=stats.row_max,
                row_sum=stats.row_sum,
                logp=stats.logp,
                loss=stats.loss,
            )
        return residual

    def residual_again(self, rows: RowSet, known: TokenStats) -> Tensor:
        """As `residual`, where the (M,) statistics are known from an earlier pass."""
        residual = self._residual_buffer(rows.count)
        for block in self._blocks(rows):
            span = block.begin, block.end
            self._write_residual(block, residual[slice(*span)], known.span(*span))
        return residual

    def _blocks(self, rows: RowSet) -> Iterator[_LogitsBlock]:
        """The raw logits of a chunk: all of them where the residual will lie, or by blocks of wide ones."""
        head, count = self.head, rows.count
        hidden, targets = rows.take(head.hidden), rows.of_labelled(self.targets)
        if not self.plan.problem.has_wide_logits:
            logits = self._residual_buffer(count)
            products.write_logits(hidden, head.weight, logits)
            yield _LogitsBlock(0, count, logits, targets)
            return
        if self._wide_buffer is None:
            self._wide_buffer = self._new_buffer(self.plan.logits_rows, head.logits_dtype)
        step = self._wide_buffer.shape[0]
        for begin in range(0, count, step):
            end = min(begin + step, count)
            logits = self._wide_buffer[: end - begin]
            products.write_logits(hidden[begin:end], head.weight, logits)
            yield _LogitsBlock(begin, end, logits, targets[begin:end])

    def _residual_buffer(self, rows: int) -> Tensor:
        """(M, V)"""
        if self._buffer is None:
            self._buffer = self._new_buffer(self.plan.chunk_rows, self.head.weight.dtype)
        return self._buffer[:rows]

    def _new_buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        cols = self.head.weight.shape[0]
        padded = buffers.new_scratch(self.head.weight, (rows, padded_cols(cols, dtype.itemsize)), dtype)
        # oneDNN's bf16 product reads one column beyond an odd V and multiplies it by zero: NaN stays NaN.
        padded[:, cols:].zero_()
        return padded[:, :cols]

    def _stats_of(self, block: _LogitsBlock) -> TokenStats:
        head = self.head
        stats = VocabStats.of_logits(
            head.backend,
            block.logits,
            block.targets,
            head.bias,
            head.transform,
            head.token_loss,
            col_offset=head.col_offset,
        )
        if head.shard is not None:
            head.shard.merge(stats)
        return stats.finish(head.token_loss, head.vocab_size)

    def _write_residual(self, block: _LogitsBlock, out: Tensor, stats: TokenStats) -> None:
        head = self.head
        head.backend.residual_from_stats(
            block.logits,
            out,
            block.targets,
            head.bias,
            head.transform,
            head.token_loss,
            col_offset=head.col_offset,
            vocab_size=head.vocab_size,
            row_max=stats.row_max,
            row_sum=stats.row_sum,
            logp=stats.logp,
            row_scale=None,
        )

    def add_hidden_grad(self, rows: RowSet, residual: Tensor, coefficient: Tensor | None) -> None:
        """Rows of dX = c * (R W); R W alone where c is not known yet."""
        if self.d_hidden is None:
            return
        value = products.residual_times_weight(residual, self.head.weight)
        if self.head.shard is not None:
            value = self.head.shard.add_up(value)
        rows.put(self.d_hidden, value, coefficient)

    def add_head_grad(self, rows: RowSet, residual: Tensor, coefficient: Tensor) -> None:
        """DW += R^T (c * X) and db += R^T c."""
        p, weight = self.plan.problem, self.head.weight
        if p.want_weight:
            # Gathered again rather than kept beside R W: one (rows x hidden) array at a time.
            hidden = rows.take(self.head.hidden)
            scaled = products.scale_rows(hidden, self._lifted(hidden, coefficient), owns=rows.copies)
            is_first = self.d_weight is None
            if self.d_weight is None:
                self.d_weight = self._new_weight_grad()
            products.add_weight_grad(self.d_weight, residual, scaled, is_first=is_first)
        if p.want_bias:
            if self.d_bias is None:
                self.d_bias = weight.new_zeros(weight.shape[0], dtype=acc_dtype(weight.dtype))
            products.add_bias_grad(self.d_bias, residual, coefficient)

    def _new_weight_grad(self) -> Tensor:
        """(V, D) for dW: to be handed out, or scratch that is rounded to 16 bits in the end."""
        weight = self.head.weight
        if not self.plan.sums_weight_grad_in_float32:
            return weight.new_empty(weight.shape)
        if self.head.waiting_dtypes.weight == torch.float32:
            return weight.new_empty(weight.shape, dtype=torch.float32)
        return buffers.new_scratch(weight, weight.shape, torch.float32)

    def _lifted(self, hidden: Tensor, coefficient: Tensor) -> Tensor:
        """The (M,) coefficients as dW's product takes them: in float16, times a scale that keeps it in range."""
        if hidden.dtype != torch.float16:
            return coefficient
        scale = float16_scale(hidden, coefficient)
        if self._weight_scale is not None:
            # What is summed already follows where this chunk needs a smaller one; a factor of 1 costs nothing.
            scale = torch.minimum(scale, self._weight_scale)
            assert self.d_weight is not None
            self.head.backend.scale_(self.d_weight, scale / self._weight_scale)
        self._weight_scale = scale
        return coefficient * scale

    def gradients(self) -> Gradients:
        """The gradients, each in its waiting dtype; the engine starts afresh for another sum."""
        p, weight, dtypes = self.plan.problem, self.head.weight, self.head.waiting_dtypes
        d_weight, d_bias, scale = self.d_weight, self.d_bias, self._weight_scale
        self.d_weight = self.d_bias = self._weight_scale = None
        if p.want_weight and d_weight is None:
            d_weight = weight.new_zeros(weight.shape, dtype=dtypes.weight)
        if p.want_bias and d_bias is None:
            d_bias = weight.new_zeros(weight.shape[0], dtype=dtypes.bias)
        return Gradients(
            self.d_hidden,
            None if d_weight is None else d_weight.to(dtypes.weight),
            None if d_bias is None else d_bias.to(dtypes.bias),
            scale,
        )


def join(pieces: list[Tensor]) -> Tensor:
    """Concatenate, without a copy where there is one piece."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
