"""The demo's numbers as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demo_report import IMPLS, added_memory, compare, less, show_bytes, timed
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_COLORS = {"naive": "#9a9a9a", "fused": "#0b6e99"}
_GOOD, _BAD = "#2a8c4a", "#c0504d"
_PARTS = {"train": "Whole training step", "head": "Head and loss alone"}


def plot_demo(results: dict[str, Any], path: Path) -> Path:
    """Write memory, time and what was learnt to ``path`` (PNG) and return it."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.04)  # type: ignore[union-attr]
    figure.suptitle(
        f"SLIME loss on {results['model']}: fused head against materialised logits "
        f"({results['cores']} CPU cores, float32)",
        fontsize=13,
        fontweight="bold",
    )
    costs, curves = figure.subfigures(2, 1)
    panels = costs.subplots(1, 4)
    for (part, title), (time, memory) in zip(_PARTS.items(), (panels[:2], panels[2:]), strict=True):
        _draw_times(time, results[part], title)
        _draw_memory(memory, results[part], title)
    learnt, losses = curves.subplots(1, 2)
    _draw_log_probs(learnt, results["train"])
    _draw_losses(losses, results["train"])
    for axes in (*panels, learnt, losses):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    return path


def _draw_times(axes: Axes, part: dict[str, Any], title: str) -> None:
    """Every round as a dot, the two of a round joined; the median and the spread as a bar."""
    comparison = compare(part, "seconds")
    seconds = [[step["seconds"] for step in timed(part)[impl]] for impl in IMPLS]
    for pair in zip(*seconds, strict=True):
        axes.plot((0.18, 0.82), pair, color="0.8", linewidth=0.7, zorder=1)
    for n, (impl, spread) in enumerate(zip(IMPLS, (comparison.naive, comparison.fused), strict=True)):
        inner = 0.18 + 0.64 * n
        outer = inner - 0.22 + 0.44 * n
        axes.scatter([inner] * len(seconds[n]), seconds[n], color=_COLORS[impl], s=18, zorder=2)
        axes.errorbar(
            outer,
            spread.median,
            yerr=[[spread.median - spread.low], [spread.high - spread.median]],
            fmt="_",
            markersize=16,
            markeredgewidth=2.5,
            linewidth=2,
            color=_COLORS[impl],
        )
        axes.annotate(
            f"{spread.median:.3g} s",
            (outer, spread.high),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_xlim(-0.3, 1.3)
    axes.set_ylim(0, 1.15 * max(max(values) for values in seconds))
    axes.set_xticks((0.05, 0.95), IMPLS)
    axes.set_ylabel("seconds")
    axes.set_title(
        f"{title}: time\nverdict: {comparison.verdict}\nby CPU time: {compare(part, 'processor_seconds').verdict}",
        fontsize=9.5,
    )


def _draw_memory(axes: Axes, part: dict[str, Any], title: str) -> None:
    memory = added_memory(part)
    values = [memory[impl] / 1e6 for impl in IMPLS]
    bars = axes.bar(IMPLS, values, color=[_COLORS[impl] for impl in IMPLS], width=0.6)
    axes.bar_label(bars, labels=[show_bytes(memory[impl]) for impl in IMPLS], padding=2, fontsize=9)
    axes.set_ylim(0, 1.15 * max(values))
    axes.set_ylabel("MB")
    axes.set_title(f"{title}:\nmemory it adds\n{less(memory)}", fontsize=9.5)


def _draw_log_probs(axes: Axes, train: dict[str, Any]) -> None:
    steps = [row["step"] for row in train["evaluations"]]
    chosen, rejected = ([row[f"logps/{side}"] for row in train["evaluations"]] for side in ("chosen", "rejected"))
    axes.plot(steps, chosen, "o-", color=_GOOD, markersize=4)
    axes.plot(steps, rejected, "o-", color=_BAD, markersize=4)
    for values, name, color in ((chosen, "chosen", _GOOD), (rejected, "rejected", _BAD)):
        axes.annotate(
            name, (steps[-1], values[-1]), xytext=(8, 0), textcoords="offset points", color=color, va="center"
        )
    first, last = train["evaluations"][0], train["evaluations"][-1]
    axes.margins(x=0.12)
    axes.set_xticks(steps)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean log-prob per token")
    axes.set_title(
        f"The same {train['held_out']} held-out pairs each time: loss {first['loss']:.2f} to {last['loss']:.2f}, "
        f"margin {first['rewards/margins']:+.2f} to {last['rewards/margins']:+.2f}",
        fontsize=10,
    )


def _draw_losses(axes: Axes, train: dict[str, Any]) -> None:
    for impl, style in (("naive", {"linewidth": 6, "alpha": 0.6}), ("fused", {"linewidth": 1.6})):
        axes.plot(
            [step["step"] for step in train[impl]],
            [step["loss"] for step in train[impl]],
            color=_COLORS[impl],
            label=impl,
            **style,  # type: ignore[arg-type]
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("SLIME loss of the step's batch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Same start, same batches, same losses; then fused alone", fontsize=10)
    axes.legend(frameon=False)
