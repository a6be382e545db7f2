"""A loss from the entries of another trainer's configuration file: `slime_loss`, and `slime_<hyperparameter>`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from slime_fused.integrations.batches import BatchLoss
from slime_fused.losses.names import PAIR_LOSSES

PREFIX = "slime_"
_PLACE = ("backend", "workspace")


def setting_names() -> tuple[str, ...]:
    """Every entry that `read_settings` knows."""
    hyperparameters = dict.fromkeys(field.name for loss in PAIR_LOSSES.values() for field in fields(loss))
    return tuple(f"{PREFIX}{name}" for name in ("loss", *hyperparameters, *_PLACE))


def read_settings(settings: Mapping[str, Any]) -> BatchLoss:
    """The loss that entries such as ``{"slime_loss": "slime", "slime_lambda_w": 0.1}`` describe.

    ``slime_loss`` is one of `PAIR_LOSSES`, "slime" if it is missing; every field of that loss is a setting, with
    the field's default; ``slime_backend`` and ``slime_workspace`` are arguments of `slime_fused.preference_loss`.
    Entries that are None count as missing, and those without the prefix belong to somebody else.

    Raises ValueError, TypeError naming the entry.
    """
    given = {
        name.removeprefix(PREFIX): value
        for name, value in settings.items()
        if name.startswith(PREFIX) and value is not None
    }
    name = given.pop("loss", "slime")
    if name not in PAIR_LOSSES:
        raise ValueError(f"{PREFIX}loss: expected one of {', '.join(PAIR_LOSSES)}, got {name!r}")
    place = {key: given.pop(key) for key in _PLACE if key in given}
    known = {field.name for field in fields(PAIR_LOSSES[name])}
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, [*known, "loss", *_PLACE], n=1)
            hint = f" (did you mean {PREFIX}{close[0]}?)" if close else ""
            expected = ", ".join(PREFIX + field for field in sorted(known))
            raise ValueError(f"{PREFIX}{key}: expected a setting of {name!r}: {expected}; got this one{hint}")
    try:
        return BatchLoss.of(PAIR_LOSSES[name](**given), **place)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{PREFIX}{error}") from None
