"""The Triton kernels on one GPU: row kernels as a share of copy bandwidth, the fused head as a share of torch.mm.

    python -m bench.micro.triton_kernels --out triton_kernels.json

Every candidate tile size is first compared with plain PyTorch, then timed (median over CUDA events), so that one
run says which belongs in `triton_kernels/configs.py`. Row kernels work on about 1 GiB of bfloat16 logits, which no
cache holds, and are charged one read and one write of each element (`logits_stats` one read). Rows hold the same
logits at every run: the residual is written beside them, not over them. The fused head is charged 2 M V D FLOPs and
compared with torch.mm of the same operands in slices of 2048 rows, which does not form statistics at all.
Candidates that do not launch are reported, not hidden. About a minute, most of it compilation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from slime_fused.triton_kernels import configs, linear_stats, rows
from slime_fused.triton_kernels.configs import LinearConfig, RowConfig
from torch import Tensor

from slime_fused.backends.triton import TritonBackend

BUFFER_BYTES = 1 << 30
VOCABULARIES = (32000, 128256, 151936, 262144)
ROW_CANDIDATES = tuple(
    RowConfig(block, warps)
    for block, warps in (
        (2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16), (8192, 32), (16384, 32), (32768, 32),
    )
)  # fmt: skip
STREAM_CANDIDATES = (RowConfig(1024, 4), RowConfig(2048, 4), RowConfig(4096, 8), RowConfig(8192, 8))
LINEAR_SHAPES = ((8192, 4096, 128256), (16384, 2560, 262144))
_WIDE = LinearConfig(128, 256, 64, 16, 8, 3, uses_descriptors=True)
LINEAR_CANDIDATES = (
    _WIDE,
    replace(_WIDE, num_stages=4),
    replace(_WIDE, group_m=8),
    replace(_WIDE, group_m=32),
    replace(_WIDE, num_stages=4, group_m=32),
    replace(_WIDE, uses_descriptors=False),
    replace(_WIDE, block_m=256, block_n=128),
    replace(_WIDE, block_m=256, block_n=128, num_stages=4),
    replace(_WIDE, block_n=128, num_warps=4),
    replace(_WIDE, block_n=128, num_stages=4),
    replace(_WIDE, block_n=128, block_k=128),
    replace(_WIDE, block_m=64, num_warps=4, num_stages=2),
)
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Result:
    """One candidate: its median time, its rate (GB/s or TFLOP/s), and its share of the copy's or torch.mm's."""

    kernel: str
    shape: str
    config: str
    milliseconds: float
    rate: float
    share: float
    error: float
    """Largest absolute error of a log-sum-exp or residual on sampled rows, against float64."""
    note: str = ""


def median_ms(run: Callable[[], object], repeats: int, launches: int = 4) -> float:
    """Median milliseconds of one `run`, from events around several: their launches hide behind the first."""
    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(launches):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / launches)
    return statistics.median(times)


def copy_rate() -> float:
    """GB/s of a device-to-device copy of 1 GiB, bytes read and bytes written."""
    source = torch.zeros(BUFFER_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * BUFFER_BYTES / median_ms(lambda: target.copy_(source), 15) / 1e6


def short(config: RowConfig | LinearConfig) -> str:
    """A configuration in a table's cell."""
    if isinstance(config, RowConfig):
        return f"block {config.block}, {config.num_warps} warps"
    path = "tma" if config.uses_descriptors else "ptr"
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"{tile} w{config.num_warps} s{config.num_stages} g{config.group_m} {path}"


