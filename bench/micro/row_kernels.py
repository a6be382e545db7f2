"""Bandwidth of the CUDA row kernels on one GPU, as a share of a device-to-device copy.

    python -m bench.micro.row_kernels --out row_kernels.json

For each vocabulary the logits buffer is about 1 GiB, so that no cache holds it. `softmax_residual` in place is
charged one read and one write of every element, whatever it really moves; `logits_stats` one read. Times are
medians over CUDA events; the buffer is restored before each run, outside the timed region, so that every run sees
the same logits. Each kernel is first compared with float64 on sampled rows, must leave the padding columns alone,
and must give the same bits twice. Other layouts than the shipped ones: `bench.micro.sweep`.

`--once` launches `softmax_residual` a single time, for a profiler.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from bench.micro.common import GIB, Report, copy_rate, parser, synchronize, time_ms, within
from bench.micro.row_bench import KERNELS, Case, Result, RowBench, native, print_results, row_backend
from slime_fused.backends.base import SlimePairs, SlimeWeights

BFLOAT16 = torch.bfloat16
CASES = (
    Case(128256, 128256, BFLOAT16),
    Case(131072, 131072, BFLOAT16),
    Case(151936, 151936, BFLOAT16),
    Case(262144, 262144, BFLOAT16),
    Case(32000, 32000, BFLOAT16),
    Case(50257, 50264, BFLOAT16),
    Case(50257, 50257, BFLOAT16),
    Case(128256, 128256, torch.float16),
    Case(128256, 128256, torch.float32),
)
TOY_CASES = (
    Case(1000, 1000, torch.float32, size=1 << 16),
    Case(1003, 1008, BFLOAT16, size=1 << 16),
)


def measure_terms(device: torch.device) -> Result:
    """``slime_terms`` on 64 pairs of 512 + 512 tokens, in microseconds rather than bandwidth."""
    pairs, length = 64, 512
    logp = -torch.rand(2 * pairs * length, device=device) * 4
    cu_seqlens = torch.arange(0, 2 * pairs * length + 1, length, dtype=torch.int32, device=device)
    terms = SlimePairs(*torch.empty(5, pairs, device=device).unbind())
    d_logp = torch.empty_like(logp)
    weights = SlimeWeights(0.1, 0.1, 1.0, 1.25, 1.5, 1.0, 2.5, 2.5, 1 / pairs, 0.0)
    backend = row_backend(device)

    def run() -> None:
        backend.slime_terms(logp, cu_seqlens, weights, terms, d_logp)

    run()
    expected = -0.1 / pairs * logp.view(2, pairs, length)[0].double().mean(1)
    correct = torch.allclose(terms.anchor.double(), expected, rtol=1e-6, atol=0)
    ms, spread = time_ms(device, run, repeats=21)
    return Result("64 x (512 + 512)", "slime_terms", "", ms, spread, 0, 0, correct)


def shipped_layout(case: Case, device: torch.device) -> str:
    """The layout that the backend takes by itself."""
    if device.type != "cuda":
        return "stand-in"
    capability = native().row_kernel_capability(device.index or 0)
    return str(native().choose_row_plan(case.vocab, case.dtype.itemsize, capability))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case; the exit code says whether a kernel gave wrong numbers."""
    options = parser(__doc__)
    options.add_argument("--once", action="store_true", help="one launch at the first case, nothing timed")
    args = options.parse_args(argv)
    device = torch.device(args.device)
    is_toy = device.type != "cuda"
    cases, repeats = (TOY_CASES, 3) if is_toy else (CASES, 21)
    backend = row_backend(device)
    if args.once:
        RowBench(cases[0], 1.0, backend, device).residual()
        synchronize(device)
        return 0

    rate = copy_rate(device, (1 << 20) if is_toy else GIB)
    report = Report(args.out, device, repeats=repeats, copy_gb_s=rate)
    print(f"copy {rate:.0f} GB/s (read + write)")
    terms = measure_terms(device)
    report.add(terms)
    wrong = int(terms.correct is not True)
    for case in within(args.seconds, report, cases):
        layout = shipped_layout(case, device)
        bench = RowBench(case, rate, backend, device, repeats)
        measured = [*(bench.measure(kernel, "shipped") for kernel in KERNELS), *bench.measure_scale()]
        report.add(*measured)
        report.put(layouts={**report.payload.get("layouts", {}), case.name: layout})
        wrong += sum(result.correct is not True for result in measured)
        del bench
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print_results(f"{case.name}, {case.rows} rows, {layout}", measured)
    return report.finish(has_failed=wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
