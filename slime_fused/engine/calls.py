"""From a call's arguments to the head, the layout and the plan that it runs with."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slime_fused.backends import resolve_backend
from slime_fused.backends.base import HeadTransform, LinearStatsBackend, TokenLoss
from slime_fused.engine.chunks import Head
from slime_fused.engine.distributed import ContextShard, VocabShard, find_group
from slime_fused.engine.gradients import GradientDtypes
from slime_fused.engine.layout import TokenLayout, check_pairs, require_responses, resolve_layout
from slime_fused.engine.plan import Plan, make_plan
from slime_fused.engine.problem import Problem, Unit
from slime_fused.engine.workspace import resolve_workspace

if TYPE_CHECKING:  # a torch without distributed support has no such class
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class LabelledRows:
    """Which rows of the hidden states carry which label."""

    labels: Tensor
    """(S, T), or (N_all,), int64."""
    cu_seqlens: Tensor | None = None
    """(S + 1,) int32 boundaries of packed sequences."""
    shift: bool = False
    ignore_index: int = -100
    layout: TokenLayout | None = None
    """That of the labels, where the caller had it. No part of an operator's schema."""

    @property
    def num_sequences(self) -> int:
        """S."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.shape[0] - 1
        return prod(self.labels.shape[:-1])

    def resolve(self, vocab_size: int) -> TokenLayout:
        """The layout of the rows; checks the labels. Waits for the device where the caller had none."""
        if self.layout is not None:
            self.layout.require_below(vocab_size)
            return self.layout
        return resolve_layout(
            self.labels, self.cu_seqlens, vocab_size=vocab_size, shift=self.shift, ignore_index=self.ignore_index
        )


@dataclass(frozen=True)
class HeadOptions:
    """What the head does with its products, what may be spent on them, and who shares the work."""

    transform: HeadTransform = field(default_factory=HeadTransform)
    logits_dtype: torch.dtype | None = None
    """float32 for products of 16-bit operands that are not rounded to their dtype. None: the operands' dtype."""
    compute_dtype: torch.dtype | None = None
    """What autocast has the products run in: the head's tensors are cast to it. None: their own dtype."""
    backend: str = "auto"
    workspace: int | str = "auto"
    tp_group: str | None = None
    """Groups go by name, so that an operator's schema can hold them."""
    cp_group: str | None = None
    dp_group: str | None = None


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
class LinearRequest:
    """What a caller of a linear loss asks for, beside the head's three tensors."""

    rows: LabelledRows
    options: HeadOptions
    wants: Wants


@dataclass(frozen=True)
class LossKind:
    """What the engine must know of a loss."""

    unit: Unit
    """What decides a row's coefficient."""
    token_loss: TokenLoss = field(default_factory=TokenLoss)
    """Of which a residual is the gradient."""
    is_paired: bool = False
    """Whether the sequences are P chosen and P rejected responses, none of them empty."""
    wants_distribution: bool = False
    """Whether statistics beside the log-prob are wanted of every row."""
    mixes_entropy: bool = False
    """"later": whether a gradient may come for the entropy of every row."""
    keeps_residual: bool = True
    """"later": whether the residual may stay alive until backward."""


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
    kind: LossKind, hidden: Tensor, weight: Tensor, bias: Tensor | None, request: LinearRequest
) -> Call:
    """Resolve backend, layout and plan. Waits for the device once, to count the labels.

    Shapes and dtypes have been checked; what depends on the values of labels and boundaries is checked here
    (ValueError).
    """
    options, wants = request.options, request.wants
    grad_dtypes = GradientDtypes.of(hidden, weight, bias)
    if options.compute_dtype is not None:
        hidden, weight = hidden.to(options.compute_dtype), weight.to(options.compute_dtype)
    logits_dtype = options.logits_dtype or hidden.dtype
    backend = resolve_backend(options.backend, hidden.device, hidden.dtype)
    tp_group, cp_group = find_group(options.tp_group), find_group(options.cp_group)
    shard = None
    if tp_group is not None:
        shard = VocabShard.of(hidden, weight, request.rows.labels, wants.flags, tp_group)
    vocab_size = weight.shape[0] if shard is None else shard.vocab_size
    layout, context = resolve_rows(request, vocab_size, cp_group, hidden.device)
    if kind.is_paired:
        check_pairs(len(layout.lengths))
        require_responses(layout.lengths if context is None else context.total_lengths)
    head = Head(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        weight=weight,
        bias=None if bias is None else bias.to(logits_dtype).contiguous(),
        transform=options.transform,
        token_loss=kind.token_loss,
        backend=backend,
        grad_dtypes=grad_dtypes,
        logits_dtype=logits_dtype,
        wants_distribution=kind.wants_distribution,
        shard=shard,
    )
    problem = make_problem(kind, head, layout, wants, context)
    workspace = resolve_workspace(options.workspace, problem, is_gpu=hidden.device.type != "cpu")
    return Call(head, layout, make_plan(problem, workspace), context)


def resolve_rows(
    request: LinearRequest, vocab_size: int, cp_group: ProcessGroup | None, device: torch.device
) -> tuple[TokenLayout, ContextShard | None]:
    """The layout of this process's rows, and what the others of ``cp_group`` hold."""
    if cp_group is None:
        return request.rows.resolve(vocab_size), None
    return ContextShard.of(lambda: request.rows.resolve(vocab_size), request.wants.flags, cp_group, device)


def make_problem(
    kind: LossKind, head: Head, layout: TokenLayout, wants: Wants, context: ContextShard | None
) -> Problem:
    """The planner's view of a call, the same on all processes that share it: their chunks must meet."""
    # Tokens that processes share come together by whole sequences only.
    unit: Unit = "sequence" if kind.unit == "token" and context is not None else kind.unit
    lengths = layout.lengths if context is None else context.largest_lengths
    weight, backend = head.weight, head.backend
    return Problem(
        unit=unit,
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
        unit_rows=_unit_rows(unit, lengths),
        keeps_residual=kind.keeps_residual,
        mixes_entropy=kind.mixes_entropy,
        linear_stats_row_bytes=(
            backend.linear_stats_row_bytes(weight, with_moments=kind.wants_distribution)
            if isinstance(backend, LinearStatsBackend) and head.shard is None and context is None
            else 0
        ),
    )


def _unit_rows(unit: Unit, lengths: tuple[int, ...]) -> tuple[int, ...]:
    if unit == "pair":
        pairs = len(lengths) // 2
        return tuple(lengths[i] + lengths[pairs + i] for i in range(pairs))
    return {"sequence": lengths, "batch": (sum(lengths),)}.get(unit, ())
