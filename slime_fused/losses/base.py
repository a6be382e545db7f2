"""What the losses of this folder share: from a formula on log-probs to each unit's share and its derivative."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from slime_fused.backends.base import Backend
from slime_fused.engine.units import Pairs, Sequences, Tokens, Unit, UnitTerms
from slime_fused.losses.registry import register

REFERENCES = ("ref_sum_logps", "ref_mean_logps", "ref_token_logps")
"""The three ways to give a reference model's log-probs; a loss takes one."""
WEIGHTS = "loss_weights"
"""What every loss takes: (u,) numbers that the values and terms of the units are multiplied with."""


@dataclass(frozen=True)
class Formula:
    """A loss by its formula: a subclass is a frozen dataclass that defines `values`.

    The derivative with respect to the log-probs comes from autograd, on (n,) numbers. A subclass with fields that
    want checking does so in ``__post_init__`` and calls that of this class in the end.
    """

    is_literal: ClassVar[bool] = True
    """Whether the fields are numbers, strings, None or tuples of these."""
    _key: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Name the value at once, as a plain attribute: what a tracer reads is a constant."""
        object.__setattr__(self, "_key", register(self, is_literal=self.is_literal))

    @property
    def key(self) -> str:
        """See `Loss.key`."""
        return self._key

    def __reduce__(self) -> tuple[Any, ...]:
        """By the fields: a copy, in this process or another, gets a name of its own."""
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    @property
    def name(self) -> str:
        """What errors call it."""
        return type(self).__name__

    @property
    def unit(self) -> Unit:
        """See `Loss.unit`."""
        return "pair"

    @property
    def needs_batch(self) -> bool:
        """See `Loss.needs_batch`."""
        return False

    @property
    def term_names(self) -> tuple[str, ...]:
        """See `Loss.term_names`."""
        return ()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """See `Loss.metric_names`."""
        return ()

    @property
    def needs(self) -> tuple[str, ...]:
        """Keys of ``given`` that the caller must give; "ref_logps" is any one of `REFERENCES`."""
        return ()

    @property
    def takes(self) -> tuple[str, ...]:
        """Keys of ``given`` that the caller may give."""
        return ()

    @property
    def takes_all(self) -> bool:
        """Whether the caller may give anything."""
        return False

    def values(self, units: Any) -> UnitTerms:
        """One value per unit of the `Pairs`, `Sequences` or `Tokens`; the loss is their mean over the batch."""
        raise NotImplementedError(f"{self.name}.values")

    def check_given(self, given: Mapping[str, Tensor]) -> None:
        """See `Loss.check_given`."""
        needs = self.needs
        if not given and not needs:
            return
        references = [key for key in REFERENCES if key in given]
        if len(references) > 1:
            raise ValueError(f"{references[1]}: expected the reference's log-probs once, got {references[0]} too")
        for key in needs:
            if key == "ref_logps" and not references:
                raise ValueError(
                    f"ref_sum_logps: {self.name} expected the reference model's log-probs (as sums, as means or "
                    "per token: see preference_loss), got none"
                )
            if key != "ref_logps" and key not in given:
                raise ValueError(f"{key}: {self.name} expected it, got none")
        accepted = {*needs, *self.takes, WEIGHTS}
        for key in () if self.takes_all else given:
            if key not in accepted and not ("ref_logps" in accepted and key in REFERENCES):
                raise ValueError(f"{key}: {self.name} has no use for it; expected none")

    def evaluate(
        self, units: Sequences | Tokens, backend: Backend, *, wants_gradient: bool
    ) -> tuple[UnitTerms, Tensor | None]:
        """See `Loss.evaluate`."""
        return shares_and_gradient(self, units, wants_gradient=wants_gradient)


def shares_and_gradient(
    loss: Formula, units: Sequences | Tokens, *, wants_gradient: bool
) -> tuple[UnitTerms, Tensor | None]:
    """Each unit's share of the loss, and dL/dlogps (n,) by autograd where wanted.

    Raises ValueError, naming the loss and the unit, where the formula's values have another shape than (u,), do not
    depend on the log-probs, or are NaN (or have a derivative that is) where these are finite; on a GPU the last is
    an asynchronous assertion. TypeError for what is no `UnitTerms`.
    """
    # Without a gradient nothing stops a function that changes what it sees, and these are the engine's.
    logps = units.logps.detach().requires_grad_() if wants_gradient else units.logps.clone()
    with torch.enable_grad():
        values = loss.values(replace(units, logps=logps))
    if isinstance(values, Tensor):
        values = UnitTerms(values)
    _check_form(loss, units, values)
    values = _in_dtype(values, logps.dtype)
    share = units.given[WEIGHTS] / units.batch.units(loss.unit) if WEIGHTS in units.given else None
    plain_share = 1 / units.batch.units(loss.unit)
    factor = plain_share if share is None else share.to(logps.dtype)
    d_logps = _gradient(loss, values.loss, factor, logps) if wants_gradient else None
    _check_numbers(loss, units, values.loss.detach(), d_logps)
    terms = {name: term.detach() * factor for name, term in values.terms.items()}
    metrics = {name: metric.detach() * plain_share for name, metric in values.metrics.items()}
    return UnitTerms(values.loss.detach() * factor, terms, metrics), d_logps


def _in_dtype(values: UnitTerms, dtype: torch.dtype) -> UnitTerms:
    terms = {name: term.to(dtype) for name, term in values.terms.items()}
    return UnitTerms(values.loss.to(dtype), terms, {name: x.to(dtype) for name, x in values.metrics.items()})


def exp_within_range(exponents: Tensor) -> Tensor:
    """exp, of no more than what leaves a factor of 2^20 to the largest number of the dtype.

    Beyond it the result, and so the loss, is constant. exp would be infinite there, and its derivative times the
    zero of a side that a minimum or a sigmoid switches off would be NaN.
    """
    return torch.exp(exponents.clamp(max=largest_exponent(exponents.dtype)))


def expm1_within_range(exponents: Tensor) -> Tensor:
    """As `exp_within_range`, minus one."""
    return torch.expm1(exponents.clamp(max=largest_exponent(exponents.dtype)))


def largest_exponent(dtype: torch.dtype) -> float:
    """Of what exp makes at most 2^-20 of the dtype's largest number."""
    return math.log(torch.finfo(dtype).max) - 20 * math.log(2)


