"""Looking at what an integration hooks into before it does: another version may never call it."""

from __future__ import annotations

import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class HookError(RuntimeError):
    """The library has not the hook that its integration needs: the override would be ignored without a word."""


def require_method(owner: type, name: str, parameters: tuple[str, ...], package: str) -> None:
    """Refuse an ``owner`` without a method of that name that takes ``parameters`` (self apart) in that order.

    Raises HookError naming the versions.
    """
    method = getattr(owner, name, None)
    found = tuple(inspect.signature(method).parameters)[1:] if callable(method) else None
    if found is None or found[: len(parameters)] != parameters:
        got = "no such method" if found is None else f"({', '.join(found)})"
        raise HookError(
            f"{package}: expected {owner.__qualname__}.{name}({', '.join(parameters)}), got {got} in "
            f"{describe_versions(package)}: this version computes its loss elsewhere"
        )


def require_caller(owner: type, caller: str, name: str, package: str) -> None:
    """Refuse an ``owner`` none of whose implementations of ``caller`` speaks of ``name``: it is no hook there.

    Raises HookError naming the versions.
    """
    bodies = [vars(cls)[caller] for cls in owner.__mro__ if caller in vars(cls)]
    if not any(name in inspect.unwrap(body).__code__.co_names for body in bodies):
        raise HookError(
            f"{package}: expected {owner.__qualname__}.{caller} to call {name}, which it does not in "
            f"{describe_versions(package)}: training would go on with another loss"
        )


def describe_versions(*packages: str) -> str:
    """Of these and of what lies below them."""
    found = []
    for package in (*packages, "trl", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} (not installed)")
    return ", ".join(found)


def refuse_settings(owner: Any, unused: dict[str, Any], reason: str) -> None:
    """Refuse settings of ``owner`` that have another value than their ``unused`` one; None is no value.

    Enumerations count as their values, and lists of one as that one: releases of TRL differ in it.
    Raises ValueError naming the setting.
    """
    for name, value in unused.items():
        got = getattr(owner, name, None)
        got = got[0] if isinstance(got, list) and len(got) == 1 else got
        got = getattr(got, "value", got)
        if got is not None and got != value:
            raise ValueError(f"{name}: expected {value!r}, got {got!r}: {reason}")
