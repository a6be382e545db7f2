"""Train a real model with the fused SLIME loss and with the naive one, and compare losses, memory and speed.

    python examples/demo.py                      SmolLM2-135M-Instruct and 300 real pairs, fetched once into .demo/
    python examples/demo.py --data mine.jsonl    your own pairs

Two processes, one per loss, start from the same weights and see the same batches. They take turns step by step, so
that whatever else the machine does hits both; a difference in speed is called one only where the spreads of the two
do not overlap. Then the fused run goes on alone. Takes about four minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from demo_data import fetch_model, fetch_pairs
from demo_plot import plot_demo
from demo_report import print_report
from demo_stats import MIN_ROUNDS
from demo_turns import Contestant, take_turns
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

IMPLS = ("naive", "fused")
WORKER = "demo_worker:contest"

RUN = {"num_pairs": 2, "max_length": 192}
"""The shape of the training run: twice as many sequences per step as pairs."""

HEAD = {"pairs": 4, "max_length": 384}
"""Head and loss alone, on a larger batch: 3072 positions, whose logits take 0.6 GB in float32."""

MEMORY_ROUND = 1
UNTIMED = 2
"""Round 0 warms up and creates AdamW's state, round 1 is measured for memory, the others are timed."""

HELD_OUT = 8
EVALUATE_EVERY = 5
SAMPLE_TOKENS = 60

