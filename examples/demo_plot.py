"""The demo's numbers as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLORS = {"naive": "0.6", "fused": "C0"}
_GROUPS = (("head", "run", "head + loss\nrun's batch"), ("head", "large", "head + loss\nlarger batch"))


def plot_demo(results: dict[str, Any], path: Path) -> Path:
    """Write loss curves, memory and speed of both ways to ``path`` (PNG) and return it."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    (losses, margins), (memory, speed) = figure.subplots(2, 2)
    for impl, style in (("naive", {"linewidth": 5, "alpha": 0.5}), ("fused", {"linewidth": 1.5})):
        curve = results["train"][impl]["losses"]
        losses.plot(range(1, len(curve) + 1), curve, color=_COLORS[impl], label=impl, **style)
    losses.set_title("Training loss: same start, same batches")
    losses.set_xlabel("optimizer step")
    losses.legend()

    reports = [row for row in results["train"]["fused"]["history"] if "loss" in row]
    for key, label in (("logps/chosen", "chosen"), ("logps/rejected", "rejected")):
        margins.plot([r["step"] for r in reports], [r[key] for r in reports], label=label)
    margins.set_title("Mean log-prob per token (fused run)")
    margins.set_xlabel("optimizer step")
    margins.legend()

    rows = [(label, {impl: results[part][f"{size} {impl}"] for impl in _COLORS}) for part, size, label in _GROUPS]
    rows.append(("whole step\n(LoRA)", {impl: results["train"][impl] for impl in _COLORS}))
    for axes, key, scale, title in (
        (memory, "memory", 1e6, "Memory it adds [MB]"),
        (speed, "tokens_per_second", 1.0, "Speed [tokens/s]"),
    ):
        for offset, impl in ((-0.2, "naive"), (0.2, "fused")):
            bars = axes.bar(
                [n + offset for n in range(len(rows))],
                [values[impl][key] / scale for _, values in rows],
                width=0.38,
                color=_COLORS[impl],
                label=impl,
            )
            axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axes.set_xticks(range(len(rows)), [label for label, _ in rows], fontsize=9)
        axes.set_title(title)
        axes.legend()
    for axes in (losses, margins):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path
