"""Names for losses, so that an operator's schema, which holds no objects, can carry one.

The name of a loss that this package ships says all about it, so that another process (one that loads a saved graph)
finds the loss by its name. Other losses are found in the process that made them, for as long as they live.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from slime_fused.engine.units import Loss

_SHIPPED = __name__.rpartition(".")[0]
_others: WeakValueDictionary[str, Any] = WeakValueDictionary()
_numbers = itertools.count()


def register(loss: Any, *, is_literal: bool) -> str:
    """A key for a frozen dataclass, under which `loss_of` finds it or its equal.

    ``is_literal`` says that its fields are numbers, strings, None or tuples of these.
    """
    cls = type(loss)
    if is_literal and cls.__module__.startswith(f"{_SHIPPED}."):
        # Not by repr, whose guard against recursion no tracer follows.
        values = ", ".join([f"{field.name}={getattr(loss, field.name)!r}" for field in fields(loss)])
        return f"{cls.__module__}.{cls.__qualname__}({values})"
    key = f"{cls.__module__}.{cls.__qualname__}#{next(_numbers)}"
    _others[key] = loss
    return key


def loss_of(key: str) -> Loss:
    """The loss of that key.

    Raises ValueError for a key that `register` did not give, or whose loss lives no more.
    """
    loss: Loss | None = _others.get(key)
    return _rebuilt(key) if loss is None else loss


@lru_cache(maxsize=256)
def _rebuilt(key: str) -> Loss:
    """The shipped loss whose repr that is: its class, called with literals."""
    unknown = ValueError(
        f"loss: expected the key of a loss of this package, or of one that lives in this process, got {key!r}"
    )
    try:
        call = ast.parse(key, mode="eval").body
    except SyntaxError:
        raise unknown from None
    if not isinstance(call, ast.Call) or call.args or not all(keyword.arg for keyword in call.keywords):
        raise unknown
    module, _, name = ast.unparse(call.func).rpartition(".")
    if not module.startswith(f"{_SHIPPED}."):
        raise unknown
    try:
        cls = getattr(import_module(module), name)
        values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ImportError, AttributeError, ValueError):
        raise unknown from None
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise unknown
    return cast("Callable[..., Loss]", cls)(**values)
