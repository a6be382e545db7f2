"""What was compiled and what runs here."""

from __future__ import annotations

import platform
from importlib import import_module, metadata
from typing import Any

import torch

from slime_fused.backends import available_backends


def build_info() -> dict[str, Any]:
    """Versions, what the native extension was compiled with, and each backend's state. For bug reports."""
    try:
        native: dict[str, Any] | str = import_module("slime_fused._C").build_info()
    except ImportError as error:
        native = f"not built: {error}"
    return {
        "slime_fused": _version("slime-fused"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "native": native,
        "backends": {name: reason or "runs here" for name, reason in available_backends().items()},
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
