"""The demo's numbers as a table, and what the model answers."""

from __future__ import annotations

import statistics
from typing import Any

from demo_stats import Comparison, Spread
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

IMPLS = ("naive", "fused")


def timed(part: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The timed answers by impl, of the rounds in which both took their turns."""
    shared = range(1, len(part["naive"]))  # the first warms up; after the last of naive's, fused goes on alone
    return {impl: [part[impl][n] for n in shared if "seconds" in part[impl][n]] for impl in IMPLS}


def compare(part: dict[str, Any], key: str) -> Comparison:
    """Both contestants' ``key`` over the timed rounds."""
    steps = timed(part)
    return Comparison.of(*([step[key] for step in steps[impl]] for impl in IMPLS))


def tokens_per_second(part: dict[str, Any]) -> dict[str, float]:
    """By impl: the mean step's tokens, without padding, in the median step's time."""
    return {
        impl: statistics.fmean(step["tokens"] for step in steps) / statistics.median(s["seconds"] for s in steps)
        for impl, steps in timed(part).items()
    }


def added_memory(part: dict[str, Any]) -> dict[str, int]:
    """Bytes by impl: the most that tensors of one step held at once, beyond those alive when it began."""
    return {impl: next(a["memory"] for a in part[impl] if "memory" in a) for impl in IMPLS}


def print_report(results: dict[str, Any], console: Console) -> None:
    """The table of the whole training step first, then of head and loss alone; then the sample answer."""
    head, train = results["head"], results["train"]
    rounds = len(timed(train)["naive"])
    table = Table(
        title=f"SLIME loss on {results['model']}: naive against fused ({results['cores']} CPU cores, float32)",
        caption=f"Seconds: median (10th to 90th percentile) of {rounds} rounds in turns, step by step. A verdict "
        "stands only where these spreads do not overlap. Added memory: tensors that one step holds at once, "
        "beyond those alive when it begins.",
    )
    for column in ("", "naive", "fused", "verdict"):
        table.add_column(column, justify="left" if column in ("", "verdict") else "right")

    table.add_row("[bold]Whole training step[/bold] (LoRA)")
    table.add_row(f"  {2 * results['num_pairs']} sequences of up to {results['max_length']} tokens")
    _add_costs(table, train)
    table.add_section()
    shape = head["fused"][0]
    table.add_row("[bold]Head and loss alone[/bold]")
    table.add_row(f"  {shape['targets']:,} of {shape['positions']:,} positions count")
    _add_costs(table, head)

    table.add_section()
    table.add_row("[bold]Do they agree?[/bold]")
    pairs = list(zip(train["naive"], train["fused"], strict=False))
    for name, (naive, fused) in (("first", pairs[0]), ("last shared", pairs[-1])):
        table.add_row(f"  loss, {name} step", f"{naive['loss']:.6f}", f"{fused['loss']:.6f}", "")
    worst = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in pairs)
    table.add_row("", "", "", f"differ by {worst:.0e} at most")

    table.add_section()
    before, after = train["evaluations"][0], train["evaluations"][-1]
    table.add_row(
        f"[bold]{train['held_out']} held-out pairs[/bold], fused run", "before", f"after {after['step']} steps", ""
    )
    for key, name in (
        ("loss", "loss"),
        ("logps/chosen", "chosen, mean log-prob"),
        ("logps/rejected", "rejected, mean log-prob"),
        ("rewards/margins", "margin"),
    ):
        table.add_row(f"  {name}", f"{before[key]:.4f}", f"{after[key]:.4f}", f"{after[key] - before[key]:+.4f}")
    console.print(table)

    sample = results["sample"]
    text = "\n\n".join(
        f"{title}: {sample[key].strip() or '(nothing)'}"
        for key, title in (("prompt", "Prompt"), ("before", "Before"), ("after", "After"), ("chosen", "Chosen"))
    )
    console.print(Panel(text, title="A held-out prompt, answered before and after training"), markup=False)


def _add_costs(table: Table, part: dict[str, Any]) -> None:
    for key, name in (("seconds", "seconds"), ("processor_seconds", "processor seconds")):
        comparison = compare(part, key)
        table.add_row(f"  {name}", _show(comparison.naive), _show(comparison.fused), comparison.verdict)
    table.add_row("  tokens per second", *(f"{rate:,.0f}" for rate in tokens_per_second(part).values()), "")
    memory = added_memory(part)
    table.add_row("  memory it adds", *(f"{memory[impl] / 1e6:,.1f} MB" for impl in IMPLS), _less(memory))
    resident = {impl: max(step["resident"] for step in steps) for impl, steps in timed(part).items()}
    table.add_row("  peak of the process", *(f"{resident[impl] / 1e6:,.0f} MB" for impl in IMPLS), _less(resident))


def _less(memory: dict[str, int]) -> str:
    ratio = memory["naive"] / memory["fused"]
    return f"fused {ratio:.2f} x less" if ratio >= 1 else f"naive {1 / ratio:.2f} x less"


def _show(spread: Spread) -> str:
    digits = 2 if spread.median >= 0.1 else 4
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f} to {spread.high:.{digits}f})"
