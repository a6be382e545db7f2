"""What a run consists of: which commands, in which order, each with how many seconds.

A part's share is guaranteed: a part may use its own share and what earlier parts left, never what later ones need.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.gpu_run.settings import ROOT, Settings

# A process of bench.gpu may take this much longer than its budget (bench.gpu.GRACE_S, and starting Python).
BENCH_GRACE_S = 20.0


@dataclass(frozen=True)
class Part:
    """One command with a time limit and a log of its own."""

    name: str
    step: str  # of settings.STEPS; "" belongs to every run
    command: tuple[str, ...]
    share: float
    """Seconds at LIMIT=560 and all steps; shares are scaled so that those of a run add up to its limit."""
    stretch: float = 2.0
    """At most this many shares, where earlier parts left time."""
    is_check: bool = False
    """Whether a failure makes the run's exit code 1: nothing measured after it can be trusted."""
    must_show: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""
    """Why it cannot run here."""


def gpu_test_files(tests: Path) -> list[Path]:
    """The test files with the marker `gpu`; others may import what a GPU machine lacks, and would stop pytest."""
    return sorted(path for path in tests.rglob("test_*.py") if re.search(r"\bmark\.gpu\b", path.read_text()))


def _pytest(settings: Settings, name: str, files: Sequence[Path], *options: str, share: float) -> Part:
    command = (
        *(settings.env_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *options),
        *(str(path.relative_to(ROOT)) for path in files),
    )
    # Skipped tests prove nothing; without a GPU all of them are.
    shows = "" if settings.is_toy else r"\d+ passed"
    missing = "" if files else "no test has the marker gpu"
    return Part(name, "tests", command, share, is_check=True, must_show=shows, missing=missing)


def _tests(settings: Settings) -> dict[str, Part]:
    files = gpu_test_files(ROOT / "tests")
    triton = [path for path in files if "triton" in path.name]
    native = [path for path in files if path not in triton]
    # Triton compiles hundreds of kernels: several processes where pytest-xdist is there.
    workers = min(8, os.cpu_count() or 1)
    has_xdist = importlib.util.find_spec("xdist") is not None and workers > 2
    parallel = ("-n", str(workers)) if has_xdist else ()
    rest = ("-m", "gpu and not alone", "-k", "not stream", "--maxfail=30", "--durations=8", *parallel)
    alone = ("-m", "gpu and alone", "-k", "not stream")
    on_triton = _pytest(settings, "tests-triton", triton, *rest, share=50)
    if settings.is_toy:  # in Triton's interpreter, which takes minutes for all
        on_triton = _pytest(settings, "tests-triton", triton, "-m", "gpu", "-k", "hinge", share=50)
        on_triton = replace(on_triton, variables={"TRITON_INTERPRET": "1"})
    return {
        # A kernel on the wrong stream makes every later number meaningless, so that is asked first.
        "stream-tests": _pytest(settings, "stream-tests", native, "-x", "-m", "gpu", "-k", "stream", share=30),
        "tests-alone": _pytest(settings, "tests-alone", native, *alone, share=15),
        "tests": _pytest(settings, "tests", native, *rest, share=50),
        "tests-triton": on_triton,
    }


def _module(settings: Settings, module: str, *arguments: str) -> tuple[str, ...]:
    return (settings.env_python, "-m", module, *arguments)


