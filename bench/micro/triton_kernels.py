"""The Triton kernels on one GPU: row kernels as a share of copy bandwidth, the fused head as a share of torch.mm.

    python -m bench.micro.triton_kernels --out triton_kernels.json

The shipped tile sizes (`triton_kernels/configs.py`), each compared with float64 and then timed. Row kernels work in
place on about 1 GiB of bfloat16 logits, as the engine does, restored before each run outside the timed region. The
fused head is charged 2 M V D FLOPs and compared with torch.mm of the same operands in slices of 2048 rows, which
forms no statistics. Other tile sizes: `bench.micro.sweep`.

On a CPU set TRITON_INTERPRET=1: toy sizes in Triton's interpreter, in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

from bench.micro.common import GIB, Report, copy_rate, parser, within
from bench.micro.row_bench import KERNELS, Case, RowBench, print_results
from slime_fused.backends import get_backend

VOCABULARIES = (128256, 151936, 32000, 262144)
LINEAR_SHAPES = ((8192, 4096, 128256), (8192, 4096, 151936), (16384, 2560, 262144))
TOY_VOCABULARIES = (300,)
TOY_LINEAR_SHAPES = ((8, 32, 260),)


def triton_backend() -> None:
    """SystemExit with the reason where Triton's kernels do not run."""
    available, reason = get_backend("triton").available()
    if not available:
        raise SystemExit(reason)


def row_cases(vocabularies: Sequence[int], *, is_toy: bool) -> list[Case]:
    """A buffer of logits per vocabulary; the toy's dtype is one that the interpreter computes exactly."""
    if is_toy:
        return [Case(vocab, vocab, torch.float32, size=4 * vocab * 4) for vocab in vocabularies]
    return [Case(vocab, vocab, torch.bfloat16) for vocab in vocabularies]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every shape; the exit code says whether a kernel gave wrong numbers or did not run."""
    args = parser(__doc__).parse_args(argv)
    device = torch.device(args.device)
    triton_backend()
    from bench.micro.triton_bench import LinearBench, TritonRows

    is_toy = device.type != "cuda"
    repeats, dtype = (1, torch.float32) if is_toy else (11, torch.bfloat16)
    rate = copy_rate(device, (1 << 20) if is_toy else GIB)
    report = Report(args.out, device, repeats=repeats, copy_gb_s=rate)
    wrong = 0

    def measure_rows(case: Case) -> None:
        nonlocal wrong
        bench = RowBench(case, rate, TritonRows(), device, repeats, slack=4)
        measured = [bench.measure(kernel, "shipped") for kernel in KERNELS]
        report.add(*measured)
        wrong += sum(result.correct is not True for result in measured)
        print_results(f"{case.name}, {case.rows} rows", measured)

    def measure_linear(shape: tuple[int, int, int]) -> None:
        nonlocal wrong
        bench = LinearBench(shape, device, dtype, repeats)
        measured = bench.measure()
        report.add(bench.product, measured)
        wrong += int(measured.correct is not True)
        shown = "failed" if measured.milliseconds is None else f"{measured.tflops:.1f} TFLOP/s"
        print(f"{bench.name}: torch.mm {bench.product.tflops:.1f} TFLOP/s, linear_stats {shown} {measured.note}")

    shapes = TOY_LINEAR_SHAPES if is_toy else LINEAR_SHAPES
    cases = row_cases(TOY_VOCABULARIES if is_toy else VOCABULARIES, is_toy=is_toy)
    work: list[Callable[[], None]] = [
        *((lambda case=case: measure_rows(case)) for case in cases[:2]),
        *((lambda shape=shape: measure_linear(shape)) for shape in shapes),
        *((lambda case=case: measure_rows(case)) for case in cases[2:]),
    ]
    for measure in within(args.seconds, report, work):
        measure()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return report.finish(has_failed=wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
