"""A plain function of log-probs as a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from slime_fused.engine.units import Loss, Unit, UnitTerms
from slime_fused.losses.base import Formula
from slime_fused.losses.hyperparameters import require_choice, require_flag

_ATTRIBUTE = "_slime_fused_loss"
"""Of a function: its `Own`."""

UnitFunction = Callable[[Any], "Tensor | UnitTerms"]
"""`Pairs`, `Sequences` or `Tokens` -> (u,) values, or these with named terms and metrics."""


@dataclass(frozen=True)
class Own(Formula):
    """A loss by a function of your own, of pairs' log-probs unless ``unit`` says otherwise::

        def my_loss(pairs):
            margins = pairs.chosen_mean_logps - pairs.rejected_mean_logps
            return torch.relu(1 - margins) - 0.1 * pairs.chosen_mean_logps

        slime_fused.preference_loss(hidden, weight, labels, loss=my_loss)

    The function sees some whole units of the batch (`Pairs`, `Sequences` or `Tokens`) and returns one value for
    each, or a `UnitTerms` with named terms, which sum to the values, and metrics; their names are then given here,
    as ``term_names`` and ``metric_names``. The loss is the mean of the values over the batch. It may be called
    several times for one batch, each time with other units, and a unit's value must not depend on the others;
    where it does, ``needs_batch=True`` shows it all units at once. Only log-probs get a gradient, by autograd: what
    has parameters of its own, such as a module, learns nothing.

    ``pairs.given`` holds what the caller gave beside the labels. ``needs`` names what is required of that, so that
    its absence is an error before any work is done; "ref_logps" is any of the three kinds of reference log-probs.

    Two are equal where the function is the same and all else equal. In a compiled or saved graph the loss is found
    by a name that belongs to this object: keep it (or the function, where you pass that) for as long as the graph.

    Raises TypeError for what is no function, or for fields of the wrong kind; ValueError for an unknown unit.
    """

    is_literal: ClassVar[bool] = False

    function: UnitFunction
    unit: Unit = "pair"
    needs_batch: bool = False
    needs: tuple[str, ...] = ()
    term_names: tuple[str, ...] = ()
    metric_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.function) or isinstance(self.function, type):
            raise TypeError(f"function: expected a function of log-probs, got {self.function!r}")
        require_choice(self, "unit", ("token", "sequence", "pair"))
        require_flag(self, "needs_batch")
        for field in ("needs", "term_names", "metric_names"):
            names = getattr(self, field)
            is_sequence = isinstance(names, (tuple, list))
            if not is_sequence or not all(isinstance(name, str) for name in names):
                raise TypeError(f"{field}: expected a tuple of names, got {names!r}")
            object.__setattr__(self, field, tuple(names))
        super().__post_init__()

    @property
    def name(self) -> str:
        """The function's."""
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    @property
    def takes_all(self) -> bool:
        """Whatever is given: only the function knows what it uses."""
        return True

    def values(self, units: Any) -> UnitTerms:
        """See `Formula.values`."""
        values = self.function(units)
        return UnitTerms(values) if isinstance(values, Tensor) else values


def as_loss(loss: Any) -> Loss:
    """What a caller may pass as ``loss``: a `Loss` or a function of pairs.

    A function gets the same `Own` each time, for as long as it lives.

    Raises TypeError for anything else.
    """
    if isinstance(loss, Loss) and not isinstance(loss, type):
        return loss
    if not callable(loss) or isinstance(loss, type):
        raise TypeError(f"loss: expected a loss of slime_fused.losses or a function of pairs, got {loss!r}")
    own = getattr(loss, _ATTRIBUTE, None)
    if isinstance(own, Own) and own.function is loss:
        return own
    own = Own(loss)
    try:
        setattr(loss, _ATTRIBUTE, own)
    except AttributeError:
        return own  # A bound method, say, which is another object each time.
    return own
