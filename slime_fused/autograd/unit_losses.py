"""Losses of pairs, sequences and tokens: log-probs of whole units in, their coefficients out, chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from slime_fused.autograd.gradient_store import GradientStore, like_hidden
from slime_fused.autograd.token_losses import needs_distribution, spread_results, statistic
from slime_fused.autograd.token_operators import segment_sum_op
from slime_fused.backends.base import Backend
from slime_fused.engine.calls import Call, LinearRequest, LossKind, prepare_call
from slime_fused.engine.distributed import count_batch, find_group, gather_ints
from slime_fused.engine.gradients import GradientDtypes, Gradients
from slime_fused.engine.layout import TokenLayout
from slime_fused.engine.row_results import RowResults
from slime_fused.engine.streams import Part, cumulative, unit_forward
from slime_fused.engine.units import (
    BatchCounts,
    Loss,
    Pairs,
    Sequences,
    Tokens,
    Unit,
    UnitTerms,
    is_given_per_token,
)


@dataclass(frozen=True)
class UnitOutputs:
    """What a loss of units says of a batch; all but the loss detached."""

    loss: Tensor
    """Scalar."""
    numbers: Tensor
    """(K,) the loss's terms and metrics, in the order of `Loss.term_names` and `Loss.metric_names`."""
    mean_logps: Tensor
    """(S,) mean log-prob of each sequence."""
    tokens: Tensor
    """(K, N_all) what was asked for of each token, in that order: "logps", `STATISTICS`; 0 where it is ignored."""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four, in order."""
        return self.loss, self.numbers, self.mean_logps, self.tokens


class UnitLossFunction(torch.autograd.Function):
    """The tensors of `UnitOutputs`; only the loss is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        request: LinearRequest,
        loss: Loss,
        given: Mapping[str, Tensor],
        asked: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        """Run the plan; keep the gradients."""
        ctx.set_materialize_grads(False)  # else backward fills a tensor of zeros for every output but the loss
        outputs, gradients, backend = run_unit_loss(hidden, weight, bias, request, loss, given, asked)
        ctx.store = GradientStore(like_hidden(gradients, hidden), GradientDtypes.of(hidden, weight, bias), backend)
        ctx.mark_non_differentiable(*outputs.tensors()[1:])
        return outputs.tensors()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        """The kept gradients times the upstream scalar; None where nothing comes from upstream."""
        if upstream is None:
            return (None,) * 7
        return *ctx.store.hand_out(upstream), None, None, None, None


def run_unit_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    request: LinearRequest,
    loss: Loss,
    given: Mapping[str, Tensor],
    asked: Sequence[str],
) -> tuple[UnitOutputs, Gradients, Backend]:
    """(outputs, gradients in their waiting dtypes, backend); ``asked``: see `UnitOutputs.tokens`."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        call = prepare_call(kind_of(loss, asked), hidden, weight, bias, request)
        batch = count_batch(call.lengths, find_group(request.options.dp_group), hidden.device)
        if batch.tokens == 0:
            raise ValueError("labels: expected at least one label that is not ignore_index, got none")
        run = _LossRun(call, loss, given, batch)
        results, gradients = unit_forward(call, run)
        return run.outputs(results, asked), gradients, call.head.backend


def kind_of(loss: Loss, asked: Sequence[str] = ()) -> LossKind:
    """What the engine must know of it, and of what is ``asked`` of each token."""
    return LossKind(
        "batch" if loss.needs_batch else loss.unit,
        is_paired=loss.unit == "pair",
        wants_distribution=bool(asked) and needs_distribution([name for name in asked if name != "logps"]),
    )


class _LossRun:
    """One call's `Evaluation` of a loss, which gathers what the loss says of the parts."""

    def __init__(self, call: Call, loss: Loss, given: Mapping[str, Tensor], batch: BatchCounts) -> None:
        self._call = call
        self._loss = loss
        self._batch = batch
        kinds = _kinds_of(call, loss.unit, given)
        self._given = {name: _Given(value, call.layout, kinds[name]) for name, value in given.items()}
        self._said: list[UnitTerms] = []
        self._shared_means: list[tuple[Sequence[int], Tensor]] = []

    def __call__(self, logps: Tensor, part: Part) -> Tensor | None:
        """See `Evaluation`."""
        context = self._call.context
        if context is None:
            terms, d_logps = self._evaluate(self._units(logps, part, part.bounds))
        else:
            logps, bounds, own = context.complete(logps, part.sequences)
            self._shared_means.append((part.sequences, self._means(logps, bounds)))
            terms, d_logps = self._evaluate(self._units(logps, part, bounds))
            d_logps = None if d_logps is None else d_logps.index_select(0, own)
        self._said.append(terms)
        return d_logps

    def outputs(self, results: RowResults, asked: Sequence[str]) -> UnitOutputs:
        """What all parts say together; ``results`` (N,) are those of the labelled rows."""
        layout, loss, logps = self._call.layout, self._loss, results.logp
        total = _total([said.loss for said in self._said])
        numbers = [_total([said.terms[name] for said in self._said]) for name in loss.term_names]
        numbers += [_total([said.metrics[name] for said in self._said]) for name in loss.metric_names]
        return UnitOutputs(
            total,
            torch.stack(numbers) if numbers else total.new_empty(0),
            self._mean_logps(logps),
            _of_tokens(results, layout, asked),
        )

    def _mean_logps(self, logps: Tensor) -> Tensor:
        """(S,)"""
        layout = self._call.layout
        if self._call.context is None:
            return self._means(logps, layout.ints(cumulative(layout.lengths)))
        order = [s for sequences, _ in self._shared_means for s in sequences]
        means = torch.cat([means for _, means in self._shared_means])
        if order == sorted(order):
            return means
        return torch.empty_like(means).index_copy_(0, layout.ints(order).long(), means)

    def _means(self, logps: Tensor, bounds: Tensor) -> Tensor:
        means = logps.new_empty(bounds.shape[0] - 1)
        self._call.head.backend.segment_sum(logps, bounds, means, mean=True)
        return means

    def _evaluate(self, units: Sequences | Tokens) -> tuple[UnitTerms, Tensor | None]:
        wants = self._call.plan.problem.wants_gradient
        return self._loss.evaluate(units, self._call.head.backend, wants_gradient=wants)

    def _units(self, logps: Tensor, part: Part, bounds: Tensor | None) -> Sequences | Tokens:
        """What the loss sees of a part."""
        context = self._call.context
        given = {
            name: value.of_tokens(part) if value.is_per_token else value.of_units(part)
            for name, value in self._given.items()
        }
        if context is not None:
            for name, value in self._given.items():
                if value.is_per_token:
                    given[name] = context.complete(given[name], part.sequences)[0]
        if bounds is None:
            lengths = self._lengths_by_token
            spread = {
                name: value.spread[part.begin : part.end] if value.is_per_sequence else given[name]
                for name, value in self._given.items()
            }
            of_tokens = lengths[part.begin : part.end].to(logps.dtype)
            return Tokens(logps, of_tokens, self._batch, spread, first_unit=part.begin)
        counts = tuple(self._call.lengths[s] for s in part.sequences)
        sum_segments = partial(_segment_sum, backend=self._call.head.backend)
        kind = Pairs if self._loss.unit == "pair" else Sequences
        units = kind(logps, counts, bounds, self._batch, given, sum_segments, first_unit=part.begin)
        if self._loss.unit != "token":
            return units
        spread = {
            name: units.to_tokens(given[name]) if value.is_per_sequence else given[name]
            for name, value in self._given.items()
        }
        first = sum(self._call.lengths[: part.sequences[0]])
        return Tokens(logps, units.to_tokens(units.lengths), self._batch, spread, first_unit=first)

    @cached_property
    def _lengths_by_token(self) -> Tensor:
        """(N,) labelled tokens of the sequence of each labelled row."""
        layout = self._call.layout
        return layout.to_labelled(layout.ints(layout.lengths))


