"""The registry of backends: which exist, which run here, and which one a call gets."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch

from slime_fused.backends.base import Backend

_CLASSES = {
    "cuda": ("slime_fused.backends.cuda", "CudaBackend"),
    "triton": ("slime_fused.backends.triton", "TritonBackend"),
    "cpu": ("slime_fused.backends.cpu", "CpuBackend"),
    "torch": ("slime_fused.backends.torch", "TorchBackend"),
}
"""In the order in which "auto" asks them."""

BACKEND_NAMES = tuple(_CLASSES)


@cache
def get_backend(name: str) -> Backend:
    """The backend of that name, whether or not it can run here."""
    module, cls = _CLASSES[name]
    backend: Backend = getattr(import_module(module), cls)()
    return backend


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that a call gets: the named one, or for "auto" the first that takes this device and dtype.

    Raises ValueError with the reason (and how to get the backend) where a named one cannot run.
    """
    if name != "auto" and name not in _CLASSES:
        raise ValueError(f"backend: expected 'auto' or one of {BACKEND_NAMES}, got {name!r}")
    refusals = []
    for candidate in BACKEND_NAMES if name == "auto" else (name,):
        backend = get_backend(candidate)
        is_available, reason = backend.available()
        if is_available:
            is_supported, reason = backend.supports(device, dtype)
            if is_supported:
                return backend
        refusals.append(f"{candidate}: {reason}")
    raise ValueError(
        f"backend: {name!r} cannot run on {device} with {dtype} ({'; '.join(refusals)}); "
        "slime_fused.available_backends() lists what runs here"
    )


def available_backends() -> dict[str, str | None]:
    """Each backend's name, with None where it runs here and the reason why not otherwise."""
    result: dict[str, str | None] = {}
    for name in BACKEND_NAMES:
        is_available, reason = get_backend(name).available()
        result[name] = None if is_available else reason
    return result
