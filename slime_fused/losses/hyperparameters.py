"""Checks of a loss's hyperparameters when they are set: errors that name the field."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

FLOAT32_MAX = (2 - 2**-23) * 2.0**127
"""The largest number of the dtype in which losses are computed, but for float64 inputs."""


def require_number(
    owner: Any,
    name: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    kind: str = "number",
) -> None:
    """Refuse a field of ``owner`` that is no number in that range, or infinite in float32; keep it as Python's own.

    ``kind`` is what an error of the range calls it. Raises TypeError for what is no number, ValueError for one that
    is not finite or out of range.
    """
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    # Python's own: NumPy's would make a checkpoint that holds the configuration need NumPy.
    number = value if isinstance(value, int) else float(value)
    if not -FLOAT32_MAX <= number <= FLOAT32_MAX:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    object.__setattr__(owner, name, number)
    limits = [
        (">=", least, least is None or number >= least),
        (">", above, above is None or number > above),
        ("<=", most, most is None or number <= most),
        ("<", below, below is None or number < below),
    ]
    if not all(holds for _, _, holds in limits):
        expected = " and ".join(f"{sign} {limit:g}" for sign, limit, _ in limits if limit is not None)
        raise ValueError(f"{name}: expected a {kind} {expected}, got {value!r}")


def require_choice(owner: Any, name: str, choices: Sequence[str]) -> None:
    """Refuse, with a ValueError, a field of ``owner`` that is none of ``choices``."""
    if getattr(owner, name) not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {getattr(owner, name)!r}")


def require_flag(owner: Any, name: str) -> None:
    """Refuse, with a TypeError, a field of ``owner`` that is neither True nor False."""
    if not isinstance(getattr(owner, name), bool):
        raise TypeError(f"{name}: expected True or False, got {getattr(owner, name)!r}")
