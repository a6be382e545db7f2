"""The caller's ``workspace``: bytes, words, or "auto"."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from slime_fused.engine.plan import one_chunk_instead, plan_by_rows
from slime_fused.engine.problem import Problem

_AUTO_ROWS = {"cpu": 2048, "gpu": 4096}
_AUTO_CAP = {"cpu": 1 << 30, "gpu": 4 << 30}
_UNITS = {
    **{"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
    **{"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40},
}


def resolve_workspace(workspace: int | str, problem: Problem, *, is_gpu: bool) -> int:
    """Bytes for ``workspace``: a number of bytes, a string such as "512MiB", or "auto".

    "auto" is room for the largest unit and at least 2048 rows (4096 on a GPU: each chunk reads the head twice
    and its gradient once, which that many rows hide behind the products), at most 1 GiB (4 GiB on a GPU); and room
    for all rows where these take no more memory than such chunks and a float32 copy of dW (`make_plan`).

    Raises TypeError or ValueError for anything else.
    """
    limit = parse_workspace(workspace)
    return _automatic_workspace(problem, "gpu" if is_gpu else "cpu") if limit is None else limit


def parse_workspace(workspace: int | str) -> int | None:
    """The bytes that ``workspace`` says, or None for "auto". Raises as `resolve_workspace`."""
    if isinstance(workspace, str):
        return None if workspace == "auto" else parse_bytes(workspace)
    if isinstance(workspace, bool) or not isinstance(workspace, int):
        raise TypeError(f"workspace: expected 'auto', bytes, or a string such as '512MiB', got {workspace!r}")
    if workspace <= 0:
        raise ValueError(f"workspace: expected a positive number of bytes, got {workspace}")
    return workspace


@lru_cache(maxsize=256)
def _automatic_workspace(problem: Problem, kind: Literal["cpu", "gpu"]) -> int:
    rows = max(_AUTO_ROWS[kind], *problem.unit_rows, 1)
    workspace = max(min(problem.buffer_bytes(rows), _AUTO_CAP[kind]), problem.buffer_bytes(1))
    one = one_chunk_instead(plan_by_rows(problem, workspace))
    return workspace if one is None else max(workspace, one.workspace_bytes)


def parse_bytes(text: str) -> int:
    """ "512MiB" -> 536870912. Units: B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"workspace: expected 'auto', bytes, or a string such as '512MiB', got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])
