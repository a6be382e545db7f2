"""Every dropout of a model off: those that are modules, and those that are a number some forward reads."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def switch_dropout_off(model: nn.Module) -> None:
    """Set every dropout of ``model`` to 0, adapters included.

    `nn.Dropout` and its kin; and, on any module, attributes such as ``dropout``, ``attention_dropout`` or
    ``layerdrop``, which a forward gives to a functional dropout. The model's config, which is saved with it, keeps
    its values, except those that a forward reads from there each time.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name.lower() and isinstance(value, float):
                setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        cls: Any = type(module)
        for name in _read_from_config(cls):
            if isinstance(getattr(config, name, None), float):
                setattr(config, name, 0.0)


@cache
def _read_from_config(cls: Any) -> frozenset[str]:
    """The dropouts that the class's forward reads from its config, as Falcon's does; it is told by its source."""
    try:
        source = inspect.getsource(cls.forward)
    except (OSError, TypeError):  # made without a file
        return frozenset()
    return frozenset(re.findall(r"\bself\.config\.(\w*drop\w*)", source))
