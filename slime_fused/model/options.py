"""Options of a loss, looked at before there is a model or a batch."""

from __future__ import annotations

from slime_fused.backends import BACKEND_NAMES
from slime_fused.engine.workspace import parse_workspace


def check_options(backend: str, workspace: int | str) -> None:
    """Refuse before training what each call of a loss would refuse. Whether a backend runs here is not asked.

    Raises ValueError for an unknown backend; ValueError or TypeError for a workspace that says no number of bytes.
    """
    if backend != "auto" and backend not in BACKEND_NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {BACKEND_NAMES}, got {backend!r}")
    parse_workspace(workspace)
