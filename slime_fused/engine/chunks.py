"""The chunk engine: forms logits and residuals in one reused buffer, and the rows of dX.

It serves all losses. With a chunk's residual
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

from slime_fused.backends.base import Backend, HeadTransform, LogitsBlock, RowFactors, TokenLoss
from slime_fused.engine import buffers, products
from slime_fused.engine.distributed import VocabShard
from slime_fused.engine.gradients import GradientDtypes, float16_gain
from slime_fused.engine.layout import TokenLayout
from slime_fused.engine.mix import Mix, row_factors
from slime_fused.engine.plan import Plan
from slime_fused.engine.problem import padded_cols
from slime_fused.engine.row_results import RowResults, finish_stats, stats_of_logits


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
    wants_distribution: bool = False
    """Whether statistics include a `Distribution`."""
    shard: VocabShard | None = None
    """Which columns of the logits these are, where several processes share the head."""

    @property
    def waiting_dtypes(self) -> GradientDtypes:
        """In which the gradients are formed."""
        return self.grad_dtypes.waiting(self.weight.dtype)

    def empty_results(self, rows: int) -> RowResults:
        """Uninitialised, for so many rows: what is wanted of each."""
        return RowResults.empty(rows, self.hidden, with_distribution=self.wants_distribution)

    @property
    def vocab_size(self) -> int:
        """Of the whole head."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab_size

    def block(self, logits: Tensor, labels: Tensor, begin: int = 0) -> LogitsBlock:
        """The products (M, B) of M rows and the rows of ``weight`` that follow ``begin``; ``labels`` (M,)."""
        bias = None if self.bias is None else self.bias[begin : begin + logits.shape[1]]
        if self.shard is None:
            return LogitsBlock(logits, labels, bias, self.transform, begin, self.weight.shape[0])
        offset = self.shard.offset + begin
        return LogitsBlock(logits, labels, bias, self.transform, offset, self.shard.vocab_size)


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

    def put_labelled(self, target: Tensor, value: Tensor) -> None:
        """Write (M, ...) to these rows of (N, ...), a tensor that holds the labelled rows alone."""
        done = 0
        for begin, end in self.spans:
            target[begin:end] = value[done : done + end - begin]
            done += end - begin

    def of_labelled(self, source: Tensor) -> Tensor:
        """(N, ...) -> (M, ...), for a tensor that holds the labelled rows alone."""
        return join([source[a:b] for a, b in self.spans])


@dataclass(frozen=True)
class Residual:
    """d(token loss)/d(raw logits) of a chunk's rows, each times a power of two where float16 needs that."""

    values: Tensor
    """(M, V)"""
    gain: Tensor | None
    """(M,) acc dtype; None is 1."""

    def taken_out_of(self, coefficient: Tensor | None) -> Tensor | None:
        """What (M,) coefficients (None: ones) of true residuals are for these values."""
        if self.gain is None:
            return coefficient
        return self.gain.reciprocal() if coefficient is None else coefficient / self.gain


