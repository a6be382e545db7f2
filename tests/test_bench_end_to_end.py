"""`bench.end_to_end`: whole training steps, on models of a second."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from bench import end_to_end, report
from bench.cases import IGNORE_INDEX, MIB
from bench.results import FAILED, NOT_FINISHED, NOT_FINISHED_CODE, OK, UNSUPPORTED
from bench.steps import check, runner, worker
from bench.steps.cases import ALL_CASES, GPU_CASES, MODEL_SHAPES, StepCase, make_batch
from bench.steps.check import compare, expected_fingerprint, fingerprint
from bench.steps.contestants import STEP_CONTESTANTS, Prepared, StepContestant
from bench.steps.memory import is_out_of_memory, largest_fitting, limited_data
from bench.steps.model import build_training, held_bytes, training_step
from bench.steps.report import draw_steps, steps_markdown, stored_step_runs
from bench.steps.results import WRONG, LimitRow, StepRow, read_step_run, round_ratios
from bench.steps.runner import CPU_MEMORY, CPU_STEPS, Bounds, StepProtocol, run_step_case
from bench.steps.worker import Search, StepJob, run_past_crashes, run_step_job
from bench.worker import OUT_OF_TIME

CPU = torch.device("cpu")
TINY = StepCase("tiny", 1, "all", 2, 12, "float32")
ONCE = StepProtocol(rounds=1)


# --- batches and models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_both_sequences_of_a_pair_begin_with_the_same_prompt_and_only_responses_count(share):
    case = TINY.but(pairs=3, prompt_share=share)
    batch = make_batch(case, CPU)
    prompt = case.prompt_length
    assert prompt == round(12 * share)
    assert batch.decoder_positions == case.positions == 72
    chosen, rejected = batch.input_ids.chunk(2)
    assert torch.equal(chosen[:, :prompt], rejected[:, :prompt])
    assert not torch.equal(chosen[:, prompt:], rejected[:, prompt:])
    assert torch.equal(batch.labels[:, prompt:], batch.input_ids[:, prompt:])
    assert (batch.labels[:, :prompt] == IGNORE_INDEX).all()
    # The last prompt position predicts the first token of the response; the last position predicts nothing.
    predicting = torch.arange(6).repeat_interleave(12 - prompt) * 12 + torch.arange(prompt - 1, 11).repeat(6)
    assert torch.equal(batch.rows, predicting)
    assert torch.equal(batch.targets[batch.rows], batch.input_ids[:, prompt:].flatten())
    assert batch.cu_valid.tolist() == [(12 - prompt) * i for i in range(7)]
    assert torch.equal(batch.input_ids, make_batch(case, CPU).input_ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt-5"}, "model must be one of llama3.2-1b"),
        ({"layers": 3}, r"layers must lie in \[1, 2\], got 3"),
        ({"pairs": 0}, "pairs must be at least 1, got 0"),
        ({"length": 1}, "prompt and response need a position each"),
        ({"trains": "head"}, 'trains must be "all" or "lora"'),
    ],
)
def test_impossible_cases_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.but(**changes)


def test_a_case_says_how_many_layers_of_its_model_it_uses():
    assert "1 of 2 layers" in TINY.describe()
    assert TINY.name == "tiny-all-2x12-1l"
    whole = TINY.but(layers=2)
    assert "2 layers" in whole.describe()
    assert " of 2 layers" not in whole.describe()
    assert whole.name == "tiny-all-2x12"


def test_a_step_frees_its_gradients_leaves_the_weights_and_holds_what_it_says():
    training = build_training(TINY, CPU)
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    step = training_step(training, STEP_CONTESTANTS["naive"].prepare(training, make_batch(TINY, CPU)).loss)
    assert float(step().loss) == float(step().loss)
    for parameter, old in zip(training.model.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, old)
    shape = MODEL_SHAPES["tiny"]
    attention = shape.hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    layer = attention + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
    # Head and embedding are one matrix; AdamW holds two numbers per weight, and a step count per tensor.
    weights = 4 * (shape.vocab * shape.hidden + layer + shape.hidden)
    assert 3 * weights <= held_bytes(training) <= 3 * weights + 4096
    copied = STEP_CONTESTANTS["naive-reference"].prepare(training, make_batch(TINY, CPU)).copies
    assert 4 * weights <= held_bytes(training, *copied) <= 4 * weights + 4096


# --- the same step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", ["all", "lora"])
def test_the_yardstick_is_autograd_through_full_logits(monkeypatch, trains):
    monkeypatch.setattr(check, "_BLOCK_ROWS", 5)
    case = TINY.but(dtype="float64", trains=trains, lora_rank=4)
    training, batch = build_training(case, CPU), make_batch(case, CPU)
    found = compare(
        fingerprint(training, STEP_CONTESTANTS["naive"].prepare(training, batch).loss),
        expected_fingerprint(training, batch),
    )
    # Token log-probs are rounded to float32 once in the contestant.
    assert max(found.loss, found.norm, found.gradient) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trains", ["all", "lora"])
def test_all_contestants_take_the_same_step(dtype, trains):
    """All that need no compiler; Qwen3's decoder differs from Llama's in its layers only, which all share."""
    contestants = [contestant for contestant in STEP_CONTESTANTS.values() if not contestant.compiles]
    reports = []
    case = TINY.but(dtype=dtype, trains=trains, lora_rank=4)
    # The parts that a GPU's protocol has: memory in the same process, and several steps in a turn.
    protocol = StepProtocol(rounds=2, repeats=2, warm=1, memory=True)
    rows = run_step_case(case, contestants, CPU, protocol, report=reports.append)
    for row in rows:
        if row.status == UNSUPPORTED:
            assert row.contestant == "trl-fused-head"
            continue
        assert (row.status, row.reason) == (OK, "")
        assert row.error_gradient <= check.TOLERANCE[dtype]
        assert len(row.samples_ms) == 2
        assert row.peak_bytes >= row.held_bytes > 0
        assert row.tokens_per_s == pytest.approx(1e3 * 48 / row.median_ms)
    ours = rows[0]
    assert ours.contestant == "slime_fused"
    assert ours.ran == 'backend "cpu", plan "stream", 1 chunks'
    # Checked, then timed once and twice: whoever stops the run in between keeps the rest.
    assert [len(row.samples_ms) for row in reports if row.contestant == "slime_fused"] == [0, 1, 2]


def _without_last_token(batch):
    labels = batch.labels.clone()
    labels[:, -1] = IGNORE_INDEX
    keep = batch.rows % 12 != 10
    return replace(batch, labels=labels, rows=batch.rows[keep], cu_valid=batch.cu_valid - torch.arange(5).int())


@pytest.mark.parametrize("mistake", ["scaled loss", "lost token", "no gradient", "NaN"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_step_is_marked_wrong_and_not_timed(mistake, dtype):
    naive = STEP_CONTESTANTS["naive"]

    def prepare(training, batch):
        if mistake == "lost token":
            return naive.prepare(training, _without_last_token(batch))
        right = naive.prepare(training, batch)
        if mistake == "scaled loss":
            return Prepared(lambda: 3 * right.loss())
        if mistake == "NaN":
            return Prepared(lambda: right.loss() * float("nan"))
        return Prepared(lambda: right.loss().detach() + 0 * training.head_weight.sum())

    wrong = StepContestant("wrong", "", prepare)
    case = TINY.but(dtype=dtype)
    rows = run_step_case(case, [wrong, naive], CPU, ONCE)
    assert [row.status for row in rows] == [WRONG, OK]
    assert rows[0].samples_ms == ()
    assert "another step than float64's" in rows[0].reason


def test_a_contestant_that_raises_leaves_the_others_their_rows():
    def refuse(training, batch):
        raise RuntimeError("no\nkernel")

    rows = run_step_case(TINY, [StepContestant("broken", "", refuse), STEP_CONTESTANTS["naive"]], CPU, ONCE)
    assert [(row.status, row.reason) for row in rows] == [(FAILED, "RuntimeError: no kernel"), (OK, "")]
    missing = replace(STEP_CONTESTANTS["naive"], needs=("no_such_module",))
    assert run_step_case(TINY, [missing], CPU, ONCE)[0].reason == "not installed: no_such_module"


# --- what fits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 8])
def test_the_search_brackets_every_threshold(unit):
    for threshold in range(71):
        found = largest_fitting(lambda size, top=threshold: size <= top * unit, unit, 64 * unit)
        assert found.fits <= min(threshold, 64) * unit
        assert found.fits % unit == 0
        if threshold >= 64:
            assert (found.fits, found.fails) == (64 * unit, None)
        else:
            assert found.fails > threshold * unit
            assert found.fails - found.fits <= max(unit, found.fits / 8)
        sizes = [size for size, _ in found.probes]
        assert len(sizes) == len(set(sizes)) <= 10


def test_the_search_stops_when_time_is_out():
    asked = iter([False, False, True])
    found = largest_fitting(lambda size: True, 1, 64, out_of_time=lambda: next(asked))
    assert (found.fits, found.fails, found.probes) == (2, None, ((1, True), (2, True)))


def test_an_exhausted_memory_is_told_from_other_errors():
    with limited_data(64 * MIB):
        small = torch.zeros(8 * MIB, dtype=torch.uint8)
        with pytest.raises(RuntimeError) as caught:
            torch.zeros(256 * MIB, dtype=torch.uint8)
    assert small.sum() == 0
    assert is_out_of_memory(caught.value)
    assert torch.zeros(256 * MIB, dtype=torch.uint8).numel() == 256 * MIB
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


# --- processes ---------------------------------------------------------------------------------------------------


def _job(**changes):
    job = StepJob("cpu", TINY, ("slime_fused", "naive"), CPU_STEPS, time.time() + 60)
    return replace(job, **changes)


def _interpreter(monkeypatch, path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_job_survives_its_json():
    job = _job(searches=(Search("pairs", Bounds(1, 8), 7), Search("length", Bounds(2, 8))))
    assert StepJob.from_record(json.loads(json.dumps(worker.asdict(job)))) == job


def test_after_the_deadline_no_process_is_started(monkeypatch):
    monkeypatch.setattr(worker, "_child_lines", lambda *_: pytest.fail("a process was started"))
    rows = list(run_step_job(_job(deadline=time.time() - 1), 60))
    assert [(row.contestant, row.status, row.reason) for row in rows] == [
        ("slime_fused", NOT_FINISHED, OUT_OF_TIME),
        ("naive", NOT_FINISHED, OUT_OF_TIME),
    ]


def test_a_hanging_process_is_stopped_and_its_rows_are_not_finished(monkeypatch, tmp_path):
    _interpreter(monkeypatch, tmp_path / "python", "exec sleep 60")
    rows = list(run_step_job(_job(), 1.0))
    assert {(row.status, row.reason) for row in rows} == {(NOT_FINISHED, "not finished within 1 s")}
    limits = list(run_step_job(_job(searches=(Search("pairs", Bounds(1, 8)),)), 1.0))
    assert [(row.quantity, row.status) for row in limits] == [("pairs", NOT_FINISHED)] * 2


def test_a_process_that_dies_keeps_the_rows_that_it_delivered(monkeypatch, tmp_path):
    timed = StepRow(TINY.name, "slime_fused", samples_ms=(2.0,), median_ms=2.0)
    checked = StepRow(TINY.name, "naive", error_loss=1e-7)
    lines = [json.dumps({"step": worker.asdict(row)}) for row in (timed, checked)]
    (tmp_path / "lines").write_text("\n".join(lines) + "\n")
    _interpreter(monkeypatch, tmp_path / "python", f"cat {tmp_path}/lines\necho 'CUDA error: gone' >&2\nexit 3")
    rows = {row.contestant: row for row in run_step_job(_job(), 30.0)}
    assert rows["slime_fused"] == timed
    assert rows["naive"] == replace(checked, status=FAILED, reason="process ended with code 3: CUDA error: gone")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert {row.status for row in run_step_job(_job(), 30.0)} == {FAILED}


def test_contestants_run_again_without_the_one_that_killed_their_process(monkeypatch):
    begun = []

    def run(job, timeout):
        begun.append(job.contestants)
        died = "process ended with code 3: CUDA error"
        if "naive" in job.contestants:
            yield StepRow(TINY.name, "slime_fused", FAILED, died, error_loss=1e-7)
            yield StepRow(TINY.name, "naive", FAILED, died)
            yield StepRow(TINY.name, "trl-fused-head", FAILED, died)
        else:
            yield StepRow(TINY.name, "slime_fused", samples_ms=(2.0,))
            yield StepRow(TINY.name, "trl-fused-head", FAILED, "ImportError: x")

    monkeypatch.setattr(worker, "run_step_job", run)
    names = ("slime_fused", "naive", "trl-fused-head")
    rows = {row.contestant: row for row in run_past_crashes(_job(contestants=names), lambda: 60.0)}
    assert begun == [names, ("slime_fused", "trl-fused-head")]
    assert [rows[name].status for name in names] == [OK, FAILED, FAILED]
    assert rows["naive"].reason.startswith("process ended")


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
    # 16 MiB hold the logits of a few hundred positions, and what a step without them takes for many more.
    assert fits["naive", "length"].fits < fits["slime_fused", "length"].fits
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