def count_units(units: Sequences | Tokens) -> int:
    """How many pairs, sequences or tokens a loss sees."""
    if isinstance(units, Tokens):
        return units.logps.shape[0]
    return units.count if isinstance(units, Pairs) else len(units.token_counts)


def _gradient(loss: Formula, values: Tensor, factor: Tensor | float, logps: Tensor) -> Tensor:
    if values.shape[0] == 0 and not values.requires_grad:
        return torch.zeros_like(logps)
    d_logps = None
    if values.requires_grad:
        upstream = torch.ones_like(values) * factor
        (d_logps,) = torch.autograd.grad(values, logps, upstream, allow_unused=True)
    if d_logps is None:
        raise ValueError(f"loss: {loss.name} expected values that depend on the log-probs, got detached ones")
    return d_logps


def _check_form(loss: Formula, units: Sequences | Tokens, values: Any) -> None:
    """Refuse other shapes and names than promised."""
    if not isinstance(values, UnitTerms):
        raise TypeError(f"loss: {loss.name} expected a Tensor or a UnitTerms, got {type(values).__name__}")
    count = count_units(units)
    groups = (("terms", values.terms, loss.term_names), ("metrics", values.metrics, loss.metric_names))
    for kind, numbers, names in groups:
        if tuple(numbers) != names:
            raise ValueError(f"loss: {loss.name} expected the {kind} {names}, got {tuple(numbers)}")
    for name, number in (("values", values.loss), *values.terms.items(), *values.metrics.items()):
        shape = tuple(number.shape) if isinstance(number, Tensor) else type(number).__name__
        if shape != (count,):
            raise ValueError(
                f"loss: {loss.name} expected {name} of shape ({count},), one for each {loss.unit} "
                f"{units.first_unit} to {units.first_unit + count - 1}, got {shape}"
            )


def _check_numbers(loss: Formula, units: Sequences | Tokens, values: Tensor, d_logps: Tensor | None) -> None:
    """Refuse NaN where the log-probs are finite; what is not finite among these is not the loss's fault."""
    bad = values.isnan().any()
    if d_logps is not None:
        bad = bad | d_logps.isnan().any()
    message = f"loss: {loss.name} expected numbers for finite log-probs, got NaN"
    if values.device.type != "cpu":
        torch._assert_async((bad & units.logps.isfinite().all()).logical_not(), message)
        return
    if not bad:
        return
    wrong = values.isnan() if d_logps is None else values.isnan() | _any_per_unit(units, d_logps.isnan())
    wrong &= ~_any_per_unit(units, ~units.logps.isfinite())
    # A loss that sees other units of the batch may pass on what came from theirs.
    if not wrong.any() or (loss.needs_batch and not units.logps.isfinite().all()):
        return
    unit = int(wrong.nonzero()[0])
    raise ValueError(
        f"{message} at {loss.unit} {units.first_unit + unit}; what was given beside them may hold it: "
        f"{', '.join(units.given) or 'nothing was'}"
    )


def _any_per_unit(units: Sequences | Tokens, flags: Tensor) -> Tensor:
    """(n,) -> (u,): whether any of a unit's tokens is flagged."""
    if isinstance(units, Tokens):
        return flags
    pieces = torch.split(flags, list(units.token_counts))
    by_sequence = torch.stack([piece.any() for piece in pieces]) if pieces else flags.new_zeros(0)
    if not isinstance(units, Pairs):
        return by_sequence
    return by_sequence[: units.count] | by_sequence[units.count :]
