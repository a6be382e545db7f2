"""From a call's arguments to the head, the layout and the plan that it runs with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slime_fused.backends import resolve_backend
from slime_fused.backends.base import HeadTransform, LinearStatsBackend, TokenLoss
from slime_fused.engine.chunks import Head
from slime_fused.engine.distributed import ContextShard, VocabShard, find_group
from slime_fused.engine.gradients import GradientDtypes
from slime_fused.engine.layout import TokenLayout, check_pairs, require_responses, resolve_layout
from slime_fused.engine.plan import Plan, make_plan, resolve_workspace
from slime_fused.engine.problem import Operation, Problem


@dataclass(frozen=True)
class HeadOptions:
    """The keyword arguments that every linear loss shares."""

    shift: bool = False
    ignore_index: int = -100
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    backend: str = "auto"
    workspace: int | str = "auto"
    tp_group: str | None = None
    """Groups go by name, so that an operator's schema can hold them."""
    cp_group: str | None = None
    dp_group: str | None = None
    logits_dtype: torch.dtype | None = None
    """float32 for products of 16-bit operands that are not rounded to their dtype. None: the operands' dtype."""
    compute_dtype: torch.dtype | None = None
    """What autocast has the products run in: the head's tensors are cast to it. None: their own dtype."""
    layout: TokenLayout | None = None
    """That of the labels, where the caller had it. No part of an operator's schema."""


@dataclass(frozen=True)
class Wants:
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        """The three, in order."""
        return self.hidden, self.weight, self.bias

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Wants:
        """Those of the inputs that require one, none under ``torch.no_grad()``."""
        enabled = torch.is_grad_enabled()
        return cls(
            enabled and hidden.requires_grad,
            enabled and weight.requires_grad,
            enabled and bias is not None and bias.requires_grad,
        )


@dataclass(frozen=True)
class Call:
    """Everything that one call of a linear loss runs with."""

    head: Head
    layout: TokenLayout
    plan: Plan
    context: ContextShard | None = None
    """Which tokens of the sequences these are, where several processes share them."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Labelled tokens of every sequence, over all processes that hold some."""
        return self.layout.lengths if self.context is None else self.context.total_lengths


def prepare_call(
    operation: Operation,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    options: HeadOptions,
    wants: Wants,
    token_loss: TokenLoss,
    *,
    keeps_residual: bool = True,
) -> Call:
    """Resolve backend, layout and plan. Waits for the device once, to count the labels.

    Shapes and dtypes have been checked; what depends on the values of ``labels`` and ``cu_seqlens`` is checked
    here (ValueError).
    """
    grad_dtypes = GradientDtypes.of(hidden, weight, bias)
    if options.compute_dtype is not None:
        hidden, weight = hidden.to(options.compute_dtype), weight.to(options.compute_dtype)
    logits_dtype = options.logits_dtype or hidden.dtype
    backend = resolve_backend(options.backend, hidden.device, hidden.dtype)
    tp_group, cp_group = find_group(options.tp_group), find_group(options.cp_group)
    shard = None if tp_group is None else VocabShard.of(hidden, weight, labels, wants.flags, tp_group)

    def resolve() -> TokenLayout:
        vocab_size = weight.shape[0] if shard is None else shard.vocab_size
        if options.layout is not None:
            options.layout.require_below(vocab_size)
            return options.layout
        return resolve_layout(
            labels,
            cu_seqlens,
            vocab_size=vocab_size,
            shift=options.shift,
            ignore_index=options.ignore_index,
        )

    context = None
    if cp_group is None:
        layout = resolve()
    else:
        layout, context = ContextShard.of(resolve, wants.flags, cp_group, hidden.device)
    if operation == "slime":
        check_pairs(len(layout.lengths))
        require_responses(layout.lengths if context is None else context.total_lengths)
    head = Head(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        weight=weight,
        bias=None if bias is None else bias.to(logits_dtype).contiguous(),
        transform=HeadTransform(options.logit_scale, options.logit_softcap),
        token_loss=token_loss,
        backend=backend,
        grad_dtypes=grad_dtypes,
        logits_dtype=logits_dtype,
        shard=shard,
    )
    problem = make_problem(operation, head, layout, wants, context, keeps_residual=keeps_residual)
    workspace = resolve_workspace(options.workspace, problem, is_gpu=hidden.device.type != "cpu")
    return Call(head, layout, make_plan(problem, workspace), context)


def make_problem(
    operation: Operation,
    head: Head,
    layout: TokenLayout,
    wants: Wants,
    context: ContextShard | None,
    *,
    keeps_residual: bool = True,
) -> Problem:
    """The planner's view of a call, the same on all processes that share it: their chunks must meet."""
    pairs = len(layout.lengths) // 2 if operation == "slime" else 0
    lengths = layout.lengths if context is None else context.largest_lengths
    weight, backend = head.weight, head.backend
    return Problem(
        operation=operation,
        rows=layout.num_rows,
        hidden_size=weight.shape[1],
        vocab_size=weight.shape[0] if head.shard is None else head.shard.largest,
        itemsize=weight.element_size(),
        logits_itemsize=0 if head.logits_dtype == weight.dtype else head.logits_dtype.itemsize,
        keeps_float32_weight_grad=torch.float16 in (weight.dtype, head.grad_dtypes.weight),
        weight_grad_itemsize=head.grad_dtypes.weight.itemsize,
        want_hidden=wants.hidden,
        want_weight=wants.weight,
        want_bias=wants.bias,
        pair_rows=tuple(lengths[i] + lengths[pairs + i] for i in range(pairs)),
        keeps_residual=keeps_residual,
        linear_stats_row_bytes=(
            backend.linear_stats_row_bytes(weight)
            if isinstance(backend, LinearStatsBackend) and head.shard is None and context is None
            else 0
        ),
    )