START_TIMEOUT = 600.0
STEP_TIMEOUT = 600.0
"""Seconds after which a contestant counts as hung. A step takes a few, a minute on a very busy machine."""


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

    def advance(self, units: float, detail: str) -> None:
        self.progress.update(self.task, advance=units, description=f"{self.name}: {detail}")
        if not self.console.is_terminal:
            self.console.print(f"    {detail}", highlight=False)


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything the summary shows, as one JSON-able value."""
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    rounds = UNTIMED + args.rounds
    stages = Stages(console, total=60 + 5 * rounds + 8 * rounds + 5 * max(args.steps - rounds, 0))
    with stages.progress, ExitStack() as running:
        model, pairs = find_start(args, stages)
        shape = {**RUN, "steps": max(args.steps, rounds + 1), "held_out": HELD_OUT}
        stages.start("starting one process per loss")
        both = [
            running.enter_context(
                Contestant(
                    impl,
                    WORKER,
                    folder / f"{impl}.log",
                    impl=impl,
                    model=str(model),
                    pairs=pairs,
                    folder=folder,
                    shape=shape,
                )
            )
            for impl in IMPLS
        ]
        results: dict[str, Any] = {"model": model.name, "cores": os.cpu_count(), **shape}
        results |= take_turns(both, 0, {impl: {"do": "start"} for impl in IMPLS}, START_TIMEOUT)["fused"]
        stages.advance(20, f"{results['parameters'] / 1e6:,.1f} million weights")
        results["head"] = measure_head(both, rounds, args.seconds / 4, stages)
        results["train"] = train(both, rounds, shape["steps"], args.seconds * 3 / 4, stages)
        stages.start("asking the trained model")
        fused = both[IMPLS.index("fused")]
        results["sample"] = fused.ask({"do": "sample", "tokens": SAMPLE_TOKENS}, START_TIMEOUT)
        fused.ask({"do": "save", "folder": str(folder / "trained")}, START_TIMEOUT)
        stages.progress.update(stages.task, completed=stages.progress.tasks[0].total, description="done")
    return results


def find_start(args: argparse.Namespace, stages: Stages) -> tuple[Path, Path]:
    """The model's folder and the file of pairs: the caller's, or fetched and unpacked once."""
    folder: Path = args.folder
    for option in ("data", "model"):
        path = getattr(args, option)
        if path and not Path(path).exists():
            raise FileNotFoundError(f"--{option}: no such file or folder: {path}")
    stages.start("fetching the pairs")
    pairs = Path(args.data) if args.data else fetch_pairs(folder)
    stages.start("fetching the model")
    source = Path(args.model) if args.model else fetch_model(folder)
    if source.suffix == ".gguf":
        start = folder / source.stem
        if not start.exists():
            stages.start("unpacking the model to float32 (once)")
            log = folder / "prepare.log"
            with Contestant("prepare", "demo_worker:prepare", log, source=source, folder=start) as preparing:
                preparing.ask({"do": "prepare"}, START_TIMEOUT)
        source = start
    stages.advance(20, "ready")
    return source, pairs


def turns(count: int, seconds: float, at_least: int) -> Iterator[tuple[int, bool]]:
    """(number, whether it is the last) of ``count`` turns; of fewer, but ``at_least``, if ``seconds`` run out."""
    end = time.monotonic() + seconds
    taken = 0.0
    for turn in range(count):
        began = time.monotonic()
        # This turn and one more like the one before must fit.
        is_late = began + 2 * taken > end and turn + 1 >= at_least
        is_last = is_late or turn + 1 == count
        yield turn, is_last
        if is_last:
            return
        taken = time.monotonic() - began


def measure_head(both: Sequence[Contestant], rounds: int, seconds: float, stages: Stages) -> dict[str, Any]:
    """Rounds of head and loss alone: every answer, by impl."""
    stages.start(f"head and loss alone, {2 * HEAD['pairs']} x {HEAD['max_length']} tokens, in turns")
    answers: dict[str, list[Any]] = {impl: [] for impl in IMPLS}
    for turn, is_last in turns(rounds, seconds, UNTIMED + MIN_ROUNDS):
        request = {"do": "head", "memory": turn == MEMORY_ROUND, **HEAD}
        for impl, answer in take_turns(both, turn, dict.fromkeys(IMPLS, request), STEP_TIMEOUT).items():
            answers[impl].append(answer)
        stages.advance(5, f"round {turn + 1}{', the last' if is_last else ''}")
    return answers


def train(both: Sequence[Contestant], rounds: int, steps: int, seconds: float, stages: Stages) -> dict[str, Any]:
    """``rounds`` of training steps in turns, then the fused run alone, ``steps`` in all: every answer, by impl, and
    the ``evaluations`` of the fused run, all on the same held-out pairs.
    """
    stages.start("training, in turns")
    begin = {impl: {"do": "begin", "evaluate": impl == "fused"} for impl in IMPLS}
    started = take_turns(both, 0, begin, START_TIMEOUT)
    evaluations = [{"step": 0, **started["fused"]["evaluation"]}]
    answers: dict[str, list[Any]] = {impl: [] for impl in IMPLS}

    def keep(given: dict[str, Any], units: float) -> None:
        for impl, answer in given.items():
            answers[impl].append(answer)
        step = given["fused"]["step"]
        if evaluation := given["fused"].pop("evaluation", None):
            evaluations.append({"step": step, **evaluation})
        margin = evaluations[-1]["rewards/margins"]
        stages.advance(units, f"step {step}, loss {given['fused']['loss']:.4f}, held-out margin {margin:+.3f}")

    for turn, is_last in turns(rounds, seconds * 0.7, UNTIMED + MIN_ROUNDS):
        request = {"do": "step", "memory": turn == MEMORY_ROUND, "evaluate": False}
        is_evaluated = (turn + 1) % EVALUATE_EVERY == 0
        requests = {
            "naive": {**request, "last": is_last},
            "fused": {**request, "last": False, "evaluate": is_evaluated},
        }
        keep(take_turns(both, turn, requests, STEP_TIMEOUT), 8)

    stages.start("training on, the fused run alone")
    fused = both[IMPLS.index("fused")]
    done = len(answers["fused"])
    for turn, is_last in turns(steps - done, seconds * 0.3, 1):
        is_evaluated = is_last or (done + turn + 1) % EVALUATE_EVERY == 0
        request = {"do": "step", "memory": False, "evaluate": is_evaluated, "last": is_last}
        keep({"fused": fused.ask(request, STEP_TIMEOUT)}, 5)
    return {**answers, "evaluations": evaluations, "held_out": started["fused"]["held_out"]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="", help="pairs as .jsonl, .json or .parquet; default: fetch 300 real ones"
    )
    parser.add_argument(
        "--model", default="", help="model folder or .gguf file; default: fetch SmolLM2-135M-Instruct"
    )
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where everything goes (default: .demo)")
    parser.add_argument("--rounds", type=int, default=8, help="timed rounds of both losses in turns (default: 8)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of the fused run (default: 20)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=300,
        help="on a busy machine: shorten the measurements to about this long, down to "
        f"{MIN_ROUNDS} timed rounds (default: 300)",
    )
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    # Offline from here on: nothing but pip's two downloads may reach for the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Threads that spin while they wait starve each other on a machine that is also busy with something else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # glibc keeps freed blocks of up to 32 MB for reuse, and their fragments would count as resident.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "4000000")
    console = Console()
    began = time.monotonic()
    try:
        results = measure(args, console)
    except (RuntimeError, OSError) as error:
        console.print(f"demo: error: {error}", style="red", markup=False, highlight=False)
        return 1
    (args.folder / "results.json").write_text(json.dumps(results, indent=1))
    picture = plot_demo(results, args.folder / "demo.png")
    print_report(results, console)
    console.print(
        f"picture: {picture}\nnumbers: {args.folder / 'results.json'}\nadapter: {args.folder / 'trained'}",
        highlight=False,
    )
    console.print(f"took {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