def first_line(error: Exception) -> str:
    """What a candidate that cannot run says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]


class RowBench:
    """The buffers of one vocabulary, and the candidates on them."""

    def __init__(self, vocab: int, copy_gb_s: float) -> None:
        self.vocab, self.copy_gb_s = vocab, copy_gb_s
        self.count = BUFFER_BYTES // (2 * vocab)
        generator = torch.Generator("cuda").manual_seed(vocab)
        self.logits = torch.empty(self.count, vocab, device="cuda", dtype=torch.bfloat16)
        for part in self.logits.split(512):
            part.copy_(3 * torch.randn(part.shape, device="cuda", generator=generator))
        self.out = torch.empty_like(self.logits)
        self.labels = torch.randint(0, vocab, (self.count,), device="cuda", generator=generator)
        self.stats = [torch.empty(self.count, device="cuda") for _ in range(3)]
        self.sample = torch.linspace(0, self.count - 1, CHECKED_ROWS, device="cuda").long()
        wide = self.logits[self.sample].double()
        self.lse = wide.logsumexp(1)
        self.residual = (wide - self.lse[:, None]).exp()
        self.residual[torch.arange(CHECKED_ROWS), self.labels[self.sample]] -= 1
        self.logp = torch.empty(self.count, device="cuda")

    def softmax_residual(self, config: RowConfig) -> None:
        """Launch it on all rows."""
        rows.softmax_residual(
            self.logits, self.out, self.labels, None, *self.stats[:2], self.logp, None,
            scale=1.0, softcap=None, label_smoothing=0.0, z_loss=0.0, config=config,
        )  # fmt: skip

    def logits_stats(self, config: RowConfig) -> None:
        """Launch it on all rows."""
        rows.logits_stats(
            self.logits, self.labels, None, *self.stats, None,
            scale=1.0, softcap=None, col_offset=0, merge=False, config=config,
        )  # fmt: skip

    def residual_from_stats(self, config: RowConfig) -> None:
        """Launch it with the statistics that `softmax_residual` left."""
        rows.residual_from_stats(
            self.logits, self.out, self.labels, None, *self.stats[:2], self.logp, None,
            scale=1.0, softcap=None, label_smoothing=0.0, z_loss=0.0,
            col_offset=0, vocab_size=self.vocab, config=config,
        )  # fmt: skip

    def error_of(self, kernel: str) -> float:
        """Largest absolute error of what the kernel just wrote, against float64, on the sampled rows."""
        lse = self.stats[0] + self.stats[1].log()
        error = float((lse[self.sample].double() - self.lse).abs().max())
        if kernel == "logits_stats":
            return error
        return max(error, float((self.out[self.sample].double() - self.residual).abs().max()))

    def measure(self) -> list[Result]:
        """Every candidate of every row kernel."""
        plan = (
            ("softmax_residual", self.softmax_residual, ROW_CANDIDATES, 2),
            ("logits_stats", self.logits_stats, ROW_CANDIDATES, 1),
            ("residual_from_stats", self.residual_from_stats, STREAM_CANDIDATES, 2),
        )
        results = []
        for name, launch, candidates, visits in plan:
            for config in candidates:
                try:
                    self.out.fill_(float("nan"))
                    launch(config)
                    error = self.error_of(name)
                    milliseconds = median_ms(partial(launch, config), 7)
                except Exception as failure:
                    results.append(Result(name, str(self.vocab), short(config), 0, 0, 0, 0, first_line(failure)))
                    continue
                rate = visits * self.logits.numel() * 2 / milliseconds / 1e6
                note = "" if error < 2e-3 else "WRONG"  # a bfloat16 rounding of the label's entry, 2^-9
                share = rate / self.copy_gb_s
                results.append(Result(name, str(self.vocab), short(config), milliseconds, rate, share, error, note))
        return results


def measure_rows(vocab: int, copy_gb_s: float) -> list[Result]:
    """Every candidate of every row kernel at one vocabulary; the buffers go when it returns."""
    return RowBench(vocab, copy_gb_s).measure()


def measure_linear(shape: tuple[int, int, int]) -> list[Result]:
    """torch.mm and every candidate of the fused head at (M, D, V)."""
    count, depth, vocab = shape
    generator = torch.Generator("cuda").manual_seed(depth)
    hidden = torch.randn(count, depth, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(vocab, depth, device="cuda", generator=generator).mul_(depth**-0.5).bfloat16()
    labels = torch.randint(0, vocab, (count,), device="cuda", generator=generator)
    flops = 2 * count * depth * vocab
    name = "x".join(map(str, shape))

    logits = torch.empty(2048, vocab, device="cuda", dtype=torch.bfloat16)

    def product() -> None:
        for part in hidden.split(2048):
            torch.mm(part, weight.t(), out=logits)

    mm_ms = median_ms(product, 5, launches=1)
    results = [Result("torch.mm", name, "", mm_ms, flops / mm_ms / 1e9, 1.0, 0.0)]

    sample = torch.linspace(0, count - 1, CHECKED_ROWS, device="cuda").long()
    exact = (hidden[sample].float() @ weight.float().t()).bfloat16().float()  # rounded once, as the kernel does
    exact_lse = exact.double().logsumexp(1)
    exact_label = exact[torch.arange(CHECKED_ROWS), labels[sample]].double()
    del exact
    out = [torch.empty(count, device="cuda") for _ in range(3)]
    for config in LINEAR_CANDIDATES:
        partials = torch.empty(2, *linear_stats.partial_shape(count, vocab, config), device="cuda")

        def run(config: LinearConfig = config, partials: Tensor = partials) -> None:
            linear_stats.linear_stats(
                hidden, weight, labels, None, *out, None, partials,
                scale=1.0, softcap=None, col_offset=0, config=config,
            )  # fmt: skip

        try:
            run()
            lse = out[0].double() + out[1].double().log()
            error = float((lse[sample] - exact_lse).abs().max())
            error = max(error, float((out[2][sample].double() - exact_label).abs().max()))
            milliseconds = median_ms(run, 5, launches=1)
        except Exception as failure:
            results.append(Result("linear_stats", name, short(config), 0, 0, 0, 0, first_line(failure)))
            continue
        note = "" if error < 2e-2 else "WRONG"  # an ulp of bfloat16 at 4: products are summed in other orders
        rate = flops / milliseconds / 1e9
        results.append(
            Result("linear_stats", name, short(config), milliseconds, rate, mm_ms / milliseconds, error, note)
        )
    return results


def print_table(results: list[Result]) -> None:
    """Best first within each kernel and shape."""
    for r in sorted(results, key=lambda r: (r.kernel, len(r.shape), r.shape, -r.share)):
        numbers = f"{r.milliseconds:9.4f} ms {r.rate:8.1f} {100 * r.share:6.1f} % {r.error:8.1e}"
        print(f"{r.kernel:20s} {r.shape:18s} {r.config:30s} {numbers} {r.note}")


def main() -> None:
    """Measure, print the table and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    parser.add_argument("--only", choices=("rows", "linear"), help="one half of the benchmark")
    parser.add_argument("--seconds", type=float, default=65, help="start no further shape after this many")
    args = parser.parse_args()
    is_available, reason = TritonBackend().available()
    if not is_available or not torch.cuda.is_available():
        raise SystemExit(f"needs a GPU: {reason}")
    torch.backends.cuda.matmul.allow_tf32 = False
    begin = time.perf_counter()
    device, rate = torch.cuda.get_device_name(), copy_rate()
    print(f"{device}, torch {torch.__version__}, {reason}: copy {rate:.0f} GB/s (read + write)")
    shipped = ", ".join(short(config) for _, config in configs.ROW_CONFIGS)
    print(f"shipped, shorter rows first: {shipped}; stream {short(configs.STREAM_CONFIG)}")

    work: list[Callable[[], list[Result]]] = []
    if args.only != "rows":
        work += [partial(measure_linear, shape) for shape in LINEAR_SHAPES]
    if args.only != "linear":
        work += [partial(measure_rows, vocab, rate) for vocab in VOCABULARIES]
    results: list[Result] = []
    for measure in work:
        if time.perf_counter() - begin > args.seconds:
            print("out of time: shapes left out")
            break
        measured = measure()
        print_table(measured)
        results += measured
        torch.cuda.empty_cache()
        if args.out:
            report = {"device": device, "torch": torch.__version__, "triton": reason, "copy_gb_s": rate}
            args.out.write_text(json.dumps({**report, "results": [asdict(r) for r in results]}, indent=1))
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
