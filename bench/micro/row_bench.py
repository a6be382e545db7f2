"""The buffers, checks and timings of the row kernels at one vocabulary: what all micro-benchmarks of them share.

On a CPU a stand-in runs the same contract in plain PyTorch and ignores the layout, so that everything around the
kernels can be tried without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.micro.common import GIB, fill_with_logits, first_line, synchronize, time_ms
from slime_fused.backends import get_backend
from slime_fused.backends.base import HeadTransform, LogitsBlock, RowStats, TokenLoss, VocabStats

PLAIN_HEAD, PLAIN_LOSS = HeadTransform(), TokenLoss()
SAMPLED_ROWS = 24
KERNELS = ("softmax_residual", "logits_stats", "residual_from_stats")


@dataclass(frozen=True)
class Case:
    """One shape: V columns of a dtype, rows ``pitch`` elements apart, in a buffer of ``size`` bytes."""

    vocab: int
    pitch: int
    dtype: torch.dtype
    size: int = GIB  # more than any cache

    @property
    def rows(self) -> int:
        """Rows that fill the buffer."""
        return self.size // (self.pitch * self.dtype.itemsize)

    @property
    def name(self) -> str:
        """For the table: vocabulary, pitch where it differs, dtype."""
        pitch = "" if self.pitch == self.vocab else f"/{self.pitch}"
        return f"{self.vocab}{pitch} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Result:
    """One measured kernel: its median time, its charged traffic and whether its numbers were right."""

    case: str
    kernel: str
    layout: str
    milliseconds: float | None
    spread: float  # (slowest - fastest) / median
    gigabytes_per_second: float
    share_of_copy: float
    correct: bool | None  # None: it could not be launched
    note: str = ""


class _StandIn:
    """Plain PyTorch behind the CUDA backend's contract; a layout is taken and ignored."""

    def __init__(self) -> None:
        self._torch = get_backend("torch")

    def softmax_residual(self, *args: Any, plan: Any = None, **kwargs: Any) -> None:
        self._torch.softmax_residual(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


def row_backend(device: torch.device) -> Any:
    """The CUDA backend, or on a CPU its stand-in; SystemExit with the reason where neither runs."""
    if device.type != "cuda":
        return _StandIn()
    backend = get_backend("cuda")
    available, reason = backend.available()
    if not available:
        raise SystemExit(reason)
    return backend


def native() -> Any:
    """The extension's CUDA half (it has no stubs), or a stand-in for its plan types where it was not compiled."""
    try:
        return import_module("slime_fused._C").cuda
    except (ImportError, AttributeError):
        stage = SimpleNamespace(shared="shared", registers="registers")
        return SimpleNamespace(RowStage=stage, RowPlan=SimpleNamespace)


class RowBench:
    """The buffers of one case and the checks and timings on them."""

    def __init__(
        self, case: Case, copy_gb_s: float, backend: Any, device: torch.device, repeats: int = 21, slack: float = 1
    ) -> None:
        """``backend``'s row kernels may take a ``plan``. ``slack`` widens the tolerances, which are CUDA's."""
        self.case, self.copy_gb_s, self.device, self.repeats = case, copy_gb_s, device, repeats
        self.backend, self.slack = backend, slack
        rows, vocab = case.rows, case.vocab
        self.pristine = torch.empty(rows, case.pitch, dtype=case.dtype, device=device)
        fill_with_logits(self.pristine, seed=case.vocab)
        self.buffer = torch.empty_like(self.pristine)
        self.logits = self.buffer[:, :vocab]
        generator = torch.Generator(device).manual_seed(case.vocab)
        self.labels = torch.randint(0, vocab, (rows,), device=device, generator=generator)
        self.labels[1] = -100
        self.labels[rows - 1] = vocab - 1
        self.row_max, self.row_sum, self.logp = (torch.empty(rows, device=device) for _ in range(3))
        self.block = LogitsBlock(self.logits, self.labels, None, PLAIN_HEAD)
        self.row_stats = RowStats(self.row_max, self.row_sum, self.logp)
        self.sample = torch.linspace(0, rows - 1, min(rows, SAMPLED_ROWS), device=device).long()
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

    def residual(self, plan: Any = None) -> None:
        """``softmax_residual`` in place, as the engine calls it; ``plan`` None is the backend's own choice."""
        self.backend.softmax_residual(self.block, self.logits, PLAIN_LOSS, self.row_stats, **_planned(plan))

    def stats(self, plan: Any = None) -> None:
        """``logits_stats`` over all columns; the label's logit goes where ``logp`` will be."""
        self.backend.logits_stats(self.block, VocabStats(self.row_max, self.row_sum, self.logp), **_planned(plan))

    def from_stats(self, plan: Any = None) -> None:
        """``residual_from_stats`` in place from known statistics."""
        self.backend.residual_from_stats(self.block, self.logits, PLAIN_LOSS, self.row_stats, **_planned(plan))

    def check_residual(self) -> str:
        """What is wrong with the residual that was just written; empty where nothing is."""
        eps = torch.finfo(self.case.dtype).eps
        got = self.logits[self.sample].double()
        # One rounding to the dtype, a few ulp of float32 before it, and fp16's smallest denormal.
        limit = (0.6 * eps + 6e-6 * self.slack) * self.ref_residual.abs() + (
            1e-7 if self.case.dtype == torch.float16 else 1e-12
        )
        if not bool(((got - self.ref_residual).abs() <= limit).all()):
            return f"residual off by {float((got - self.ref_residual).abs().max()):.2e}"
        problem = self._far_from("logp", self.logp, self.ref_logp) or self.check_stats()
        if problem:
            return problem
        if not torch.equal(self.buffer[:, self.case.vocab :], self.pristine[:, self.case.vocab :]):
            return "padding columns changed"
        return ""

    def check_stats(self) -> str:
        """What is wrong with the row statistics; empty where nothing is."""
        lse = torch.where(self.labels >= 0, self.row_max + self.row_sum.log(), 0.0)
        return self._far_from("lse", lse, self.ref_lse)

    def _far_from(self, name: str, value: Tensor, reference: Tensor) -> str:
        error = float((value[self.sample].double() - reference).abs().max())
        return "" if error < 1e-5 * self.slack else f"{name} off by {error:.2e}"

    def _verify_residual(self, plan: Any) -> str:
        """Run twice from the same logits: the numbers must be right and the bits the same."""
        self.row_sum.fill_(float("nan"))
        self.restore()
        self.residual(plan)
        problem = self.check_residual()
        if problem:
            return problem
        first, first_sum = self.logits[self.sample].clone(), self.row_sum.clone()
        self.restore()
        self.residual(plan)
        same = torch.equal(first, self.logits[self.sample]) and torch.equal(first_sum, self.row_sum)
        return "" if same else "second run gave other bits"

    def _verify_stats(self, plan: Any) -> str:
        self.restore()
        self.stats(plan)
        return self.check_stats()

    def _verify_from_stats(self, plan: Any) -> str:
        """From the backend's own statistics of the same logits."""
        self.restore()
        self.stats()
        self.logp.copy_(torch.where(self.labels >= 0, self.logp - self.row_max - self.row_sum.log(), 0.0))
        self.from_stats(plan)
        return self.check_residual()

    def measure(self, kernel: str, name: str, plan: Any = None) -> Result:
        """Check and time one of `KERNELS` in one layout; a layout that cannot be launched says why."""
        run, verify, visits = {
            "softmax_residual": (self.residual, self._verify_residual, 2),
            "logits_stats": (self.stats, self._verify_stats, 1),
            "residual_from_stats": (self.from_stats, self._verify_from_stats, 2),
        }[kernel]
        try:
            problem = verify(plan)
            prepare = None if kernel == "logits_stats" else self.restore
            return self._timed(kernel, name, lambda: run(plan), visits, problem, prepare)
        except Exception as error:  # each library has its own for a launch that the device refuses
            synchronize(self.device)  # raises after a fault, which leaves nothing to go on with
            return Result(self.case.name, kernel, name, None, 0, 0, 0, None, first_line(error))

    def measure_scale(self) -> list[Result]:
        """``scale_`` over the whole buffer, by one half and by one."""
        results = []
        for value, visits in ((0.5, 2), (1.0, 0)):
            factor = torch.tensor(value, device=self.device)
            self.restore()
            self.backend.scale_(self.buffer, factor)
            is_right = torch.equal(self.buffer[self.sample], self.pristine[self.sample] * value)
            problem = "" if is_right else "wrong product"

            def run(factor: Tensor = factor) -> None:
                self.backend.scale_(self.buffer, factor)

            results.append(self._timed("scale_", f"by {value}", run, visits, problem, self.restore))
        return results

    def _timed(
        self,
        kernel: str,
        layout: str,
        run: Callable[[], object],
        visits: int,
        problem: str,
        prepare: Callable[[], object] | None,
    ) -> Result:
        """Time a kernel that is charged ``visits`` passes over the logits."""
        ms, spread = time_ms(self.device, run, repeats=self.repeats, prepare=prepare)
        rate = visits * self.case.rows * self.case.vocab * self.case.dtype.itemsize / ms / 1e6
        share = rate / self.copy_gb_s
        return Result(self.case.name, kernel, layout, ms, spread, rate, share, not problem, problem)


def _planned(plan: Any) -> dict[str, Any]:
    return {} if plan is None else {"plan": plan}


def print_results(title: str, results: Iterable[Result]) -> None:
    """A table of one case."""
    print(title)
    for result in results:
        state = {True: "", False: "WRONG ", None: "n/a "}[result.correct]
        ms = float("nan") if result.milliseconds is None else result.milliseconds
        name = f"{result.kernel} {result.layout}"
        print(f"  {name:54s} {ms:8.4f} ms {100 * result.share_of_copy:6.1f} % {state}{result.note}", flush=True)
