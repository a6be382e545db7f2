"""Check, then measure, a set of contestants on one case in this process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

import slime_fused
from bench.cases import Case, Data, make_data
from bench.contestants import Contestant, Gradients, Step
from bench.measure import Clock, clock_for, interleave, peak_memory
from bench.observe import observed_backends, plan_record, warning_of
from bench.oracle import Errors, errors, float64_gradients
from bench.results import FAILED, OK, UNSUPPORTED, Row


@dataclass(frozen=True)
class Protocol:
    """How much is measured.

    Every contestant is visited ``rounds`` times; a visit times ``repeats`` runs after ``warm`` untimed ones.
    """

    rounds: int = 3
    repeats: int = 1
    warm: int = 0
    check: bool = True
    memory: bool = False
    time: bool = True


CPU_PROTOCOL = Protocol(rounds=5)
GPU_PROTOCOL = Protocol(rounds=3, repeats=4, warm=1, memory=True)
# Targets are read off these rows: enough rounds for a median of ratios and its range.
HEADLINE_PROTOCOL = replace(GPU_PROTOCOL, rounds=8)
MEMORY_PROTOCOL = Protocol(check=False, memory=True, time=False)


class DeviceLost(RuntimeError):
    """The CUDA context is unusable after an earlier fault: nothing more can run in this process."""


def run_case(
    case: Case,
    contestants: Sequence[Contestant],
    device: torch.device,
    protocol: Protocol,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Rows of all contestants, in their order. A contestant that raises becomes a row with the reason.

    Raises DeviceLost after a CUDA fault; rows reported until then are valid.
    """
    data = make_data(case, device)
    clock = clock_for(device)
    expected: dict[str, Gradients] = {}
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for contestant in contestants:
        row, step = _prepare(contestant, case, data, device, protocol, expected)
        rows[contestant.name] = row
        if step is None:
            report(row)
        else:
            steps[contestant.name] = step
        _release(device)
    expected.clear()
    if protocol.memory:
        for name in list(steps):
            rows[name] = _measure_memory(rows[name], steps, device)
    if protocol.time and steps:
        _measure_time(rows, steps, clock, protocol)
    for name in steps:
        report(rows[name])
    return [rows[contestant.name] for contestant in contestants]


def _prepare(
    contestant: Contestant,
    case: Case,
    data: Data,
    device: torch.device,
    protocol: Protocol,
    expected: dict[str, Gradients],
) -> tuple[Row, Step | None]:
    """Build the step, run it once and compare it with the oracle."""
    row = Row(case.name, contestant.name, contestant.objective, OK, note=contestant.note)
    reason = contestant.supports(case, device)
    if reason is not None:
        return replace(row, status=UNSUPPORTED, reason=reason), None
    try:
        if not (protocol.check or protocol.time):
            return row, _fresh_step(contestant, case, data)
        step = contestant.prepare(case, data)
        with observed_backends() as seen:
            gradients = step()
        if contestant.backend:
            row = _with_what_ran(row, contestant, case, data, seen)
        if protocol.check and contestant.objective != "products":
            if contestant.objective not in expected:
                expected[contestant.objective] = float64_gradients(case, data, contestant.objective)
            row = _with_errors(row, errors(gradients, expected[contestant.objective]))
    except Exception as error:
        return _failed(row, error), None
    return row, step


def _with_what_ran(row: Row, contestant: Contestant, case: Case, data: Data, seen: set[str]) -> Row:
    """The backends whose kernels the step called, its plan, the build, and a warning where others were meant."""
    plan = None if contestant.explain is None else plan_record(contestant.explain(case, data))
    ran = {"backends": sorted(seen), "plan": plan, "build": slime_fused.build_info()}
    return replace(row, ran=ran, warning=warning_of(contestant.backend, data.hidden.device, seen))


def _fresh_step(contestant: Contestant, case: Case, data: Data) -> Step:
    """A step that has not run yet, after a tiny one that brought the code it needs into memory.

    A full run before the measured one would leave freed memory resident, and hide part of the peak.
    """
    tiny = case.but(name="tiny", tokens=32 * case.pairs, hidden=64, vocab=1024)
    contestant.prepare(tiny, make_data(tiny, data.hidden.device))()
    return contestant.prepare(case, data)


def _with_errors(row: Row, found: Errors) -> Row:
    return replace(row, error_loss=found.loss, error_d_hidden=found.d_hidden, error_d_weight=found.d_weight)


def _measure_memory(row: Row, steps: dict[str, Step], device: torch.device) -> Row:
    try:
        return replace(row, peak_bytes=peak_memory(steps[row.contestant], device))
    except Exception as error:
        del steps[row.contestant]
        return _failed(row, error)


def _measure_time(rows: dict[str, Row], steps: dict[str, Step], clock: Clock, protocol: Protocol) -> None:
    def give_up(name: str, error: Exception) -> None:
        rows[name] = _failed(rows[name], error)

    timings = interleave(clock, steps, protocol.rounds, protocol.repeats, protocol.warm, on_error=give_up)
    products = timings.get("products")
    for name, timing in timings.items():
        rows[name] = replace(
            rows[name],
            median_ms=timing.median,
            spread=timing.spread,
            samples_ms=timing.samples,
            products_ms=products.median if products else None,
            ratios=timing.ratios_to(products, protocol.repeats) if products else (),
        )


def _failed(row: Row, error: Exception) -> Row:
    return replace(row, status=FAILED, reason=failure_reason(row.contestant, error))


def failure_reason(contestant: str, error: Exception) -> str:
    """The error in a row's words; raises DeviceLost where nothing more can run in this process."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if "CUDA error" in text or "device-side assert" in text:
        raise DeviceLost(f"{contestant}: {text[:300]}") from error
    return text[:300]


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
