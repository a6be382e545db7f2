"""What the losses of this folder share: from a formula on log-probs to each unit's share and its derivative."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from slime_fused.backends.base import Backend
from slime_fused.engine.units import Sequences, Tokens, Unit, UnitTerms
from slime_fused.losses.registry import register

REFERENCES = ("ref_sum_logps", "ref_mean_logps", "ref_token_logps")
"""The three ways to give a reference model's log-probs; a loss takes one."""


@dataclass(frozen=True)
class Formula:
    """A loss by its formula: a subclass is a frozen dataclass that defines `values`.

    The derivative with respect to the log-probs comes from autograd, on (n,) numbers.
    """

    unit: ClassVar[Unit] = "pair"
    term_names: ClassVar[tuple[str, ...]] = ()
    """Keys of `UnitTerms.terms`, in order."""
    metric_names: ClassVar[tuple[str, ...]] = ()
    """Keys of `UnitTerms.metrics`, in order."""

    def __post_init__(self) -> None:
        """Name the value, once its fields have been checked."""
        object.__setattr__(self, "key", register(self))

    @property
    def needs_batch(self) -> bool:
        """Whether a unit's value depends on other units."""
        return False

    @property
    def needs(self) -> tuple[str, ...]:
        """What the caller must give: keyword arguments of `preference_loss`; "ref_logps" is any of `REFERENCES`."""
        return ()

    @property
    def takes(self) -> tuple[str, ...]:
        """What the caller may give."""
        return ()

    def values(self, units: Any) -> UnitTerms:
        """One value per unit of the `Pairs`, `Sequences` or `Tokens`; the loss is their mean over the batch."""
        raise NotImplementedError(f"{type(self).__name__}.values")

    def check_given(self, given: Mapping[str, Tensor]) -> None:
        """See `Loss.check_given`."""
        name = type(self).__name__
        references = [key for key in REFERENCES if key in given]
        if len(references) > 1:
            raise ValueError(f"{references[1]}: expected the reference's log-probs once, got {references[0]} too")
        for key in self.needs:
            if key == "ref_logps" and not references:
                raise ValueError(
                    f"ref_sum_logps: {name} expected the reference model's log-probs (as sums, as means or per "
                    "token: see preference_loss), got none"
                )
            if key != "ref_logps" and key not in given:
                raise ValueError(f"{key}: {name} expected it, got none")
        accepted = {*self.needs, *self.takes}
        for key in given:
            if key not in accepted and not ("ref_logps" in accepted and key in REFERENCES):
                raise ValueError(f"{key}: {name} has no use for it; expected none")

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
    depend on the log-probs, or are NaN where these are finite (on a GPU an asynchronous assertion).
    """
    logps = units.logps.detach().requires_grad_(wants_gradient)
    with torch.enable_grad():
        values = loss.values(replace(units, logps=logps))
    _check_values(loss, units, values, wants_gradient)
    share = 1 / units.batch.units(loss.unit)
    d_logps = None
    if wants_gradient:
        (d_logps,) = torch.autograd.grad(values.loss.sum() * share, logps)
    scaled = ({k: v.detach() * share for k, v in d.items()} for d in (values.terms, values.metrics))
    return UnitTerms(values.loss.detach() * share, *scaled), d_logps