class ChunkEngine:
    """Forms logits and residuals chunk by chunk in one reused buffer."""

    def __init__(self, head: Head, layout: TokenLayout, plan: Plan) -> None:
        self.head = head
        self.layout = layout
        self.plan = plan
        self.targets = layout.row_targets()
        self._buffer: Tensor | None = None
        self._wide_buffer: Tensor | None = None

    def release_buffer(self) -> None:
        """Give the buffers of logits and residual back."""
        self._buffer = self._wide_buffer = None

    def stats(self, rows: RowSet, out: RowResults) -> None:
        """(M,) statistics of a chunk, to ``out``, without its residual."""
        for begin, end, block in self._blocks(rows):
            out.span(begin, end).copy_(self._stats_of(block))

    def residual(self, rows: RowSet, out: RowResults) -> Residual:
        """Residual of a chunk, until the next one; its (M,) statistics go to ``out``."""
        head, values = self.head, self._residual_buffer(rows.count)
        # One visit cannot see a row that others share, nor size a gain by it: the statistics come first.
        needs_stats = head.shard is not None or head.weight.dtype == torch.float16 or head.wants_distribution
        gains: list[Tensor] = []
        for begin, end, block in self._blocks(rows):
            stats, target = out.span(begin, end), values[begin:end]
            if needs_stats:
                stats.copy_(self._stats_of(block))
                gain = self._gain(stats)
                head.backend.residual_from_stats(block, target, head.token_loss, stats, RowFactors(gain))
                gains += [] if gain is None else [gain]
            else:
                head.backend.softmax_residual(block, target, head.token_loss, stats)
        return Residual(values, join(gains) if gains else None)

    def residual_again(self, rows: RowSet, known: RowResults, mix: Mix | None = None) -> Residual:
        """As `residual`, where the (M,) statistics are known from an earlier pass; see `Mix`."""
        values, gain = self._residual_buffer(rows.count), self._gain(known, mix)
        for begin, end, block in self._blocks(rows):
            self._write_residual(block, values[begin:end], known, gain, mix, slice(begin, end))
        return Residual(values, gain)

    def residual_of(self, logits: Tensor, known: RowResults, mix: Mix | None, *, keeps: bool) -> Residual:
        """As `residual_again`, of the (M, V) raw ``logits`` of all rows, and over them unless ``keeps``."""
        gain, rows = self._gain(known, mix), logits.shape[0]
        values = self._residual_buffer(rows) if keeps else logits
        self._write_residual(self.head.block(logits, self.targets), values, known, gain, mix, slice(0, rows))
        return Residual(values, gain)

    def logits_and_stats(self, rows: RowSet, out: RowResults) -> Tensor:
        """(M, V) raw logits of a chunk, not wide ones, until the next one; their statistics go to ``out``."""
        ((_, _, block),) = self._blocks(rows)
        out.copy_(self._stats_of(block))
        return block.logits

    def _write_residual(
        self, block: LogitsBlock, out: Tensor, known: RowResults, gain: Tensor | None, mix: Mix | None, part: slice
    ) -> None:
        stats = known.span(part.start, part.stop)
        factors = row_factors(mix, stats, gain, part)
        self.head.backend.residual_from_stats(block, out, self.head.token_loss, stats, factors)

    def _gain(self, stats: RowResults, mix: Mix | None = None) -> Tensor | None:
        if self.head.weight.dtype != torch.float16:
            return None
        return float16_gain(stats, self.head.transform, self.head.token_loss, mix)

    def _blocks(self, rows: RowSet) -> Iterator[tuple[int, int, LogitsBlock]]:
        """Rows begin to end of a chunk: all of them, where the residual will lie, or by blocks of wide logits."""
        head, count = self.head, rows.count
        hidden, targets = rows.take(head.hidden), rows.of_labelled(self.targets)
        if not self.plan.problem.has_wide_logits:
            logits = self._residual_buffer(count)
            products.write_logits(hidden, head.weight, logits)
            yield 0, count, head.block(logits, targets)
            return
        if self._wide_buffer is None:
            self._wide_buffer = self._new_buffer(self.plan.logits_rows, head.logits_dtype)
        step = self._wide_buffer.shape[0]
        for begin in range(0, count, step):
            end = min(begin + step, count)
            logits = self._wide_buffer[: end - begin]
            products.write_logits(hidden[begin:end], head.weight, logits)
            yield begin, end, head.block(logits, targets[begin:end])

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

    def _stats_of(self, block: LogitsBlock) -> RowResults:
        head = self.head
        wants = head.wants_distribution
        stats = stats_of_logits(head.backend, block, head.token_loss, with_distribution=wants)
        if head.shard is not None:
            head.shard.merge(stats)
        return finish_stats(stats, head.token_loss, head.vocab_size)

    def new_hidden_grad(self, dtype: torch.dtype) -> Tensor | None:
        """(N_all, D) for `add_hidden_grad`, zeros where no chunk comes by; None where none is wanted."""
        if not self.plan.problem.want_hidden:
            return None
        hidden = self.head.hidden
        return (hidden.new_empty if self.layout.rows is None else hidden.new_zeros)(hidden.shape, dtype=dtype)

    def add_hidden_grad(
        self, d_hidden: Tensor | None, rows: RowSet, residual: Residual, coefficient: Tensor | None
    ) -> None:
        """Rows of dX = c * (R W); R W alone where c is not known yet."""
        if d_hidden is None:
            return
        value = products.residual_times_weight(residual.values, self.head.weight)
        if self.head.shard is not None:
            value = self.head.shard.add_up(value)
        rows.put(d_hidden, value, residual.taken_out_of(coefficient))


def join(pieces: list[Tensor]) -> Tensor:
    """Concatenate, without a copy where there is one piece."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
