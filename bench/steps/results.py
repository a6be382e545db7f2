"""Rows of the end-to-end benchmark and their file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bench.measure import Timing
from bench.results import OK, write_json
from bench.steps.cases import StepCase

WRONG = "wrong"
"""Status of a contestant that does not take the same step: it is not timed."""
OUT_OF_MEMORY = "out of memory"

Quantity = Literal["length", "pairs"]


@dataclass(frozen=True)
class StepRow:
    """One contestant on one case. Times in milliseconds, sizes in bytes, errors relative (`StepErrors`)."""

    case: str
    contestant: str
    status: str = OK
    reason: str = ""
    note: str = ""
    ran: str = ""
    median_ms: float | None = None
    spread: float | None = None
    samples_ms: tuple[float, ...] = ()
    """One per round: the same index is the same round for every contestant of a case."""
    tokens_per_s: float | None = None
    held_bytes: int | None = None
    """Weights, optimiser state, copies: what stays allocated between steps."""
    added_bytes: int | None = None
    """What a step takes above that at its worst moment."""
    loss: float | None = None
    gradient_norm: float | None = None
    error_loss: float | None = None
    error_norm: float | None = None
    error_gradient: float | None = None

    @property
    def peak_bytes(self) -> int | None:
        """All that is allocated at the step's worst moment."""
        if self.held_bytes is None or self.added_bytes is None:
            return None
        return self.held_bytes + self.added_bytes

    def timed(self, samples_ms: Sequence[float], decoder_positions: int) -> StepRow:
        """The row with times; tokens are the positions that go through the decoder, prompts included."""
        timing = Timing(tuple(samples_ms))
        return replace(
            self,
            median_ms=timing.median,
            spread=timing.spread,
            samples_ms=timing.samples,
            tokens_per_s=1e3 * decoder_positions / timing.median,
        )


@dataclass(frozen=True)
class LimitRow:
    """The largest size at which one contestant takes a step of a case without running out of memory."""

    case: str
    contestant: str
    quantity: Quantity
    status: str = OK
    reason: str = ""
    fits: int | None = None
    """Largest size that was seen to fit; 0 where the smallest one does not."""
    fails: int | None = None
    """Smallest size that was seen not to fit; None where the search ended at its upper bound."""
    room_bytes: int | None = None
    """What a step could allocate above weights and optimiser state; None: all of the device."""
    probes: tuple[tuple[int, bool], ...] = ()


@dataclass(frozen=True)
class StepRun:
    """One result file; cases are stored whole."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    cases: dict[str, StepCase]
    rows: tuple[StepRow, ...]
    limits: tuple[LimitRow, ...]


def write_step_run(
    path: Path,
    machine: dict[str, Any],
    settings: dict[str, Any],
    cases: Iterable[StepCase],
    rows: Iterable[StepRow],
    limits: Iterable[LimitRow],
) -> None:
    """Write (or rewrite) a result file; called after every row."""
    payload = {
        "machine": machine,
        "settings": settings,
        "cases": {case.name: asdict(case) for case in cases},
        "rows": [asdict(row) for row in rows],
        "limits": [asdict(row) for row in limits],
    }
    write_json(path, payload)


def step_row_from(record: dict[str, Any]) -> StepRow:
    """A row from its JSON object."""
    return StepRow(**{**record, "samples_ms": tuple(record["samples_ms"])})


def limit_row_from(record: dict[str, Any]) -> LimitRow:
    """A row from its JSON object."""
    return LimitRow(**{**record, "probes": tuple((size, fits) for size, fits in record["probes"])})


def read_step_run(path: Path) -> StepRun:
    """Read a result file."""
    payload = json.loads(path.read_text())
    return StepRun(
        payload["machine"],
        payload["settings"],
        {name: StepCase(**record) for name, record in payload["cases"].items()},
        tuple(step_row_from(record) for record in payload["rows"]),
        tuple(limit_row_from(record) for record in payload["limits"]),
    )


def round_ratios(row: StepRow, yardstick: StepRow) -> tuple[float, ...]:
    """Time over the yardstick's of the same round: what slows a round slows both."""
    return tuple(a / b for a, b in zip(row.samples_ms, yardstick.samples_ms, strict=False))
