"""The end-to-end benchmark as text: lines for the terminal, and tables and plots for README."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.plots import draw_panels
from bench.report import markdown_table, mebibytes, milliseconds
from bench.results import OK, RESULTS
from bench.steps.results import LimitRow, StepRow, StepRun, read_step_run, round_ratios

_YARDSTICK = "slime_fused"
_HEADINGS = (
    "contestant",
    "step",
    "spread",
    f"time / {_YARDSTICK}'s",
    "tokens/s",
    "peak memory",
    "added by the step",
    "loss, gradient error",
)
_LIMIT_HEADINGS = ("case", "contestant", "longest sequence", "most pairs")
_NOTHING = "Not run yet: `python -m bench.end_to_end` writes the result file from which this is rendered."
_NO_GPU = "**No row has been run on a GPU.**"


def format_step_row(row: StepRow) -> str:
    """One row for the terminal."""
    if row.status != OK:
        return f"{row.case}  {row.contestant}  {row.status}: {row.reason}"
    added = mebibytes(row.added_bytes)
    parts = (
        milliseconds(row.median_ms),
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f} tokens/s",
        f"adds {added}" if added else "",
        _errors(row),
        row.ran,
        row.reason,
    )
    return f"{row.case}  {row.contestant}  " + ", ".join(part for part in parts if part)


def format_limit_row(row: LimitRow) -> str:
    """One found limit for the terminal."""
    return f"{row.case}  {row.contestant}  largest {row.quantity}: {_limit(row)}"


def stored_step_runs(results: Path = RESULTS) -> list[StepRun]:
    """All stored runs, those on a GPU first, then the newest first."""
    runs = [read_step_run(path) for path in sorted(results.glob("*/end_to_end.json"))]
    runs.sort(key=lambda run: run.machine["date"], reverse=True)
    return sorted(runs, key=lambda run: "gpu" not in run.machine)


def steps_markdown(runs: Sequence[StepRun]) -> str:
    """All runs; says where nothing ran."""
    if not runs:
        return f"{_NOTHING} {_NO_GPU}"
    parts = [_run_markdown(run) for run in runs]
    if not any("gpu" in run.machine for run in runs):
        parts.insert(0, _NO_GPU)
    return "\n\n".join(parts)


def _run_markdown(run: StepRun) -> str:
    machine = run.machine
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    parts = [f"{where}; torch {machine['torch']}, {machine['date']}, commit {machine['commit'][:10]}."]
    for name, case in run.cases.items():
        rows = [row for row in run.rows if row.case == name]
        if rows:
            parts += [f"**{name}**: {case.describe()}.", markdown_table(_HEADINGS, _table_lines(rows))]
    if run.limits:
        parts += [_limits_sentence(run), markdown_table(_LIMIT_HEADINGS, _limit_lines(run.limits))]
    return "\n\n".join(parts)


def _table_lines(rows: Sequence[StepRow]) -> list[tuple[str, ...]]:
    yardstick = next((row for row in rows if row.contestant == _YARDSTICK and row.status == OK), None)
    ordered = sorted(rows, key=lambda row: (row.median_ms is None, row.median_ms or 0.0))
    return [_cells(row, yardstick) for row in ordered]


def _cells(row: StepRow, yardstick: StepRow | None) -> tuple[str, ...]:
    time = milliseconds(row.median_ms)
    if not time and (row.status != OK or row.reason):
        time = f"{row.status}: {row.reason}" if row.status != OK else row.reason
    return (
        row.contestant,
        time,
        f"{100 * row.spread:.0f} %" if row.spread else "",
        "" if yardstick is None else _ratio(round_ratios(row, yardstick)),
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
        mebibytes(row.peak_bytes),
        mebibytes(row.added_bytes),
        _errors(row),
    )


def _ratio(ratios: Sequence[float]) -> str:
    """The median of the rounds' ratios and their range."""
    if not ratios:
        return ""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _errors(row: StepRow) -> str:
    if row.error_loss is None or row.error_gradient is None:
        return ""
    return f"{row.error_loss:.0e}, {row.error_gradient:.0e}"


def _limits_sentence(run: StepRun) -> str:
    rooms = {row.room_bytes for row in run.limits}
    if rooms == {None}:
        return "What fits, with all of the device's memory:"
    room = ", ".join(mebibytes(room) for room in sorted(room for room in rooms if room is not None))
    return f"What fits where a step may allocate {room} above weights and optimiser state (RLIMIT_DATA):"


def _limit_lines(limits: Sequence[LimitRow]) -> list[tuple[str, ...]]:
    table = {(row.case, row.contestant, row.quantity): row for row in limits}
    names = dict.fromkeys((row.case, row.contestant) for row in limits)
    return [
        (
            case,
            contestant,
            *(_limit(table.get((case, contestant, quantity))) for quantity in ("length", "pairs")),  # type: ignore[arg-type]
        )
        for case, contestant in names
    ]


def _limit(row: LimitRow | None) -> str:
    if row is None:
        return ""
    if row.fits is None:
        return f"{row.status}: {row.reason}"
    if row.fits == 0:
        return f"none ({row.fails} did not fit)"
    return f"{row.fits:,} or more" if row.fails is None else f"{row.fits:,}"


def draw_steps(run: StepRun, folder: Path) -> list[Path]:
    """Write `end_to_end_<gpu|cpu>_<time|memory|limits>.png`; a plot with nothing to compare is left out."""
    kind = "gpu" if "gpu" in run.machine else "cpu"
    plots: tuple[tuple[str, str, Callable[[StepRow], float | None]], ...] = (
        ("time", "time of a whole training step (s)", lambda row: row.median_ms and row.median_ms / 1e3),
        ("memory", "peak memory of a training step (MiB)", lambda row: row.peak_bytes and row.peak_bytes / 2**20),
    )
    drawings = [(name, title, _panels(run, value)) for name, title, value in plots]
    drawings.append(("limits", "longest sequence that fits (tokens)", _limit_panels(run)))
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, title, panels in drawings:
        if panels:
            path = folder / f"end_to_end_{kind}_{name}.png"
            draw_panels(panels, title, path)
            written.append(path)
    return written


Panels = list[tuple[str, list[tuple[str, float]]]]


def _panels(run: StepRun, value: Callable[[StepRow], float | None]) -> Panels:
    found = {
        name: [(row.contestant, value(row)) for row in run.rows if row.case == name and row.status == OK]
        for name in run.cases
    }
    return _comparable(found)


def _limit_panels(run: StepRun) -> Panels:
    found: dict[str, list[tuple[str, float | None]]] = {}
    for row in run.limits:
        if row.quantity == "length":
            found.setdefault(row.case, []).append((row.contestant, row.fits))
    return _comparable(found)


def _comparable(found: dict[str, list[tuple[str, float | None]]]) -> Panels:
    panels = []
    for name, values in found.items():
        bars = sorted(((who, value) for who, value in values if value is not None), key=lambda bar: bar[1])
        if len(bars) > 1:
            panels.append((name, bars))
    return panels
