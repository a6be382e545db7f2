"""What a loss sees of a batch and what it says: the seam between losses and the chunks that stream them.

A loss is a mean over units: pairs, sequences or tokens. It sees the log-probs of whole units, and what the caller
gave for them, and returns one value for each. As a unit's value depends on its own log-probs alone, the residual of
its logits can be used while they are in the workspace. A loss whose values depend on other units, too
(``needs_batch``), sees all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from slime_fused.backends.base import Backend

Unit = Literal["token", "sequence", "pair"]

SegmentSum = Callable[[Tensor, Tensor], Tensor]
"""(n,) values and (s + 1,) int32 boundaries -> (s,) sums, differentiable with respect to the values."""


@dataclass(frozen=True)
class BatchCounts:
    """What a mean over the batch divides by. With a ``dp_group``: those of the whole batch, per process."""

    sequences: float
    tokens: float
    """That carry a label."""
    chosen_tokens: float
    """Of the first half of the sequences; of use to losses of pairs."""

    @property
    def pairs(self) -> float:
        """Half the sequences."""
        return self.sequences / 2

    @property
    def rejected_tokens(self) -> float:
        """Of the second half of the sequences."""
        return self.tokens - self.chosen_tokens

    def units(self, unit: Unit) -> float:
        """How many units of that kind the batch has."""
        return {"token": self.tokens, "sequence": self.sequences, "pair": self.pairs}[unit]


GIVEN_PER_SEQUENCE = ("ref_sum_logps", "ref_mean_logps", "desirable")
"""Names of what callers give, one number for each sequence."""
GIVEN_PER_TOKEN = ("ref_token_logps", "old_logps")
"""In the shape of the labels."""


def is_given_per_token(
    name: str, shape: tuple[int, ...], labels_shape: tuple[int, ...], sequences: int, unit: Unit
) -> bool:
    """Whether what was given is for tokens, by its shape; by its name, else the loss's unit, where S = N_all."""
    if shape != labels_shape or not shape:
        return False
    if name == "loss_weights":
        return unit == "token"
    if shape != (sequences,) or name in GIVEN_PER_TOKEN:
        return True
    return unit == "token" and name not in GIVEN_PER_SEQUENCE


def plain_segment_sum(values: Tensor, bounds: Tensor) -> Tensor:
    """A `SegmentSum` of PyTorch's own operators: any derivative, one operation per segment."""
    pieces = torch.split(values, (bounds[1:] - bounds[:-1]).tolist())
    return torch.stack([piece.sum() for piece in pieces]) if pieces else values.new_zeros(0)


@dataclass(frozen=True)
class Sequences:
    """Some whole sequences of a batch, as a loss of sequences sees them. n labelled tokens, s sequences."""

    logps: Tensor
    """(n,) log-prob of every labelled token, sequence by sequence; float32 or float64."""
    token_counts: tuple[int, ...]
    """Labelled tokens of each of the s sequences."""
    bounds: Tensor
    """(s + 1,) int32: where each begins in ``logps``, and where the last one ends."""
    batch: BatchCounts
    given: Mapping[str, Tensor] = field(default_factory=dict)
    """What the caller gave, for these units: see the keyword arguments of `preference_loss`."""
    segment_sum: SegmentSum = plain_segment_sum
    first_unit: int = 0
    """The place in the batch of the first sequence, or of the first pair: errors name units by it."""

    @cached_property
    def lengths(self) -> Tensor:
        """(s,) labelled tokens of each sequence, in the dtype of ``logps``."""
        return (self.bounds[1:] - self.bounds[:-1]).to(self.logps.dtype)

    @cached_property
    def sum_logps(self) -> Tensor:
        """(s,) sum of each sequence's log-probs."""
        return self.sum_over_tokens(self.logps)

    @cached_property
    def mean_logps(self) -> Tensor:
        """(s,) mean of each sequence's log-probs."""
        return self.sum_logps / self.lengths.clamp(min=1)

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """(n,) -> (s,): the sum over the tokens of each sequence."""
        return self.segment_sum(values, self.bounds)

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """(n,) -> (s,): the mean over the tokens of each sequence."""
        return self.sum_over_tokens(values) / self.lengths.clamp(min=1)

    def to_tokens(self, values: Tensor) -> Tensor:
        """(s,) -> (n,): the value of its sequence for each token."""
        index = torch.repeat_interleave(self.bounds.diff().long(), output_size=self.logps.shape[0])
        return values.index_select(0, index)

    @cached_property
    def ref_sum_logps(self) -> Tensor:
        """(s,) the reference model's, however they were given: as sums, as means, per token."""
        if "ref_sum_logps" in self.given:
            return self.given["ref_sum_logps"]
        if "ref_mean_logps" in self.given:
            return self.given["ref_mean_logps"] * self.lengths
        if "ref_token_logps" not in self.given:
            raise ValueError(
                "ref_sum_logps: expected a reference model's log-probs, which the loss asks for (as sums, as means "
                "or per token: see preference_loss), got none"
            )
        return self.sum_over_tokens(self.given["ref_token_logps"])

    @cached_property
    def ref_mean_logps(self) -> Tensor:
        """(s,) the reference model's, however they were given."""
        if "ref_mean_logps" in self.given:
            return self.given["ref_mean_logps"]
        return self.ref_sum_logps / self.lengths.clamp(min=1)