def all_parts(settings: Settings) -> list[Part]:
    """Every part in order; `Settings.steps` is applied by `chosen`."""
    tests = _tests(settings)
    device = ("--device", settings.device)
    out = settings.out
    own = (settings.python, "-m")
    triton_variables = {"TRITON_INTERPRET": "1"} if settings.is_toy else {}
    toy = ("--toy",) if settings.is_toy else ()
    budget = ("--time-budget", "{budget}")
    cases = ("--cases", *settings.cases) if settings.cases else ()

    def bench(stage: str, share: float) -> Part:
        command = _module(
            settings,
            "bench.gpu",
            *("--stage", stage, "--out", str(out), "--continue", *budget),
            *(*device, *toy, *cases),
        )
        return Part(stage, "bench", command, share, 4, is_check=stage == "headline")

    def micro(name: str, module: str, share: float, *arguments: str, step: str = "micro", **variables: str) -> Part:
        output = ("--out", str(out / f"{name}.json"), "--seconds", "{budget}")
        command = _module(settings, f"bench.micro.{module}", *output, *device, *arguments)
        return Part(name, step, command, share, variables=variables)

    def sanitize(tool: str) -> Part:
        # Our kernels alone, whose names hold the namespace: PyTorch's would take the time.
        backend = ("--backend", "cpu", *device) if settings.is_toy else ()
        command = (
            *("compute-sanitizer", "--tool", tool, "--error-exitcode", "9"),
            *("--kernel-name", "kernel_substring=slime_fused", "--report-api-errors", "no"),
            *_module(settings, "bench.sanitize", *backend),
        )
        missing = "" if shutil.which("compute-sanitizer") else "compute-sanitizer is not installed"
        caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Part(tool, "sanitizer", command, 18, is_check=True, variables=caching, missing=missing)

    # Without touching the card's clocks, which others may share.
    ncu = (
        *("ncu", "--set", "full", "-c", "1", "--kernel-name", "regex:softmax_residual", "--clock-control", "none"),
        *_module(settings, "bench.micro.row_kernels", "--once", *device),
    )
    quick = ("--quick",) if settings.is_toy else ()
    end_to_end = _module(settings, "bench.end_to_end", "--out", str(out), *device, *budget, *quick)
    return [
        Part("environment", "", (*own, "bench.gpu_run.environment"), 40, is_check=True),
        Part(
            "wheels",
            "",
            _module(settings, "bench.gpu_run.wheels", "install"),
            30 if settings.wheels else 0,
            4,
            missing="" if settings.wheels else "WHEELS names no folder",
        ),
        Part("machine", "machine", _module(settings, "bench.gpu_run.machine"), 5, 6),
        Part("build", "build", _module(settings, "bench.gpu_run.build"), 80, 3, is_check=True),
        tests["stream-tests"],
        bench("headline", 90),
        micro("row_kernels", "row_kernels", 30),
        micro("products", "products", 20),
        micro("profile", "profile_step", 20),
        Part(
            "ncu", "micro", ncu, 15, must_show="" if settings.is_toy else "softmax_residual",
            missing="" if shutil.which("ncu") else "ncu is not installed",
        ),
        tests["tests-alone"],
        tests["tests"],
        tests["tests-triton"],
        micro("triton_kernels", "triton_kernels", 25, **triton_variables),
        bench("rows", 85),
        Part(
            "end_to_end", "end_to_end", end_to_end, 50,
        ),
        micro("sweep_rows", "sweep", 15, "--kernels", "rows", step="sweep"),
        micro(
            "sweep_triton", "sweep", 15, "--kernels", "triton-rows", "triton-stream", "linear",
            step="sweep", **triton_variables,
        ),
        sanitize("memcheck"),
        sanitize("racecheck"),
    ]  # fmt: skip


def chosen(settings: Settings) -> list[Part]:
    """The parts of this run, with shares that add up to its limit. One that cannot run here has none."""
    parts = [
        replace(part, share=0.0) if part.missing else part
        for part in all_parts(settings)
        if not part.step or part.step in settings.steps
    ]
    total = sum(part.share for part in parts)
    return [replace(part, share=part.share * settings.limit / total) for part in parts]


def limit_of(parts: Sequence[Part], index: int, seconds_left: float) -> float:
    """What part ``index`` may take now: its share and what earlier parts left, but no more than its stretch."""
    needed_later = sum(part.share for part in parts[index + 1 :])
    part = parts[index]
    return max(0.0, min(seconds_left - needed_later, part.share * part.stretch))


def with_budget(command: Sequence[str], limit: float) -> list[str]:
    """The command, told when to begin nothing more, so that it ends by itself before its limit."""
    budget = f"{max(limit - BENCH_GRACE_S, 0.6 * limit):.0f}"
    return [word.replace("{budget}", budget) for word in command]
