"""`bench.end_to_end`: whole training steps, on models of a second."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from bench.cases import IGNORE_INDEX, MIB
from bench.results import FAILED, NOT_FINISHED, OK, UNSUPPORTED
from bench.steps import check, worker
from bench.steps.cases import MODEL_SHAPES, StepCase, make_batch
from bench.steps.check import compare, expected_fingerprint, fingerprint
from bench.steps.contestants import STEP_CONTESTANTS, Prepared, StepContestant
from bench.steps.memory import is_out_of_memory, largest_fitting, limited_data
from bench.steps.model import build_training, held_bytes, training_step
from bench.steps.results import WRONG, StepRow
from bench.steps.runner import CPU_STEPS, Bounds, StepProtocol, run_step_case
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
