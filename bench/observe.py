"""Which backend really ran: a call with ``backend="auto"`` takes another one silently where a build failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

import slime_fused
from slime_fused.backends import BACKEND_NAMES, get_backend
from slime_fused.engine.plan import Plan

# What asks a backend instead of running it.
_QUESTIONS = frozenset({"available", "supports"})
_AUTO = {"cuda": "cuda", "cpu": "cpu"}


@contextmanager
def observed_backends() -> Iterator[set[str]]:
    """The names of all backends of which a kernel is called inside the block.

    The registry's own objects are watched, so it sees what the engine runs and not what it was asked for.
    """
    seen: set[str] = set()
    watched: list[tuple[Any, str]] = []
    for name in BACKEND_NAMES:
        backend: Any = get_backend(name)
        for method in dir(type(backend)):
            kernel = getattr(backend, method)
            if method.startswith("_") or method in _QUESTIONS or method.endswith("_bytes") or not callable(kernel):
                continue
            setattr(backend, method, _reporting(kernel, name, seen))
            watched.append((backend, method))
    try:
        yield seen
    finally:
        for backend, method in watched:
            delattr(backend, method)


def _reporting(kernel: Callable[..., Any], name: str, seen: set[str]) -> Callable[..., Any]:
    @wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        seen.add(name)
        return kernel(*args, **kwargs)

    return run


def expected_backend(requested: str, device: torch.device) -> str:
    """The backend that ``requested`` should mean on this device: its native one for "auto"."""
    return _AUTO.get(device.type, requested) if requested == "auto" else requested


def warning_of(requested: str, device: torch.device, seen: set[str]) -> str:
    """What is wrong with the backends that ran; empty where they are those that were meant."""
    expected = expected_backend(requested, device)
    if seen == {expected}:
        return ""
    why = slime_fused.available_backends().get(expected)
    ran = " and ".join(sorted(seen)) or "no backend"
    return f"ran on {ran}, not {expected}" + (f": {why}" if why else "")


def plan_record(plan: Plan) -> dict[str, Any]:
    """What a result file keeps of a plan: sizes in bytes, and the printed plan whole."""
    return {
        "kind": plan.kind,
        "chunks": len(plan.chunks),
        "chunk_rows": plan.chunk_rows,
        "blocks": plan.blocks,
        "products": plan.products,
        "workspace": plan.workspace,
        "workspace_bytes": plan.workspace_bytes,
        "scratch_bytes": plan.scratch_bytes,
        "accumulator_bytes": plan.accumulator_bytes,
        "text": str(plan),
    }
