"""The passes over logits that exist already: one visit for the loss, one for the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slime_fused.autograd.gradient_store import refuse_transformed_backward
from slime_fused.autograd.tensors import materialize
from slime_fused.backends import resolve_backend
from slime_fused.backends.base import (
    Backend,
    HeadTransform,
    LogitsBlock,
    RowFactors,
    RowStats,
    TokenLoss,
)
from slime_fused.engine.layout import IGNORED, check_label_range
from slime_fused.engine.row_results import RowResults, finish_stats, stats_of_logits


def row_targets(labels: Tensor, ignore_index: int, vocab_size: int, *, needs_label: bool) -> Tensor:
    """(...) int64 labels -> (N,) targets, IGNORED where they take no part.

    Raises ValueError on the CPU for a label out of range and, with ``needs_label``, where there is none; on a GPU
    the first is an asynchronous assertion and the second is not looked for.
    """
    ignored = labels == ignore_index
    check_label_range(labels, ignored, vocab_size)
    if needs_label and labels.device.type == "cpu" and bool(ignored.all()):
        raise ValueError("labels: expected at least one label that is not ignore_index, got none")
    return labels.masked_fill(ignored, IGNORED).flatten()


def logits_forward(
    backend: Backend, logits: Tensor, targets: Tensor, head: HeadTransform, token_loss: TokenLoss
) -> RowResults:
    """Statistics of (..., V) logits, which stay as they are, and the losses of their N rows, 0 where ignored."""
    block = LogitsBlock(_as_rows(logits), targets, None, head)
    stats = finish_stats(stats_of_logits(backend, block, token_loss), token_loss, block.whole_vocab_size)
    stats.loss.masked_fill_(targets == IGNORED, 0)
    return stats


def logits_backward(
    backend: Backend,
    logits: Tensor,
    targets: Tensor,
    head: HeadTransform,
    token_loss: TokenLoss,
    stats: Sequence[Tensor],
    upstream: Tensor,
    *,
    inplace: bool = False,
) -> Tensor:
    """The residual times each row's ``upstream`` (N,), in the shape of ``logits`` (..., V).

    ``stats`` are row_max, row_sum and logp (N,).
    ``inplace`` writes it over the logits where each has a place of its own, in rows of contiguous columns.
    """
    rows = _as_rows(logits.detach())
    known = RowStats(*stats)
    out = rows if inplace else torch.empty_like(rows, memory_format=torch.contiguous_format)
    factors = RowFactors(materialize(upstream.to(known.logp.dtype)).contiguous())
    backend.residual_from_stats(LogitsBlock(rows, targets, None, head), out, token_loss, known, factors)
    if inplace and out.data_ptr() == logits.data_ptr():
        # Whoever saved the logits too is told by autograd that they have changed.
        torch.autograd.graph.increment_version(logits)
    return out.view(logits.shape)


class LogitsLossFunction(torch.autograd.Function):
    """(N,) token losses of logits (..., V)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        head: HeadTransform,
        token_loss: TokenLoss,
        inplace_backward: bool,
        backend_name: str,
    ) -> Tensor:
        """Statistics only; the logits stay as they are."""
        backend = resolve_backend(backend_name, logits.device, logits.dtype)
        stats = logits_forward(backend, logits, targets, head, token_loss)
        ctx.save_for_backward(logits, targets, stats.row_max, stats.row_sum, stats.logp)
        ctx.options = (backend, head, token_loss, inplace_backward)
        return stats.loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """The residual times each row's upstream gradient, over the logits where that was asked for."""
        refuse_transformed_backward(upstream)
        logits, targets, *stats = ctx.saved_tensors
        backend, head, token_loss, inplace = ctx.options
        gradient = logits_backward(backend, logits, targets, head, token_loss, stats, upstream, inplace=inplace)
        return gradient, None, None, None, None, None


def _as_rows(logits: Tensor) -> Tensor:
    """(N, V) with contiguous columns, each element in a place of its own; a copy only where the layout has none."""
    rows = logits.reshape(-1, logits.shape[-1])
    count, cols = rows.shape
    is_own = (cols == 1 or rows.stride(1) == 1) and (count <= 1 or rows.stride(0) >= cols)
    return rows if is_own else rows.clone(memory_format=torch.contiguous_format)
