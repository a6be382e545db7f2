"""The matrix products alone, over 90 % of a step: in which output dtype, and in how many rows, at which rate.

    python -m bench.micro.products --out products.json

At the head of Llama-3-8B (D = 4096, V = 128256) in bfloat16, through the functions that the engine itself calls,
with M rows of a chunk: the logits; R W written in bfloat16 and in float32; dW = R^T X in bfloat16, written in
float32 as by the first of several chunks, and added to float32 as by the others. R is a true softmax residual. The
three products of a step with one chunk are "logits", "R W float32" and "dW bfloat16". About ten seconds on an H100.

Contestants take turns (A B A B ...), and every reading starts after the L2 cache was overwritten.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.contestants import softmax_residual_
from bench.measure import clock_for, interleave
from bench.micro.common import Report, first_line, parser, within
from slime_fused.engine import products

ROWS = (2048, 4096, 8192)
DEPTH, VOCAB = 4096, 128256
TOY_ROWS, TOY_DEPTH, TOY_VOCAB = (64, 128), 32, 500
Product = Callable[[], object]


@dataclass(frozen=True)
class Result:
    """One product of M rows: its median time over the rounds and its rate."""

    rows: int
    product: str
    milliseconds: float | None
    spread: float  # interquartile range / median
    tflops: float
    note: str = ""


def residual_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The true residual of these logits."""
    residual = logits.clone()
    softmax_residual_(residual, labels)
    return residual


def contestants(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Product]:
    """Every product of a chunk of these rows, by name; the float32 dW is shared by the two that write it."""
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    products.write_logits(hidden, weight, logits)
    residual = residual_of(logits, labels)
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.empty_like(weight)
    d_weight32 = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    return {
        "logits": lambda: products.write_logits(hidden, weight, logits),
        "R W bfloat16": lambda: torch.mm(residual, weight, out=d_hidden),
        "R W float32": lambda: products.residual_times_weight(residual, weight),
        "dW bfloat16": lambda: products.add_weight_grad(d_weight, residual, hidden, is_first=True),
        "dW float32 first": lambda: products.add_weight_grad(d_weight32, residual, hidden, is_first=True),
        "dW float32 added": lambda: products.add_weight_grad(d_weight32, residual, hidden, is_first=False),
    }


def measure(rows: int, weight: Tensor, device: torch.device, *, rounds: int, repeats: int) -> list[Result]:
    """All products of ``rows`` rows, in turns; one that fails is a result that says why."""
    generator = torch.Generator(device).manual_seed(rows)
    hidden = torch.randn(rows, weight.shape[1], generator=generator, device=device).to(weight.dtype)
    labels = torch.randint(len(weight), (rows,), generator=generator, device=device)
    failed: dict[str, str] = {}

    def give_up(name: str, error: Exception) -> None:
        failed[name] = first_line(error)

    steps = contestants(hidden, weight, labels)
    timings = interleave(
        clock_for(device),
        steps,  # type: ignore[arg-type]  # their results are not looked at
        rounds,
        repeats,
        warm=1,
        on_error=give_up,
    )
    flops = 2 * rows * weight.numel()
    results = []
    for name in steps:
        if name in failed:
            results.append(Result(rows, name, None, 0.0, 0.0, failed[name]))
            continue
        median = statistics.median(timings[name].samples)
        results.append(Result(rows, name, median, timings[name].spread, flops / median / 1e9))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every number of rows, largest last; the exit code says whether a product failed."""
    args = parser(__doc__).parse_args(argv)
    device = torch.device(args.device)
    is_toy = device.type != "cuda"
    depth, vocab = (TOY_DEPTH, TOY_VOCAB) if is_toy else (DEPTH, VOCAB)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(vocab, depth, generator=generator, device=device).mul_(2.5 * depth**-0.5).bfloat16()
    report = Report(args.out, device, hidden_size=depth, vocab_size=vocab, dtype="bfloat16")
    failed = 0
    for rows in within(args.seconds, report, TOY_ROWS if is_toy else ROWS):
        results = measure(rows, weight, device, rounds=2 if is_toy else 5, repeats=1 if is_toy else 2)
        report.add(*results)
        for result in results:
            shown = "failed" if result.milliseconds is None else f"{result.milliseconds:8.3f} ms"
            print(f"{rows:6d} rows  {result.product:18s} {shown} {result.tflops:7.1f} TFLOP/s {result.note}")
            failed += result.milliseconds is None
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return report.finish(has_failed=failed > 0)


if __name__ == "__main__":
    sys.exit(main())