def _kinds_of(call: Call, unit: Unit, given: Mapping[str, Tensor]) -> dict[str, bool]:
    """Which of the tensors have one number for each token.

    Processes that share the tokens hold other numbers of them, so that one's shapes may tell it less, or something
    else, than the others: they go by those whose shapes leave no choice.
    """
    if not given:
        return {}
    shape, sequences, context = call.layout.shape, len(call.layout.lengths), call.context
    kinds = {name: is_given_per_token(name, tuple(x.shape), shape, sequences, unit) for name, x in given.items()}
    if context is None:
        return kinds
    others = {(sequences,), (sequences // 2,)}
    own = [2 if tuple(x.shape) == shape and shape in others else int(kinds[name]) for name, x in given.items()]
    told = gather_ints(own, context.group, call.head.hidden.device)
    for name, codes in zip(given, zip(*told, strict=True), strict=True):
        certain = set(codes) - {2}
        if len(certain) > 1:
            raise ValueError(f"{name}: expected one for each token on every process of cp_group, or on none")
        kinds[name] = bool(certain.pop()) if certain else kinds[name]
    return kinds


class _Given:
    """A tensor that the caller gave for a loss, and what one of its numbers is for."""

    def __init__(self, value: Tensor, layout: TokenLayout, is_per_token: bool) -> None:
        self._layout = layout
        self.is_per_token = is_per_token
        self.is_per_sequence = not is_per_token and tuple(value.shape) == (len(layout.lengths),)
        self._value = layout.of_labelled(value.flatten()) if is_per_token else value

    @cached_property
    def spread(self) -> Tensor:
        """(N,): the number of its sequence for each labelled row."""
        return self._layout.to_labelled(self._value)

    def of_tokens(self, part: Part) -> Tensor:
        """(m,) of the part's labelled rows."""
        return part.rows.of_labelled(self._value)

    def of_units(self, part: Part) -> Tensor:
        """Of the part's sequences or units; a scalar as it is, and what `spread` is for."""
        count = len(self._layout.lengths)
        if self._value.dim() == 0 or not part.sequences or len(part.sequences) == count:
            return self._value
        if self.is_per_sequence and len(part.sequences) == 2 * (part.end - part.begin):
            return torch.cat([self._value[side + part.begin : side + part.end] for side in (0, count // 2)])
        return self._value[part.begin : part.end]


def _of_tokens(results: RowResults, layout: TokenLayout, asked: Sequence[str]) -> Tensor:
    """See `UnitOutputs.tokens`."""
    if not asked:
        return results.logp.new_empty(0, prod(layout.shape))
    if tuple(asked) == ("logps",):
        return layout.spread(results.logp)[None]
    known = spread_results(results, layout)
    told = [known[2] if name == "logps" else statistic(name, known).to(known.dtype) for name in asked]
    return torch.stack(told)


def _segment_sum(values: Tensor, bounds: Tensor, *, backend: Backend) -> Tensor:
    sums: Tensor = segment_sum_op(values, bounds, False, backend.name)
    return sums


def _total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of all entries, in an order that is always the same."""
    return torch.cat(list(parts)).sum() if len(parts) > 1 else parts[0].sum()
