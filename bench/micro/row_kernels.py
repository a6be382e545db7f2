"""Bandwidth of the CUDA row kernels on one GPU, as a share of a device-to-device copy.

    python -m bench.micro.row_kernels --out row_kernels.json

For each vocabulary the logits buffer is about 1 GiB, so that no cache holds it. `softmax_residual` in place is
charged one read and one write of every element, whatever it really moves; `logits_stats` one read. Times are
medians over CUDA events; the buffer is restored before each run, outside the timed region, so that every run sees
the same logits. Each layout of `softmax_residual` is first compared with float64 on sampled rows, must leave the
padding columns alone, and must give the same bits twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from slime_fused.backends.base import HeadTransform, SlimeWeights, TokenLoss
from slime_fused.backends.cuda import CudaBackend

BUFFER_BYTES = 1 << 30
REPEATS = 21
SHARED_BYTES = 219 * 1024  # what a Hopper block can stage (csrc/cuda/row_plan.cpp)
SAMPLED_ROWS = 24
PLAIN_HEAD = HeadTransform()
PLAIN_LOSS = TokenLoss()


@dataclass(frozen=True)
class Case:
    """One shape: V columns of a dtype, rows ``pitch`` elements apart."""

    vocab: int
    pitch: int
    dtype: torch.dtype
    full: bool = True  # every layout, or the tuned one alone

    @property
    def rows(self) -> int:
        """Rows that fill the buffer."""
        return BUFFER_BYTES // (self.pitch * self.dtype.itemsize)

    @property
    def name(self) -> str:
        """For the table: vocabulary, pitch where it differs, dtype."""
        pitch = "" if self.pitch == self.vocab else f"/{self.pitch}"
        return f"{self.vocab}{pitch} {str(self.dtype).removeprefix('torch.')}"


CASES = (
    Case(32000, 32000, torch.bfloat16),
    Case(50257, 50264, torch.bfloat16, full=False),
    Case(50257, 50257, torch.bfloat16, full=False),
    Case(128256, 128256, torch.bfloat16),
    Case(128256, 128256, torch.float16, full=False),
    Case(128256, 128256, torch.float32),
    Case(151936, 151936, torch.bfloat16),
    Case(262144, 262144, torch.bfloat16),
)


@dataclass(frozen=True)
class Result:
    """One measured kernel: its median time, its charged traffic and whether its numbers were right."""

    case: str
    kernel: str
    milliseconds: float
    spread: float  # (slowest - fastest) / median
    gigabytes_per_second: float
    share_of_copy: float
    correct: bool | None
    note: str = ""


def time_ms(run: Callable[[], object], prepare: Callable[[], object] | None = None) -> tuple[float, float]:
    """Median milliseconds of ``run`` on the current stream and the relative spread; ``prepare`` is not timed."""
    times = []
    for attempt in range(REPEATS + 2):
        if prepare is not None:
            prepare()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if attempt >= 2:
            times.append(start.elapsed_time(end))
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def layouts(case: Case, native: Any) -> dict[str, Any]:
    """The layouts to compare, by name; None is the backend's own choice."""
    plans: dict[str, Any] = {"tuned": None}
    if not case.full:
        return plans
    vectors = -(-case.vocab * case.dtype.itemsize // 16) + 1
    shared, registers = native.RowStage.shared, native.RowStage.registers
    for per_sm, pad in ((1, 200 << 10), (2, 100 << 10), (3, 0)):
        plans[f"L2 re-read, {per_sm}/SM"] = native.RowPlan(stage=shared, threads=512, pad_bytes=pad)
    for cluster in (1, 2, 4, 8, 16):
        for threads in (128, 256, 512):
            needed = -(-vectors // (cluster * threads))
            held = min(needed, SHARED_BYTES // (16 * threads))
            if needed < 2 or (held < needed and threads < 512):
                continue
            name = f"shared c{cluster} t{threads} v{held}"
            plans[name] = native.RowPlan(stage=shared, cluster=cluster, threads=threads, shared_vectors=held)
            if threads == 512 and cluster in (2, 4, 8):
                plans[f"{name} streaming"] = native.RowPlan(
                    stage=shared, cluster=cluster, threads=threads, shared_vectors=held, streaming=True
                )
        threads = -(-vectors // (cluster * 8 * 32)) * 32
        if 64 <= threads <= 1024:
            name = f"registers c{cluster} t{threads}"
            plans[name] = native.RowPlan(stage=registers, cluster=cluster, threads=threads)
            plans[f"{name} streaming"] = native.RowPlan(
                stage=registers, cluster=cluster, threads=threads, streaming=True
            )
    return plans


class RowBench:
    """The buffers of one case and the checks and timings on them."""

    def __init__(self, case: Case, copy_rate: float) -> None:
        self.case, self.copy_rate = case, copy_rate
        self.backend = CudaBackend()
        rows, vocab = case.rows, case.vocab
        generator = torch.Generator("cuda").manual_seed(case.vocab)
        self.pristine = torch.empty(rows, case.pitch, dtype=case.dtype, device="cuda")
        for part in self.pristine.split(256):
            part.copy_(3 * torch.randn(part.shape, device="cuda", generator=generator))
        self.buffer = torch.empty_like(self.pristine)
        self.logits = self.buffer[:, :vocab]
        self.labels = torch.randint(0, vocab, (rows,), device="cuda", generator=generator)
        self.labels[1] = -100
        self.labels[rows - 1] = vocab - 1
        self.row_max, self.row_sum, self.logp = (torch.empty(rows, device="cuda") for _ in range(3))
        self.sample = torch.linspace(0, rows - 1, SAMPLED_ROWS, device="cuda").long()
        self.sample[1] = 1
        self._reference()

    def _reference(self) -> None:
        """Float64 lse, logp and residual of the sampled rows."""
        logits = self.pristine[self.sample, : self.case.vocab].double()
        labels = self.labels[self.sample]
        valid = labels >= 0
        lse = torch.logsumexp(logits, 1)
        index = labels.clamp(min=0)[:, None]
        self.ref_logp = torch.where(valid, logits.gather(1, index)[:, 0] - lse, 0.0)
        residual = torch.softmax(logits, 1)
        residual.scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float64))
        self.ref_residual = residual * valid[:, None]
        self.ref_lse = torch.where(valid, lse, 0.0)

    def restore(self) -> None:
        """Put the logits back."""
        self.buffer.copy_(self.pristine)

    def residual(self, plan: Any) -> None:
        """``softmax_residual`` in place with a layout."""
        self.backend.softmax_residual(
            self.logits, self.logits, self.labels, None, PLAIN_HEAD, PLAIN_LOSS,
            row_max=self.row_max, row_sum=self.row_sum, logp=self.logp, loss=None, plan=plan,
        )  # fmt: skip

    def from_stats(self) -> None:
        """``residual_from_stats`` in place from known statistics."""
        self.backend.residual_from_stats(
            self.logits, self.logits, self.labels, None, PLAIN_HEAD, PLAIN_LOSS,
            col_offset=0, vocab_size=self.case.vocab,
            row_max=self.row_max, row_sum=self.row_sum, logp=self.logp, row_scale=None,
        )  # fmt: skip

    def check_residual(self) -> str:
        """What is wrong with the residual that was just written; empty where nothing is."""
        eps = torch.finfo(self.case.dtype).eps
        got = self.logits[self.sample].double()
        # One rounding to the dtype, a few ulp of float32 before it, and fp16's smallest denormal.
        limit = (0.6 * eps + 6e-6) * self.ref_residual.abs() + (1e-7 if self.case.dtype == torch.float16 else 1e-12)
        if not bool(((got - self.ref_residual).abs() <= limit).all()):
            return f"residual off by {float((got - self.ref_residual).abs().max()):.2e}"
        lse = torch.where(self.labels >= 0, self.row_max + self.row_sum.log(), 0.0)
        for name, value, reference in (("lse", lse, self.ref_lse), ("logp", self.logp, self.ref_logp)):
            error = float((value[self.sample].double() - reference).abs().max())
            if not error < 1e-5:
                return f"{name} off by {error:.2e}"
        if not torch.equal(self.buffer[:, self.case.vocab :], self.pristine[:, self.case.vocab :]):
            return "padding columns changed"
        return ""

    def verify(self, run: Callable[[], None], deterministic: bool = True) -> str:
        """Run twice from the same logits: the numbers must be right and the bits the same."""
        self.row_sum.fill_(float("nan"))
        self.restore()
        run()
        problem = self.check_residual()
        if problem or not deterministic:
            return problem
        first, first_sum = self.logits[self.sample].clone(), self.row_sum.clone()
        self.restore()
        run()
        same = torch.equal(first, self.logits[self.sample]) and torch.equal(first_sum, self.row_sum)
        return "" if same else "second run gave other bits"

    def result(
        self,
        kernel: str,
        run: Callable[[], object],
        visits: int,
        problem: str,
        prepare: Callable[[], object] | None,
    ) -> Result:
        """Time a kernel that is charged ``visits`` passes over the logits."""
        ms, spread = time_ms(run, prepare)
        rate = visits * self.case.rows * self.case.vocab * self.case.dtype.itemsize / ms / 1e6
        return Result(self.case.name, kernel, ms, spread, rate, rate / self.copy_rate, not problem, problem)

    def measure(self) -> list[Result]:
        """Every layout of ``softmax_residual``, then the kernels that work from statistics."""
        results = []
        for name, plan in layouts(self.case, _native()).items():

            def run(plan: Any = plan) -> None:
                self.residual(plan)

            try:
                problem = self.verify(run)
            except RuntimeError as error:  # a layout that this device cannot launch
                results.append(Result(self.case.name, name, float("nan"), 0, 0, 0, None, str(error)[-60:]))
                continue
            results.append(self.result(name, run, 2, problem, self.restore))
        results += self.measure_stats()
        return results

    def measure_stats(self) -> list[Result]:
        """``logits_stats``, ``residual_from_stats`` and ``scale_`` on this case's buffer."""
        rows = self.case.rows
        row_max, row_sum, label_logit = self.row_max, self.row_sum, torch.empty(rows, device="cuda")

        def stats() -> None:
            self.backend.logits_stats(
                self.logits, self.labels, None, PLAIN_HEAD, col_offset=0,
                row_max=row_max, row_sum=row_sum, label_logit=label_logit, logit_sum=None, merge=False,
            )  # fmt: skip

        self.restore()
        stats()
        lse = torch.where(self.labels >= 0, row_max + row_sum.log(), 0.0)
        error = float((lse[self.sample].double() - self.ref_lse).abs().max())
        results = [self.result("logits_stats", stats, 1, "" if error < 1e-5 else f"lse off by {error:.2e}", None)]

        self.logp.copy_(torch.where(self.labels >= 0, label_logit - row_max - row_sum.log(), 0.0))
        problem = self.verify_from_stats()
        results.append(self.result("residual_from_stats", self.from_stats, 2, problem, self.restore))

        factor = torch.tensor(0.5, device="cuda")
        self.restore()
        self.backend.scale_(self.buffer, factor)
        halved = torch.equal(self.buffer[self.sample], self.pristine[self.sample] * 0.5)

        def scale() -> None:
            self.backend.scale_(self.buffer, factor)

        results.append(self.result("scale_ by 0.5", scale, 2, "" if halved else "wrong product", self.restore))
        one = torch.tensor(1.0, device="cuda")
        results.append(self.result("scale_ by 1", lambda: self.backend.scale_(self.buffer, one), 0, "", None))
        return results

    def verify_from_stats(self) -> str:
        """Check ``residual_from_stats`` against the float64 residual; the statistics stay as they are."""
        self.restore()
        self.from_stats()
        return self.check_residual()


def _native() -> Any:
    """The extension's CUDA half; it has no stubs, so it is looked up by name."""
    return import_module("slime_fused._C").cuda


def measure_terms() -> Result:
    """``slime_terms`` on 64 pairs of 512 + 512 tokens, in microseconds rather than bandwidth."""
    pairs, length = 64, 512
    logp = -torch.rand(2 * pairs * length, device="cuda") * 4
    cu_seqlens = torch.arange(0, 2 * pairs * length + 1, length, dtype=torch.int32, device="cuda")
    outputs = [torch.empty(pairs, device="cuda") for _ in range(5)]
    d_logp = torch.empty_like(logp)
    weights = SlimeWeights(0.1, 0.1, 1.0, 1.25, 1.5, 1.0, 2.5, 2.5, 1 / pairs, 0.0)
    backend = CudaBackend()

    def run() -> None:
        backend.slime_terms(
            logp, cu_seqlens, weights, chosen_logps=outputs[0], rejected_logps=outputs[1], anchor=outputs[2],
            margin_loss=outputs[3], stabilizer=outputs[4], d_logp=d_logp,
        )  # fmt: skip

    run()
    expected = -0.1 / pairs * logp.view(2, pairs, length)[0].double().mean(1)
    correct = torch.allclose(outputs[2].double(), expected, rtol=1e-6, atol=0)
    ms, spread = time_ms(run)
    return Result("64 x (512 + 512)", "slime_terms", ms, spread, 0, 0, correct)


def copy_rate() -> float:
    """GB/s of a device-to-device copy of the buffer's size, counting bytes read and bytes written."""
    source = torch.randn(BUFFER_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    ms, _ = time_ms(lambda: target.copy_(source))
    return 2 * BUFFER_BYTES / ms / 1e6


def main() -> None:
    """Measure every case, print a table (best layout first) and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    parser.add_argument("--top", type=int, default=8, help="layouts of each case to print")
    args = parser.parse_args()
    available, reason = CudaBackend().available()
    if not available:
        raise SystemExit(reason)

    rate = copy_rate()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}: copy {rate:.0f} GB/s (read + write)")
    results = [measure_terms()]
    for case in CASES:
        bench = RowBench(case, rate)
        measured = bench.measure()
        results += measured
        del bench
        torch.cuda.empty_cache()
        is_layout = [r for r in measured if not r.kernel.startswith(("logits", "residual", "scale"))]
        best = sorted(is_layout, key=lambda r: -r.share_of_copy)[: args.top]
        wrong = [r for r in is_layout if r.correct is not True and r not in best]
        tuned = [r for r in is_layout if r.kernel == "tuned" and r not in best]
        print(f"{case.name}, {case.rows} rows")
        for r in best + tuned + wrong + [r for r in measured if r not in is_layout]:
            state = {True: "", False: "WRONG ", None: "n/a "}[r.correct]
            print(f"  {r.kernel:34s} {r.milliseconds:8.4f} ms {100 * r.share_of_copy:6.1f} % {state}{r.note}")
    terms = results[0]
    print(f"slime_terms, {terms.case}: {terms.milliseconds * 1e3:.1f} us {'' if terms.correct else 'WRONG'}")
    if args.out is not None:
        args.out.write_text(
            json.dumps({"device": device, "copy_gb_s": rate, "results": [asdict(r) for r in results]}, indent=1)
        )


if __name__ == "__main__":
    main()
