"""The demo's numbers as a table, and what the model answers."""

from __future__ import annotations

from typing import Any

from demo_stats import Comparison, Spread
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

IMPLS = ("naive", "fused")


def timed(part: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The timed answers by impl, of the rounds in which both took their turns."""
    shared = range(1, len(part["naive"]))  # the first warms up; after the last of naive's, fused goes on alone
    return {impl: [part[impl][n] for n in shared if "seconds" in part[impl][n]] for impl in IMPLS}


def compare(part: dict[str, Any], key: str) -> Comparison:
    """Both contestants' ``key`` over the timed rounds."""
    steps = timed(part)
    return Comparison.of(*([step[key] for step in steps[impl]] for impl in IMPLS))


def tokens_per_second(part: dict[str, Any]) -> list[Spread]:
    """Tokens without padding over seconds, step by step."""
    return [Spread.of([step["tokens"] / step["seconds"] for step in steps]) for steps in timed(part).values()]


def added_memory(part: dict[str, Any]) -> dict[str, int]:
    """Bytes by impl: the most that tensors of one step held at once, beyond those alive when it began."""
    return {impl: next(a["memory"] for a in part[impl] if "memory" in a) for impl in IMPLS}


def print_report(results: dict[str, Any], console: Console) -> None:
    """The table, the whole training step first; then the sample answer."""
    head, train = results["head"], results["train"]
    table = Table(
        title=f"SLIME loss, {results['model']}, float32, {results['cores']} CPU cores",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_style="bold",
    )
    # Where the terminal is too narrow, the numbers wrap and the words stay whole.
    table.add_column("", no_wrap=True)
    table.add_column("naive", justify="right")
    table.add_column("fused", justify="right")
    table.add_column("verdict", no_wrap=True)

    table.add_row("[bold]Whole step[/bold]")
    _add_costs(table, train)
    table.add_section()
    table.add_row("[bold]Head, loss alone[/bold]")
    _add_costs(table, head)

    table.add_section()
    pairs = list(zip(train["naive"], train["fused"], strict=False))
    worst = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in pairs)
    table.add_row("[bold]Same losses?[/bold]", "", "", f"differ by {worst:.0e}")
    for name, (naive, fused) in (("first step", pairs[0]), (f"step {len(pairs)}", pairs[-1])):
        table.add_row(f" {name}", f"{naive['loss']:.6f}", f"{fused['loss']:.6f}", "")

    table.add_section()
    before, after = train["evaluations"][0], train["evaluations"][-1]
    table.add_row(f"[bold]{train['held_out']} held-out pairs[/bold]", "before", f"fused, step {after['step']}", "")
    for key, name in (
        ("loss", "loss"),
        ("logps/chosen", "chosen log-prob"),
        ("logps/rejected", "rejected log-prob"),
        ("rewards/margins", "margin"),
    ):
        table.add_row(f" {name}", f"{before[key]:.4f}", f"{after[key]:.4f}", f"{after[key] - before[key]:+.4f}")
    console.print(table)
    shape, rounds = head["fused"][0], [len(timed(part)["naive"]) for part in (train, head)]
    console.print(
        f"Whole step: LoRA on {2 * results['num_pairs']} sequences of up to {results['max_length']} tokens. "
        f"Head and loss alone: {shape['positions']:,} positions, {shape['targets']:,} of them with a loss. "
        f"Seconds: median and 10th to 90th percentile of {rounds[0]} and {rounds[1]} rounds in turns; a verdict "
        "stands only where these spreads do not overlap. Memory it adds: the most that one step's tensors hold at "
        "once, beyond those alive when it begins. Log-probs: means per token, on the same pairs each time.",
        style="dim",
        highlight=False,
    )
    sample = results["sample"]
    answers = Text()
    for key, title in (("prompt", "Prompt"), ("before", "Before"), ("after", "After"), ("chosen", "Chosen")):
        text = " ".join(sample[key].split()) or "(nothing)"
        answers.append(f"{title}: ", style="bold").append(text if len(text) <= 400 else f"{text[:400]} ...")
        answers.append("\n" if key != "chosen" else "")
    console.print(Panel(answers, title="A held-out prompt, answered before and after training"))


def _add_costs(table: Table, part: dict[str, Any]) -> None:
    for key, name in (("seconds", "seconds"), ("processor_seconds", "CPU seconds")):
        comparison = compare(part, key)
        table.add_row(f" {name}", _show(comparison.naive), _show(comparison.fused), comparison.verdict)
    table.add_row(" tokens/s", *(_show(rate) for rate in tokens_per_second(part)), "")
    resident = {impl: max(step["resident"] for step in steps) for impl, steps in timed(part).items()}
    for name, memory in (("memory it adds", added_memory(part)), ("process, peak", resident)):
        table.add_row(f" {name}", *(show_bytes(memory[impl]) for impl in IMPLS), less(memory))


def show_bytes(count: float) -> str:
    """In MB, with a digit after the point where there are few."""
    return f"{count / 1e6:,.{0 if count >= 1e7 else 1}f} MB"


def less(memory: dict[str, int]) -> str:
    """Who needs less memory and by what factor: exact numbers, which need no spread."""
    ratio = memory["naive"] / memory["fused"]
    if 0.99 < ratio < 1.01:
        return "the same"
    return f"fused {ratio:.2f}x less" if ratio > 1 else f"naive {1 / ratio:.2f}x less"


def _show(spread: Spread) -> str:
    """Median (low-high), with as many digits after the point as a number of this size needs."""
    digits = next((n for n, least in enumerate((100, 10, 0.1)) if spread.median >= least), 4)
    return f"{spread.median:,.{digits}f} ({spread.low:,.{digits}f}-{spread.high:,.{digits}f})"
