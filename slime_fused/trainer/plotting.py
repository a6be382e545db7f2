"""The course of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Loss and its terms", ("loss",)),
    ("Mean log-prob per token", ("logps/chosen", "logps/rejected")),
    ("Margin of the rewards (chosen - rejected)", ("rewards/margins",)),
    ("Share of pairs", ("rewards/accuracies", "slime/active_fraction")),
    ("Entropy of the next token", ("entropy",)),
    ("Share of tokens that are the likeliest", ("mean_token_accuracy",)),
)
_LABELS = {
    "rewards/accuracies": "margin > 0",
    "slime/active_fraction": "below the hard margin",
    "mean_token_accuracy": "likeliest",
}


def plot_history(
    history: Sequence[dict[str, Any]],
    path: str | Path,
    *,
    margins: Mapping[str, float] | None = None,
    title: str = "Training",
) -> Path:
    """Write a PNG of a trainer's ``state.log_history``: training as lines, evaluation as dots. Returns ``path``.

    ``margins`` are drawn as lines across the panel of margins, by name. Raises ImportError without matplotlib.
    """
    # Imported here: drawing is a small part of what this module's users do, and the library is slow to load.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(history)
    figure = Figure(figsize=(11, 3.5 * -(-len(panels) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat
    for axes, (heading, series) in zip(grid, panels, strict=False):
        for color, key in enumerate(series):
            label = _LABELS.get(key, key.rpartition("/")[2])
            for prefix, style in (
                ("", {"linewidth": 1.6, "label": label}),
                ("eval_", {"linestyle": "", "marker": "o"}),
            ):
                points = [(row["step"], row[prefix + key]) for row in history if prefix + key in row]
                if points:
                    axes.plot(*zip(*points, strict=True), color=f"C{color}", **style)
        lines = (margins or {}).items() if "Margin" in heading else ()
        for dashes, (label, value) in zip(("--", ":"), lines, strict=False):
            axes.axhline(value, color="0.5", linewidth=0.8, linestyle=dashes, label=label)
        axes.set_title(heading, fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return Path(path)


def _panels(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Heading and reported numbers of each panel that has something to show."""
    present = dict.fromkeys(key.removeprefix("eval_") for row in history for key in row)
    listed = {key for _, keys in _PANELS for key in keys}
    # A loss's own terms go with the loss: "slime/anchor", "dpo/nll".
    terms = [
        key for key in present if "/" in key and key not in listed and not key.startswith(("logps", "rewards/"))
    ]
    panels = [(heading, [key for key in keys if key in present]) for heading, keys in _PANELS]
    panels[0] = (panels[0][0], [*panels[0][1], *terms])
    return [panel for panel in panels if panel[1]] or panels[:1]
