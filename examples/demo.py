"""Train a real model with the fused SLIME loss and with the naive one, and compare losses, memory and speed.

    python examples/demo.py                      SmolLM2-135M-Instruct and 300 real pairs, fetched once into .demo/
    python examples/demo.py --data mine.jsonl    your own pairs

Both runs start from the same weights and see the same batches. Every measurement has a process of its own. Takes
five to ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo_data import fetch_model, fetch_pairs
from demo_plot import plot_demo
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

IMPLS = ("fused", "naive")
RUN = {"pairs": 4, "max-length": 256}
"""The shape of the training run: sequences per batch are twice the pairs."""

LARGE = {"pairs": 4, "max-length": 512}
"""A larger head-and-loss problem: 4096 positions, whose logits alone take 0.8 GB in float32."""

HEAD_REPEATS = 4
MAX_STEPS = 16


class Stages:
    """A progress bar over the whole demo, in units of about one second; plain lines where there is no terminal."""

    def __init__(self, console: Console, total: float) -> None:
        self.console = console
        columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
        self.progress = Progress(*columns, TextColumn("{task.description}"), console=console)
        self.task = self.progress.add_task("starting", total=total)

    def start(self, name: str) -> None:
        self.name = name
        self.progress.update(self.task, description=name)
        if not self.console.is_terminal:
            self.console.print(f"... {name}", highlight=False)

    def detail(self, text: str) -> None:
        self.progress.update(self.task, description=f"{self.name}: {text}")
        if not self.console.is_terminal:
            self.console.print(f"    {text}", highlight=False)

    def advance(self, units: float) -> None:
        self.progress.advance(self.task, units)


def run_worker(
    what: str, *paths: Path, report: Callable[[dict[str, Any]], None] | None = None, **options: Any
) -> Any:
    """The result of one `demo_worker.py` process; ``report`` gets each of its progress events."""
    command = [sys.executable, str(Path(__file__).with_name("demo_worker.py")), what, *map(str, paths)]
    for name, value in options.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    result = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith('{"event"'):
                event = json.loads(line)
                if event["event"] == "result":
                    result = event
                elif report is not None:
                    report(event)
        errors = process.stderr.read()
    if result is None:
        raise RuntimeError(f"{what} worker failed (status {process.returncode}):\n{errors[-4000:]}")
    return result


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything the summary shows, as one JSON-able value."""
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(console, total=40 + 4 * 15 + 2 * args.seconds)
    results: dict[str, Any] = {"head": {}, "train": {}}
    with stages.progress:
        stages.start("fetching the pairs")
        pairs = Path(args.data) if args.data else fetch_pairs(folder)
        stages.start("fetching the model")
        source = Path(args.model) if args.model else fetch_model(folder)
        start = source
        if source.suffix == ".gguf":
            start = folder / "start"
            if not (start / "config.json").exists():
                stages.start("unpacking the model to float32 (once)")
                run_worker("prepare", source, start)
        stages.advance(40)

        for size, shape in (("run", RUN), ("large", LARGE)):
            for impl in IMPLS:
                stages.start(f"head and loss alone, {2 * shape['pairs']} x {shape['max-length']} tokens, {impl}")
                results["head"][f"{size} {impl}"] = run_worker(
                    "head", start, pairs, impl=impl, steps=HEAD_REPEATS, **shape
                )
                stages.advance(15)

        # The fused run takes the steps its time allows; the naive one repeats exactly those.
        steps, limit = MAX_STEPS, args.seconds
        for impl in IMPLS:
            stages.start(f"training, {impl}")
            unit = args.seconds / steps

            def report(event: dict[str, Any], unit: float = unit) -> None:
                stages.advance(unit)
                stages.detail(f"step {event['done']}, loss {event['loss']:.4f}, margin {event['margin']:+.3f}")

            options: dict[str, Any] = {"steps": steps, "seconds": limit, "impl": impl, **RUN}
            if impl == "fused":
                options |= {"evaluate": True, "save": folder / "trained"}
            results["train"][impl] = run_worker("train", start, pairs, report=report, **options)
            steps, limit = len(results["train"]["fused"]["losses"]), float("inf")
        stages.progress.update(stages.task, completed=stages.progress.tasks[0].total, description="done")
    return results


