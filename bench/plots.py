"""Plots of a result file: time over the bare products, and peak memory, for every case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.cases import MIB
from bench.results import Row, Run

# One colour per kind of contestant, told apart in grey print too.
_OURS, _OTHERS = "#1b6ca8", "#c9c9c9"


def draw(run: Run, kind: str, folder: Path) -> list[Path]:
    """Write `<kind>_time.png` and `<kind>_memory.png`; a plot without any number is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
        ("time", "time of forward + backward, x the bare matrix products", lambda row: row.over_products),
        ("memory", "peak memory above the inputs (MiB)", _peak_mib),
    )
    written = []
    for name, title, value in plots:
        panels = [(case, _bars(run, case, value)) for case in run.cases]
        panels = [(case, bars) for case, bars in panels if len(bars) > 1]
        if panels:
            path = folder / f"{kind}_{name}.png"
            draw_panels(panels, title, path)
            written.append(path)
    return written


def _peak_mib(row: Row) -> float | None:
    return None if row.peak_bytes is None else row.peak_bytes / MIB


def _bars(run: Run, case: str, value: Callable[[Row], float | None]) -> list[tuple[str, float]]:
    """(contestant, value) of the SLIME rows that have a value, smallest first; other losses are other work."""
    found = [(row.contestant, value(row)) for row in run.rows if row.case == case and row.objective == "slime"]
    return sorted(((name, v) for name, v in found if v is not None), key=lambda bar: bar[1])


def _colour(name: str) -> str:
    return _OURS if "slime_fused" in name else _OTHERS


def draw_panels(panels: Sequence[tuple[str, list[tuple[str, float]]]], title: str, path: Path) -> None:
    """One panel of horizontal bars per (title, [(name, value)])."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [len(bars) + 1.0 for _, bars in panels]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, 0.28 * sum(heights) + 0.5), squeeze=False, height_ratios=heights
    )
    for axis, (case, bars) in zip(axes[:, 0], panels, strict=True):
        names, values = zip(*bars, strict=True)
        artists = axis.barh(names, values, color=[_colour(name) for name in names])
        axis.bar_label(artists, fmt=_label, padding=3, fontsize=8)
        axis.set_title(case, loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    figure.supxlabel(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _label(value: float) -> str:
    """Three digits, or all of a larger whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