@dataclass(frozen=True)
class Pairs(Sequences):
    """Some whole pairs of a batch, as a loss of pairs sees them: their p chosen sequences, then the p rejected."""

    @property
    def count(self) -> int:
        """p: how many pairs."""
        return len(self.token_counts) // 2

    @property
    def chosen_tokens(self) -> slice:
        """Where the log-probs of the chosen sequences lie in ``logps``."""
        return slice(0, sum(self.token_counts[: self.count]))

    @property
    def rejected_tokens(self) -> slice:
        """Where the log-probs of the rejected sequences lie in ``logps``."""
        return slice(sum(self.token_counts[: self.count]), None)

    def _chosen(self, values: Tensor) -> Tensor:
        return values[: self.count]

    def _rejected(self, values: Tensor) -> Tensor:
        return values[self.count :]

    @property
    def chosen_lengths(self) -> Tensor:
        """(p,) labelled tokens of the chosen sequences, in the dtype of ``logps``."""
        return self._chosen(self.lengths)

    @property
    def rejected_lengths(self) -> Tensor:
        """(p,) labelled tokens of the rejected sequences, in the dtype of ``logps``."""
        return self._rejected(self.lengths)

    @property
    def chosen_sum_logps(self) -> Tensor:
        """(p,) summed log-probs of the chosen sequences."""
        return self._chosen(self.sum_logps)

    @property
    def rejected_sum_logps(self) -> Tensor:
        """(p,) summed log-probs of the rejected sequences."""
        return self._rejected(self.sum_logps)

    @property
    def chosen_mean_logps(self) -> Tensor:
        """(p,) mean log-probs of the chosen sequences."""
        return self._chosen(self.mean_logps)

    @property
    def rejected_mean_logps(self) -> Tensor:
        """(p,) mean log-probs of the rejected sequences."""
        return self._rejected(self.mean_logps)

    @property
    def ref_chosen_sum_logps(self) -> Tensor:
        """(p,) the reference model's summed log-probs of the chosen sequences."""
        return self._chosen(self.ref_sum_logps)

    @property
    def ref_rejected_sum_logps(self) -> Tensor:
        """(p,) the reference model's summed log-probs of the rejected sequences."""
        return self._rejected(self.ref_sum_logps)

    @property
    def ref_chosen_mean_logps(self) -> Tensor:
        """(p,) the reference model's mean log-probs of the chosen sequences."""
        return self._chosen(self.ref_mean_logps)

    @property
    def ref_rejected_mean_logps(self) -> Tensor:
        """(p,) the reference model's mean log-probs of the rejected sequences."""
        return self._rejected(self.ref_mean_logps)


@dataclass(frozen=True)
class Tokens:
    """Some labelled tokens of a batch, as a loss of tokens sees them."""

    logps: Tensor
    """(n,) float32 or float64."""
    sequence_lengths: Tensor
    """(n,) labelled tokens of each token's sequence, in the dtype of ``logps``."""
    batch: BatchCounts
    given: Mapping[str, Tensor] = field(default_factory=dict)
    """(n,) each: what the caller gave per token, or per sequence, for these tokens."""
    first_unit: int = 0
    """The place of the first among the batch's labelled tokens: errors name tokens by it."""


@dataclass(frozen=True)
class UnitTerms:
    """What a loss says of u units (pairs, sequences, tokens): u values, whose mean over the batch is the loss."""

    loss: Tensor
    """(u,) differentiable with respect to ``logps``."""
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    """(u,) each: named parts of ``loss``, which sum to it. Reported as their means."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """(u,) each: other numbers to log. Reported as their means."""


@runtime_checkable
class Loss(Protocol):
    """A loss as a value: immutable, and equal where its hyperparameters are."""

    @property
    def unit(self) -> Unit:
        """What one value is for."""

    @property
    def needs_batch(self) -> bool:
        """Whether a unit's value depends on other units."""

    @property
    def term_names(self) -> tuple[str, ...]:
        """Keys of `UnitTerms.terms`, in order."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Keys of `UnitTerms.metrics`, in order."""

    @property
    def key(self) -> str:
        """By which an operator's schema names the value: see `slime_fused.losses.registry`."""

    def check_given(self, given: Mapping[str, Tensor]) -> None:
        """Refuse, with a ValueError that names the argument, what is missing or of no use."""

    def evaluate(
        self, units: Sequences | Tokens, backend: Backend, *, wants_gradient: bool
    ) -> tuple[UnitTerms, Tensor | None]:
        """(each unit's share of the loss: its value divided by the batch's units; dL/dlogps (n,) where wanted)."""