def summarise(results: dict[str, Any], console: Console) -> None:
    table = Table(title="Fused SLIME loss against the naive one (this machine's CPU, float32)")
    for column in ("", "naive", "fused", "naive / fused"):
        table.add_column(column, justify="left" if not column else "right")
    for size, label in (("run", "the run's batch"), ("large", "a larger batch")):
        naive, fused = (results["head"][f"{size} {impl}"] for impl in ("naive", "fused"))
        table.add_row(
            f"[bold]Head and loss, {label}[/bold]\n  {fused['targets']} of {fused['positions']} positions count"
        )
        _rows(table, naive, fused, "memory it adds")
    naive, fused = results["train"]["naive"], results["train"]["fused"]
    table.add_row(f"[bold]Whole training step[/bold] (LoRA)\n  median of {len(fused['losses'])} steps")
    _rows(table, naive, fused, "memory it adds")
    peaks = [r["memory_of_process"] / 1e6 for r in (naive, fused)]
    ratio = peaks[0] / peaks[1]
    table.add_row("  peak memory of the process", *(f"{p:,.0f} MB" for p in peaks), f"{ratio:.2f} x")
    differences = [abs(a - b) / abs(b) for a, b in zip(fused["losses"], naive["losses"], strict=True)]
    table.add_row("[bold]Do they agree?[/bold]")
    table.add_row("  loss of the first step", f"{naive['losses'][0]:.6f}", f"{fused['losses'][0]:.6f}", "")
    table.add_row("  loss of the last step", f"{naive['losses'][-1]:.6f}", f"{fused['losses'][-1]:.6f}", "")
    table.add_row("  largest relative difference", "", f"{max(differences):.1e}", "")
    before, after = fused["evaluations"]
    table.add_row("[bold]Held-out pairs, fused run[/bold]", "before", "after", "")
    for name in ("loss", "logps/chosen", "logps/rejected", "rewards/margins"):
        table.add_row(f"  {name}", f"{before['eval_' + name]:.4f}", f"{after['eval_' + name]:.4f}", "")
    console.print(table)


def _rows(table: Table, naive: dict[str, Any], fused: dict[str, Any], memory: str) -> None:
    megabytes = [max(r["memory"], 1) / 1e6 for r in (naive, fused)]
    speeds = [r["tokens_per_second"] for r in (naive, fused)]
    table.add_row(f"  {memory}", *(f"{m:,.0f} MB" for m in megabytes), f"{megabytes[0] / megabytes[1]:.2f} x")
    table.add_row("  seconds", f"{naive['seconds']:.2f}", f"{fused['seconds']:.2f}", "")
    table.add_row("  tokens per second", *(f"{s:,.0f}" for s in speeds), f"{speeds[0] / speeds[1]:.2f} x")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="", help="pairs as .jsonl, .json or .parquet; default: fetch 300 real ones"
    )
    parser.add_argument(
        "--model", default="", help="model folder or .gguf file; default: fetch SmolLM2-135M-Instruct"
    )
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where everything goes (default: .demo)")
    parser.add_argument("--seconds", type=float, default=120, help="time for the fused training run (default: 120)")
    args = parser.parse_args()
    # Offline from here on: nothing but pip's two downloads may reach for the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Threads that spin while they wait starve each other on a machine that is also busy with something else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # glibc keeps freed blocks of up to 32 MB for reuse, and their fragments would drown what is measured here.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "4000000")
    console = Console()
    began = time.monotonic()
    try:
        results = measure(args, console)
    except (RuntimeError, OSError) as error:
        console.print(f"demo: error: {error}", style="red", markup=False)
        return 1
    (args.folder / "results.json").write_text(json.dumps(results, indent=1))
    picture = plot_demo(results, args.folder / "demo.png")
    summarise(results, console)
    console.print(
        f"picture: {picture}\nnumbers: {args.folder / 'results.json'}\nadapter: {args.folder / 'trained'}"
    )
    console.print(f"took {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
