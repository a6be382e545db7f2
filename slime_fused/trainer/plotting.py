"""The course of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PANELS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Loss and its terms",
        (
            ("loss", "loss"),
            ("slime/anchor", "anchor"),
            ("slime/margin", "margin term"),
            ("slime/stabilizer", "stabilizer"),
        ),
    ),
    ("Mean log-prob per token", (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
    ("Margin (chosen - rejected)", (("rewards/margins", "margin"),)),
    ("Share of pairs", (("rewards/accuracies", "margin > 0"), ("slime/active_fraction", "below the hard margin"))),
)


def plot_history(
    history: Sequence[dict[str, Any]],
    path: str | Path,
    *,
    margin_hard: float | None = None,
    margin_soft: float | None = None,
    title: str = "SLIME training",
) -> Path:
    """Write a PNG of a trainer's ``state.log_history``: training as lines, evaluation as dots. Returns ``path``."""
    # Imported here: drawing is a small part of what this module's users do, and the library is slow to load.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (heading, series) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for color, (key, label) in enumerate(series):
            for prefix, style in (
                ("", {"linewidth": 1.6, "label": label}),
                ("eval_", {"linestyle": "", "marker": "o"}),
            ):
                points = [(row["step"], row[prefix + key]) for row in history if prefix + key in row]
                if points:
                    axes.plot(*zip(*points, strict=True), color=f"C{color}", **style)
        if "Margin" in heading:
            for value, label in ((margin_hard, "hard margin"), (margin_soft, "soft margin")):
                if value is not None:
                    axes.axhline(
                        value, color="0.5", linewidth=0.8, linestyle="--" if "hard" in label else ":", label=label
                    )
        axes.set_title(heading, fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return Path(path)
