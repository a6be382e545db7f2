"""The command of `bench.end_to_end`, what it leaves behind, and its tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from bench import end_to_end, report
from bench.cases import MIB
from bench.results import FAILED, NOT_FINISHED, NOT_FINISHED_CODE, OK
from bench.steps import runner, worker
from bench.steps.cases import ALL_CASES, GPU_CASES, StepCase
from bench.steps.contestants import STEP_CONTESTANTS
from bench.steps.report import draw_steps, steps_markdown, stored_step_runs
from bench.steps.results import WRONG, LimitRow, StepRow, read_step_run, round_ratios
from bench.steps.runner import CPU_MEMORY, CPU_STEPS, StepProtocol, run_step_case
from bench.worker import OUT_OF_TIME

CPU = torch.device("cpu")
TINY = StepCase("tiny", 1, "all", 2, 12, "float32")
ONCE = StepProtocol(rounds=1)


# --- the command -------------------------------------------------------------------------------------------------


def _plan(*arguments):
    return end_to_end.default_schedule(end_to_end._parse(arguments), deadline=float("inf"))


def test_a_gpu_run_begins_with_both_models_and_searches_between_the_cases():
    jobs = _plan("--device", "cuda").jobs
    timed = [job.case for job in jobs if not job.searches]
    assert tuple(timed) == GPU_CASES
    assert [case.model for case in timed[:2]] == ["llama3.2-1b", "qwen3-4b"]
    assert all(job.contestants == tuple(STEP_CONTESTANTS) for job in jobs if not job.searches)
    searched = [job for job in jobs if job.searches]
    assert {job.case.model for job in searched} == {"llama3.2-1b", "qwen3-4b"}
    assert jobs.index(searched[0]) == 2
    assert {search.quantity for job in searched for search in job.searches} == {"length", "pairs"}
    # 2 to 32 pairs, 512 to 8k tokens, half of them prompt, in bfloat16.
    assert {case.dtype for case in timed} == {"bfloat16"}
    assert {case.prompt_length / case.length for case in timed} == {0.5}
    assert {case.pairs for case in timed} >= {2, 32}
    assert {case.length for case in timed} >= {512, 8192}


def test_a_cpu_run_measures_memory_in_a_process_per_contestant():
    jobs = _plan("--device", "cpu", "--contestants", "naive", "slime_fused").jobs
    memory = [job for job in jobs if job.protocol == CPU_MEMORY]
    timed = [job for job in jobs if job.protocol.time and not job.searches]
    assert all(len(job.contestants) == 1 for job in memory)
    assert {(job.case, *job.contestants) for job in memory} == {
        (job.case, name) for job in timed for name in job.contestants
    }
    assert all(search.room for job in jobs for search in job.searches)


def test_sizes_on_the_command_line_replace_the_cases_own():
    schedule = _plan("--device", "cpu", "--pairs", "1", "--length", "64", "--layers", "2", "--no-limits")
    assert {(case.pairs, case.length, case.layers) for case in schedule.cases} == {(1, 64, 2)}
    assert not any(job.searches for job in schedule.jobs)
    assert end_to_end.main(["--device", "cpu", "--layers", "99"]) == 2


def test_memory_joins_the_timed_row_and_its_failure_leaves_the_time():
    table = end_to_end.Table()
    timed = StepRow("c", "x", samples_ms=(2.0,), median_ms=2.0)
    table.take(timed, CPU_STEPS)
    table.take(StepRow("c", "x", held_bytes=5, added_bytes=7), CPU_MEMORY)
    assert table.rows["c", "x"] == replace(timed, held_bytes=5, added_bytes=7)
    assert table.rows["c", "x"].peak_bytes == 12
    table.take(StepRow("c", "x", FAILED, "why"), CPU_MEMORY)
    assert table.rows["c", "x"].median_ms == 2.0
    assert table.rows["c", "x"].reason == "memory: failed: why"


def test_a_run_that_is_cut_off_leaves_what_it_measured(monkeypatch, tmp_path):
    def interrupted(job, time_left):
        yield StepRow(job.case.name, "naive", samples_ms=(2.0,), median_ms=2.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(end_to_end, "run_past_crashes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        end_to_end.main(["--device", "cpu", "--quick", "--out", str(tmp_path)])
    run = read_step_run(tmp_path / "end_to_end.json")
    assert [row.contestant for row in run.rows] == ["naive"]
    assert run.cases[run.rows[0].case] == ALL_CASES[run.rows[0].case]


def test_a_wrong_row_of_this_package_is_no_success(monkeypatch, tmp_path):
    def wrong(job, time_left):
        yield StepRow(job.case.name, "slime_fused", WRONG, "why")

    monkeypatch.setattr(end_to_end, "run_past_crashes", wrong)
    arguments = [
        "--device",
        "cpu",
        "--quick",
        "--contestants",
        "slime_fused",
        "--no-limits",
        "--out",
        str(tmp_path),
    ]
    assert end_to_end.main(arguments) == 1


def test_a_spent_budget_starts_nothing_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "_child_lines", lambda *_: pytest.fail("a process was started"))
    arguments = ["--device", "cpu", "--quick", "--time-budget", "0", "--out", str(tmp_path)]
    assert end_to_end.main(arguments) == NOT_FINISHED_CODE
    run = read_step_run(tmp_path / "end_to_end.json")
    assert {(row.status, row.reason) for row in (*run.rows, *run.limits)} == {(NOT_FINISHED, OUT_OF_TIME)}


def test_late_contestants_are_left_out_and_the_others_are_timed(monkeypatch):
    clock = iter([0.0, 0.0, 59.0, 61.0, 99.0, 101.0])
    monkeypatch.setattr(runner.time, "time", lambda: next(clock))
    names = ("slime_fused", "naive", "naive-reference")
    rows = run_step_case(
        TINY, [STEP_CONTESTANTS[name] for name in names], CPU, StepProtocol(rounds=5), deadline=100.0
    )
    assert [len(row.samples_ms) for row in rows] == [2, 2, 0]
    assert (rows[2].status, rows[2].reason) == (NOT_FINISHED, OUT_OF_TIME)


@pytest.mark.slow
def test_quick_run_writes_a_file_from_which_readme_is_rendered(tmp_path):
    arguments = ["--device", "cpu", "--quick", "--pairs", "1", "--length", "16", "--out", str(tmp_path / "amd")]
    assert end_to_end.main([*arguments, "--contestants", "slime_fused", "naive"]) == 0
    run = read_step_run(tmp_path / "amd" / "end_to_end.json")
    assert run.machine["torch"] == torch.__version__
    for row in run.rows:
        assert (row.status, row.reason) == (OK, "")
        assert len(row.samples_ms) == 2
        assert row.held_bytes > 0
        assert row.added_bytes >= 0
    fits = {(row.contestant, row.quantity): row for row in run.limits}
    assert all(row.status == OK for row in run.limits)
    # In 16 MiB the pools of allocator and libraries weigh as much as the logits: who fits more is no matter here.
    assert set(fits) == {(who, what) for who in ("slime_fused", "naive") for what in ("length", "pairs")}
    for row in fits.values():
        assert 0 < row.fits < (row.fails or float("inf"))
        assert all((size <= row.fits) == has_fitted for size, has_fitted in row.probes)
    assert [row.room_bytes for row in run.limits] == [16 * MIB] * 4
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:end_to_end -->\n<!-- /bench:end_to_end -->\n")
    assert (
        report.main(["--results", str(tmp_path), "--readme", str(readme), "--plots", str(tmp_path / "docs")]) == 0
    )
    assert "tiny-lora-1x16" in readme.read_text()
    assert (tmp_path / "docs" / "end_to_end_cpu_time.png").read_bytes().startswith(b"\x89PNG")


# --- tables ------------------------------------------------------------------------------------------------------


def _stored(folder: Path, **machine) -> Path:
    from bench.steps.results import write_step_run

    rows = (
        StepRow(
            TINY.name, "naive", note="n", held_bytes=MIB, added_bytes=4 * MIB, error_loss=1e-7, error_gradient=2e-6
        ),
        StepRow(TINY.name, "slime_fused", held_bytes=MIB, added_bytes=MIB),
        StepRow(TINY.name, "naive-reference", "out of memory", "too | large"),
        StepRow(TINY.name, "naive-compiled", NOT_FINISHED, OUT_OF_TIME),
    )
    # The machine slows down in the second round; the ratio of the rounds stays.
    rows = (rows[0].timed((30.0, 60.0, 33.0), 48), rows[1].timed((20.0, 40.0, 30.0), 48), *rows[2:])
    limits = (
        LimitRow(TINY.name, "slime_fused", "length", fits=8192, room_bytes=16 * MIB),
        LimitRow(TINY.name, "naive", "length", fits=192, fails=256, room_bytes=16 * MIB),
        LimitRow(TINY.name, "naive", "pairs", fits=0, fails=1, room_bytes=16 * MIB),
    )
    known = {"date": "2026-01-01", "commit": "0123456789abc", "cpu": "X", "cores": 2, "torch": "2.13"} | machine
    path = folder / "end_to_end.json"
    write_step_run(path, known, {}, [TINY], rows, limits)
    return path


def test_tables_give_ratios_of_rounds_and_say_what_did_not_run(tmp_path):
    run = read_step_run(_stored(tmp_path / "a"))
    assert round_ratios(run.rows[0], run.rows[1]) == (1.5, 1.5, 1.1)
    text = steps_markdown([run])
    assert text.startswith("**No row has been run on a GPU.**")
    assert "tiny shape, 1 of 2 layers" in text
    assert "| naive | 33 ms |  | 1.50 (1.10 to 1.50) | 1,455 | 5 MiB | 4 MiB | 1e-07, 2e-06 |" in text
    assert "| slime_fused | 30 ms |  | 1.00 (1.00 to 1.00) | 1,600 | 2 MiB | 1 MiB |  |" in text
    assert "| naive-reference | out of memory: too \\| large |" in text
    assert f"| naive-compiled | not finished: {OUT_OF_TIME} |" in text
    assert f"| {TINY.name} | slime_fused | 8,192 or more |  |" in text
    assert f"| {TINY.name} | naive | 192 | none (1 did not fit) |" in text
    assert "may allocate 16 MiB above" in text


def test_gpu_runs_come_first_and_without_any_run_the_text_says_so(tmp_path):
    _stored(tmp_path / "a", date="2026-02-02")
    _stored(tmp_path / "b", gpu="H100")
    runs = stored_step_runs(tmp_path)
    assert [run.machine.get("gpu") for run in runs] == ["H100", None]
    text = steps_markdown(runs)
    assert "No row has been run on a GPU" not in text
    assert text.startswith("H100; ")
    assert "No row has been run on a GPU" in steps_markdown([])
    assert "Not run yet" in steps_markdown(stored_step_runs(tmp_path / "none"))


def test_plots_leave_out_what_has_nothing_to_compare(tmp_path):
    run = read_step_run(_stored(tmp_path / "a"))
    names = [path.name for path in draw_steps(run, tmp_path)]
    assert names == ["end_to_end_cpu_time.png", "end_to_end_cpu_memory.png", "end_to_end_cpu_limits.png"]
    alone = replace(run, rows=run.rows[:1], limits=())
    assert draw_steps(alone, tmp_path / "none") == []
