"""The benchmark's commands, run as a user runs them, on problems of a second."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import cpu, gpu, heats
from bench.cases import GPU_CASES, HEADLINE, HEADLINES
from bench.contestants import SMALL_WORKSPACE
from bench.registry import CONTESTANTS
from bench.results import FAILED, NOT_FINISHED, OK, UNSUPPORTED, Row, read_run, write_run
from bench.runner import Protocol
from bench.worker import OUT_OF_TIME, Job, run_job
from slime_fused.engine.plan import make_plan
from slime_fused.engine.problem import Problem
from slime_fused.engine.workspace import parse_bytes

ROOT = Path(__file__).parent.parent
QUICK = Protocol(rounds=1)


def _run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )


@pytest.mark.slow
def test_quick_cpu_benchmark_writes_a_complete_result_file(tmp_path):
    assert cpu.main(["--quick", "--out", str(tmp_path)]) == 0
    run = read_run(tmp_path / "cpu.json")
    assert run.machine["cores"] >= 1
    assert run.machine["torch"]
    assert set(run.cases) == {"quick-fp32", "quick-bf16-m50", "quick-fp32-frozen"}
    for case in run.cases:
        for name in ("slime_fused", "naive"):
            row = run.row(case, name)
            assert row is not None
            assert row.status == OK
            assert row.median_ms is not None
            assert row.median_ms > 0
            assert row.over_products == pytest.approx(statistics.median(row.ratios))
            assert row.error_d_hidden < 2e-2
            assert (row.error_d_weight is None) == run.case(case).frozen_head
    # Memory is taken for this case alone, and must not have displaced the time.
    memory = run.row("quick-fp32", "slime_fused")
    assert memory is not None
    assert memory.peak_bytes is not None
    assert memory.peak_bytes >= 0


@pytest.mark.slow
def test_quick_losses_benchmark_compares_with_slime_in_one_process(tmp_path):
    assert cpu.main(["--losses", "--quick", "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "cpu.json").exists()
    run = read_run(tmp_path / "losses.json")
    for case in run.cases:
        yardstick = run.row(case, "products")
        assert yardstick is not None
        for name in ("slime_fused", "dpo-slime_fused", "simpo-slime_fused"):
            row = run.row(case, name)
            assert row is not None
            assert row.status == OK
            # The products of the same process, not those of the batch of plain PyTorch.
            assert row.products_ms == yardstick.median_ms
        assert run.row(case, "dpo-naive").status == OK
    assert run.row("quick-fp32", "dpo-slime_fused").peak_bytes is not None


def test_losses_are_compared_with_slime_and_with_all_who_have_them():
    batches = cpu.losses_batches()
    timed = [batch for batch in batches if batch.protocol.time]
    for case in {batch.case.name for batch in timed}:
        names = [name for batch in timed if batch.case.name == case for name in batch.contestants]
        preferences = {name for name, c in CONTESTANTS.items() if c.objective.startswith(("dpo", "simpo"))}
        assert set(names) == preferences | {"products", "slime_fused"}
    assert {(b.case.vocab, b.case.dtype, b.case.masked) for b in timed} == {
        (32000, "float32", 0.0),
        (32000, "bfloat16", 0.0),
        (32000, "float32", 0.5),
    }


def test_memory_joins_the_timed_row_of_the_same_contestant():
    timed = Row("c", "x", "slime", OK, median_ms=2.0, error_d_hidden=0.5)
    merged = cpu.with_memory([timed], [Row("c", "x", "slime", OK, peak_bytes=7)])
    assert merged == [Row("c", "x", "slime", OK, median_ms=2.0, error_d_hidden=0.5, peak_bytes=7)]
    # The products head every batch of a case; those of the first stay.
    first, second = (Row("c", "products", "products", OK, median_ms=ms) for ms in (1.0, 2.0))
    assert cpu.with_memory([first], [second]) == [first]
    failed = Row("c", "x", "slime", FAILED, "why")
    assert cpu.with_memory([timed], [failed]) == [failed]


@pytest.mark.slow
def test_gpu_runner_on_the_cpu_runs_families_apart_and_reports_what_cannot_run(tmp_path):
    command = ["--device", "cpu", "--cases", "quick-fp32", "--out", str(tmp_path), "--rounds", "1"]
    assert gpu.main([*command, "--contestants", "slime_fused", "naive", "cce", "slime_fused-cuda"]) in (0, 1)
    run = read_run(tmp_path / "gpu.json")
    for name in ("products", "slime_fused", "naive"):
        row = run.row("quick-fp32", name)
        assert row is not None
        assert row.status == OK
        assert row.median_ms is not None
    cce = run.row("quick-fp32", "cce")
    assert cce is not None
    assert cce.status == UNSUPPORTED
    native = run.row("quick-fp32", "slime_fused-cuda")
    assert native is not None
    assert native.status == FAILED
    assert "cuda" in native.reason


def test_a_worker_that_dies_leaves_rows_that_say_so(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    job = Job("cpu", ("quick-fp32",), ("products", "naive"), QUICK, time.time() + 60)
    rows = run_job(job, 60)
    assert [row.contestant for row in rows] == ["products", "naive"]
    assert {row.status for row in rows} == {FAILED}
    assert rows[0].reason.startswith("process ended with code 1")


@pytest.mark.slow
def test_a_worker_past_its_deadline_begins_nothing():
    rows = run_job(Job("cpu", ("quick-fp32",), ("products",), QUICK, time.time() - 1), 60)
    assert [(row.status, row.reason) for row in rows] == [(NOT_FINISHED, OUT_OF_TIME)]


def test_a_worker_that_hangs_is_stopped(monkeypatch, tmp_path):
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    rows = run_job(Job("cpu", ("quick-fp32",), ("products",), QUICK, time.time() + 60), timeout=1.0)
    assert rows[0].status == NOT_FINISHED
    assert rows[0].reason == "not finished within 1 s"


def test_rows_are_told_as_they_are_measured(monkeypatch, tmp_path):
    """A run that is cut while a process works on its second case keeps the first: half a line is no row."""
    working = tmp_path / "python"
    row = json.dumps(asdict(Row("quick-fp32", "products", "products", OK, median_ms=1.0, ratios=(1.0, 2.0))))
    working.write_text(f"#!/bin/sh\nprintf '%s\\n%s' '{row}' '{row[:20]}' >\"$4\"\nexec sleep 60\n")
    working.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(working))
    told: list[Row] = []
    job = Job("cpu", ("quick-fp32", "quick-bf16-m50"), ("products",), QUICK, time.time() + 60)
    rows = run_job(job, 2.5, told.append)
    assert told == rows[:1]
    assert rows[0].ratios == (1.0, 2.0)
    assert rows[1].reason == "not finished within 2 s"


def test_spent_budget_starts_no_process(monkeypatch):
    def started(*arguments):
        raise AssertionError("a process was started")

    monkeypatch.setattr(gpu, "run_job", started)
    batches = list(gpu.run_heats(heats.stage_heats(None), "cuda", deadline=time.time() - 1))
    ours = [row for batch in batches for row in batch if row.contestant == "slime_fused"]
    assert {row.case for row in ours} == {case.name for case in GPU_CASES}
    assert {row.reason for row in ours} == {OUT_OF_TIME}


def test_a_family_that_died_is_retried_one_by_one(monkeypatch):
    jobs = []

    def run(job, timeout, on_row):
        jobs.append(job.contestants)
        status, reason = (FAILED, "process ended with code 3: x") if len(job.contestants) > 2 else (OK, "")
        return [Row(HEADLINE.name, name, "slime", status, reason) for name in job.contestants]

    monkeypatch.setattr(gpu, "run_job", run)
    heat = heats.Heat((HEADLINE,), ("slime_fused", "slime_fused-auto"))
    rows: list[Row] = []
    for batch in gpu.run_heats((heat,), "cuda", time.time() + 60):
        rows = gpu.merge(rows, batch)
    assert jobs == [
        ("products", "slime_fused", "slime_fused-auto"),
        ("products", "slime_fused"),
        ("products", "slime_fused-auto"),
    ]
    assert {row.status for row in rows} == {OK}


def test_the_headline_is_this_package_on_published_shapes_with_eight_rounds():
    (headline,) = heats.stage_heats("headline")
    shapes = [(case.tokens, case.valid_tokens, case.hidden, case.vocab) for case in headline.cases]
    assert shapes == [
        (8192, 8192, 4096, 128256),
        (8192, 8192, 4096, 131072),
        (8192, 8192, 4096, 151936),
        (8192, 4096, 4096, 131072),
        (8192, 4096, 4096, 151936),
    ]
    assert headline.cases[0] is HEADLINE
    assert headline.contestants == ("slime_fused", "slime_fused-auto")
    assert headline.protocol.rounds == 8


def test_the_stages_cover_every_case_and_know_every_contestant():
    every = heats.stage_heats(None)
    covered = {case.name for heat in every for case in heat.cases if "slime_fused" in heat.contestants}
    assert covered == {case.name for case in GPU_CASES}
    measured = {name for heat in every for name in heat.contestants}
    assert measured | {"products"} == set(CONTESTANTS)
    strongest = {"ce-quack", "ce-liger-sm90", "liger-scaled"}
    for case in HEADLINES[:3]:
        assert strongest <= {name for heat in every if case in heat.cases for name in heat.contestants}


def test_rows_of_other_code_or_another_device_are_not_kept(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    machine = {"commit": "c", "sources": "s", "torch": "t", "gpu": "H100", "cpu": "x"}
    assert gpu.earlier_rows(path, machine) == []
    rows = [Row(HEADLINE.name, "naive", "slime", OK)]
    write_run(path, machine, {}, [HEADLINE], rows)
    assert gpu.earlier_rows(path, machine) == rows
    for name in machine:
        assert gpu.earlier_rows(path, {**machine, name: "other"}) == []
        assert f"is from another {name}" in capsys.readouterr().out


def test_what_was_measured_is_not_measured_again():
    heat = heats.Heat(HEADLINES[:2], ("slime_fused", "naive"))
    one, two = (case.name for case in HEADLINES[:2])
    rows = [Row(one, "slime_fused", "slime", OK), Row(two, "slime_fused", "slime", OK), Row(one, "naive", "", OK)]
    assert heats.remaining((heat,), [*rows, Row(two, "naive", "", FAILED)]) == (
        heats.Heat(HEADLINES[1:2], ("naive",)),
    )
    assert heats.remaining((heat,), [*rows, Row(two, "naive", "", OK)]) == ()
    assert heats.remaining((heat,), []) == (heat,)


@pytest.mark.parametrize("unit", ["pair", "token"])
def test_the_fused_plan_and_its_yardstick_are_measured_on_the_headline(unit):
    """The contestants' notes name the plan of each backend; here the planner is asked."""
    measured = {name for heat in heats.stage_heats(None) if HEADLINE in heat.cases for name in heat.contestants}
    prefix = "ce-" if unit == "token" else ""
    for backend, row_bytes in (("triton", 12 * (HEADLINE.vocab // 128)), ("cuda", 0)):
        name = f"{prefix}slime_fused-{backend}-{SMALL_WORKSPACE}"
        assert name in measured
        pair = 2 * HEADLINE.valid_per_sequence
        problem = Problem(
            unit,
            HEADLINE.valid_tokens,
            HEADLINE.hidden,
            HEADLINE.vocab,
            HEADLINE.torch_dtype.itemsize,
            want_hidden=True,
            want_weight=True,
            want_bias=False,
            unit_rows=(pair,) * HEADLINE.pairs if unit == "pair" else (),
            linear_stats_row_bytes=row_bytes,
        )
        plan = make_plan(problem, parse_bytes(SMALL_WORKSPACE))
        assert f"(plan {plan.kind})" in CONTESTANTS[name].note
        assert (plan.kind == "fused") == (backend == "triton")


def test_selection_restricts_cases_and_contestants():
    chosen = heats.selected(heats.stage_heats(None), [HEADLINE.name], [])
    assert {case.name for heat in chosen for case in heat.cases} == {HEADLINE.name}
    both = heats.selected(heats.stage_heats(None), ["quick-fp32"], ["naive"])
    assert [([c.name for c in heat.cases], heat.contestants) for heat in both] == [(["quick-fp32"], ("naive",))]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_sanitizer_program_is_right_on_the_cpu(backend):
    done = _run(sys.executable, "-m", "bench.sanitize", "--backend", backend, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "30 row problems" in done.stdout
