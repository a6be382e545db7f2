"""The benchmark's own parts: data, oracle, timing, memory, results and tables."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bench import plots, report
from bench.cases import ALL_CASES, IGNORE_INDEX, LOGIT_STD, MIB, QUICK_CASES, Case, make_data
from bench.contestants import Contestant, Gradients, differentiate
from bench.measure import CpuClock, Timing, interleave, peak_memory
from bench.oracle import OBJECTIVES, dpo, errors, float64_gradients, relative_error, simpo
from bench.registry import CONTESTANTS, families
from bench.results import FAILED, OK, UNSUPPORTED, Row, Run, read_run, slug, write_run
from bench.runner import Protocol, run_case
from slime_fused import reference

CPU = torch.device("cpu")
CASE = Case("case", tokens=48, hidden=16, vocab=101, dtype="float64", pairs=2, masked=0.25)


# --- cases -------------------------------------------------------------------------------------------------------


def test_data_masks_prompt_prefixes_and_spreads_the_logits():
    case = CASE.but(vocab=4001, hidden=256, dtype="float32")
    data = make_data(case, CPU)
    labels = data.labels.view(4, 12)
    assert (labels[:, :3] == IGNORE_INDEX).all()
    assert ((labels[:, 3:] >= 0) & (labels[:, 3:] < 4001)).all()
    assert data.cu_seqlens.tolist() == [0, 12, 24, 36, 48]
    assert data.cu_valid.tolist() == [0, 9, 18, 27, 36]
    assert torch.equal(data.labels[data.rows], data.labels[data.labels != IGNORE_INDEX])
    assert data.rows.numel() == case.valid_tokens == 36
    logits = data.hidden.detach() @ data.weight.detach().t()
    # The spread of one row is its hidden state's norm, so even its mean over 48 rows varies by a percent.
    assert float(logits.std()) == pytest.approx(LOGIT_STD, rel=0.05)


def test_a_case_counts_the_work_of_its_valid_rows():
    assert CASE.product_flops == 2 * 36 * 101 * 16
    assert CASE.products == 3
    assert CASE.but(frozen_head=True).products == 2
    assert CASE.logits_bytes == 36 * 101 * 8
    assert CASE.gradient_bytes == (48 + 101) * 16 * 8
    assert CASE.but(frozen_head=True).gradient_bytes == 48 * 16 * 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 50}, r"divide by 2 \* pairs = 4, got 50"),
        ({"masked": 1.0}, r"masked must lie in \[0, 1\), got 1.0"),
        ({"masked": 0.99}, "no token of a response is left"),
    ],
)
def test_a_case_that_cannot_be_laid_out_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CASE.but(**changes)


def test_every_published_case_has_a_name_of_its_own_and_whole_pairs():
    assert len(ALL_CASES) == len(
        {(c.tokens, c.hidden, c.vocab, c.dtype, c.masked, c.frozen_head) for c in ALL_CASES.values()}
    )
    assert all(case.valid_tokens > 0 for case in ALL_CASES.values())


# --- oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_pairwise_oracle_equals_autograd_over_the_whole_batch(objective):
    data = make_data(CASE, CPU)
    logps = reference.linear_logprobs(data.hidden, data.weight, data.labels)
    loss = OBJECTIVES[objective](logps[data.rows], data.cu_valid, data.ref_sum_logps)
    loss.backward()
    whole = Gradients(loss.detach(), data.hidden.grad, data.weight.grad)
    found = errors(float64_gradients(CASE, data, objective), whole)
    assert found.loss < 1e-12
    # The oracle keeps its gradients in float32.
    assert found.d_hidden is not None
    assert found.d_hidden < 1e-7
    assert found.d_weight is not None
    assert found.d_weight < 1e-7


def test_simpo_by_hand():
    logps = torch.tensor([-1.0, -2.0, -3.0, -5.0])
    # means -1.5 and -4: 0.1 * 2.5 - 0.5 = -0.25; -log sigmoid(-0.25) = log(1 + e^0.25)
    expected = torch.log1p(torch.exp(torch.tensor(0.25)))
    assert float(simpo(logps, torch.tensor([0, 2, 4]), torch.zeros(2))) == pytest.approx(float(expected), rel=1e-6)


def test_dpo_by_hand():
    logps = torch.tensor([-1.0, -2.0, -3.0, -5.0])
    # sums -3 and -8, ratios -3 + 4 = 1 and -8 + 10 = 2: -log sigmoid(0.1 * -1) = log(1 + e^0.1)
    expected = torch.log1p(torch.exp(torch.tensor(0.1)))
    found = dpo(logps, torch.tensor([0, 2, 4]), torch.tensor([-4.0, -10.0]))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_reference_logps_are_drawn_per_response_at_the_scale_of_the_policys():
    """They must differ within a pair, or the loss would not see them; and leave the logistic its slope."""
    case = CASE.but(tokens=4096, hidden=256, vocab=4001, dtype="float32", pairs=64)
    data = make_data(case, CPU)
    sums = reference.linear_logprobs(data.hidden, data.weight, data.labels).detach().view(128, -1).sum(1)
    assert data.ref_sum_logps.shape == (128,)
    assert float(data.ref_sum_logps.mean()) == pytest.approx(float(sums.mean()), rel=0.02)
    assert float(data.ref_sum_logps.std()) == pytest.approx(float(sums.std()), rel=0.25)


def test_relative_error_is_a_ratio_of_norms_and_never_passes_nonsense():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(None, expected) == float("inf")
    assert relative_error(torch.zeros(2), None) is None
    nan = relative_error(torch.tensor([3.0, float("nan")]), expected)
    assert nan is not None
    assert nan != nan


@pytest.mark.parametrize(
    "name",
    [
        "naive",
        "naive-cross-entropy",
        "slime_fused",
        "slime_fused-logps",
        *(f"{loss}-{who}" for loss in ("dpo", "simpo") for who in ("naive", "slime_fused", "trl-fused-head")),
    ],
)
@pytest.mark.parametrize("case", QUICK_CASES, ids=lambda case: case.name)
def test_contestants_agree_with_the_oracle(name, case):
    contestant = CONTESTANTS[name]
    reason = contestant.supports(case, CPU)
    if reason is not None:
        pytest.skip(reason)
    data = make_data(case, CPU)
    gradients = contestant.prepare(case, data)()
    found = errors(gradients, float64_gradients(case, data, contestant.objective))
    assert found.loss < (1e-5 if case.dtype == "float32" else 2e-3)
    assert found.worst_gradient < (1e-5 if case.dtype == "float32" else 2e-2)
    assert (gradients.d_weight is None) == case.frozen_head


# --- time and memory ---------------------------------------------------------------------------------------------


def _nothing() -> Gradients:
    return Gradients(torch.zeros(()), None, None)


def test_interleave_takes_turns_and_runs_untimed_warm_ups():
    calls = []

    def step(name):
        def run():
            calls.append(name)
            return _nothing()

        return run

    timings = interleave(CpuClock(), {"a": step("a"), "b": step("b")}, rounds=2, repeats=2, warm=1)
    assert calls == ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3
    assert len(timings["a"].samples) == 4


def test_interleave_drops_a_step_that_raises_and_keeps_the_others():
    seen = {}

    def broken():
        raise RuntimeError("boom")

    timings = interleave(CpuClock(), {"bad": broken, "good": _nothing}, 2, on_error=seen.__setitem__)
    assert set(timings) == {"good"}
    assert str(seen["bad"]) == "boom"


def test_cpu_clock_reads_milliseconds():
    def sleep():
        time.sleep(0.02)
        return _nothing()

    assert 20 <= CpuClock().milliseconds(sleep) < 2000


def test_timing_statistics():
    timing = Timing((1.0, 100.0, 2.0, 3.0))
    assert timing.median == 2.5
    assert timing.spread > 0
    assert Timing((1.0, 2.0)).spread == 0.0


def test_peak_memory_sees_a_buffer_that_is_gone_when_the_step_returns():
    size = 192 * MIB

    def step():
        torch.ones(size // 4)
        return _nothing()

    assert 0.95 * size < peak_memory(step, CPU) < 1.2 * size


# --- runner ------------------------------------------------------------------------------------------------------


def test_a_contestant_that_raises_or_refuses_becomes_a_row_with_the_reason():
    def build(case, data):
        raise ImportError("no module named peer")

    broken = Contestant("broken", "x", "slime", build)
    refusing = replace(broken, name="refusing", refuses=lambda case, device: "needs a GPU")
    contestants = [CONTESTANTS["products"], broken, refusing, CONTESTANTS["naive"]]
    rows = {row.contestant: row for row in run_case(QUICK_CASES[0], contestants, CPU, Protocol(rounds=2))}
    assert rows["broken"].status == FAILED
    assert rows["broken"].reason == "ImportError: no module named peer"
    assert rows["refusing"].status == UNSUPPORTED
    assert rows["refusing"].reason == "needs a GPU"
    naive = rows["naive"]
    assert naive.status == OK
    assert naive.median_ms == pytest.approx(sum(naive.samples_ms) / 2)
    ratios = [a / b for a, b in zip(naive.samples_ms, rows["products"].samples_ms, strict=True)]
    assert naive.ratios == pytest.approx(ratios)
    assert naive.over_products == pytest.approx(sum(ratios) / 2)


def test_a_contestant_with_wrong_gradients_shows_it_in_its_error():
    def build(case, data):
        return differentiate(
            data,
            lambda: (
                1.5 * reference.slime_loss(data.hidden, data.weight, data.labels, cu_seqlens=data.cu_seqlens).loss
            ),
        )

    rows = run_case(QUICK_CASES[0], [Contestant("wrong", "x", "slime", build)], CPU, Protocol(rounds=1))
    assert rows[0].error_d_hidden == pytest.approx(0.5, rel=1e-3)
    assert rows[0].error_d_weight == pytest.approx(0.5, rel=1e-3)


def test_every_family_is_headed_by_the_products():
    groups = families(("naive", "cce", "slime_fused", "naive-cross-entropy", "products"))
    assert groups["baseline"] == ("products", "naive", "naive-cross-entropy")
    assert groups["cce"] == ("products", "cce")
    assert groups["ours"] == ("products", "slime_fused")


# --- results and tables ------------------------------------------------------------------------------------------

ROWS = (
    Row("case", "products", "products", OK, median_ms=10.0, products_ms=10.0),
    Row(
        "case",
        "slime_fused",
        "slime",
        OK,
        median_ms=1234.5,
        products_ms=1000.0,
        peak_bytes=300 * MIB,
        samples_ms=(1.0, 2.0),
        error_d_hidden=1.25e-3,
    ),
    Row("case", "peer|x", "slime", FAILED, "ImportError: a|b"),
)


def _write(path: Path) -> Path:
    machine = {
        "date": "2026-01-02 03:04 UTC",
        "cpu": "A CPU",
        "cores": 2,
        "torch": "2.13",
        "commit": "0123456789abcdef",
    }
    write_run(path, machine, {"rounds": 1}, [CASE], ROWS)
    return path


def test_a_result_file_reads_back_as_it_was(tmp_path):
    run = read_run(_write(tmp_path / "a-cpu" / "cpu.json"))
    assert run.rows == ROWS
    assert run.case("case") == CASE
    assert run.row("case", "slime_fused") == ROWS[1]
    assert run.row("case", "nobody") is None
    assert not list(tmp_path.glob("**/*.partial"))


def test_markdown_escapes_pipes_and_formats_units(tmp_path):
    text = report.run_markdown(read_run(_write(tmp_path / "cpu.json")))
    assert "| slime_fused | 1.23 s | 1.234 |" in text
    assert "| 300 MiB | 1.2e-03 |  |" in text or "| 300 MiB | 1.3e-03 |  |" in text
    assert "peer\\|x" in text
    assert "ImportError: a\\|b" in text
    assert "commit 0123456789." in text


def test_splice_replaces_what_stands_between_the_markers():
    text = "a\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nb\n"
    assert report.splice(text, "cpu", "new \\1") == "a\n<!-- bench:cpu -->\nnew \\1\n<!-- /bench:cpu -->\nb\n"
    with pytest.raises(ValueError, match="no markers <!-- bench:gpu -->"):
        report.splice(text, "gpu", "new")


def test_report_command_rewrites_the_readme_and_draws_plots(tmp_path):
    _write(tmp_path / "results" / "a-cpu" / "cpu.json")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:cpu -->\n<!-- /bench:cpu -->\n")
    arguments = ["--results", str(tmp_path / "results"), "--readme", str(readme)]
    assert report.main(arguments) == 0
    assert "| slime_fused | 1.23 s |" in readme.read_text()
    before = readme.read_text()
    assert report.main(arguments) == 0
    assert readme.read_text() == before


def test_a_gpu_run_that_was_tried_on_a_cpu_is_in_no_table(tmp_path):
    _write(tmp_path / "toy" / "gpu.json")
    assert report.stored_runs("gpu", tmp_path) == []
    path = _write(tmp_path / "real" / "gpu.json")
    path.write_text(path.read_text().replace('"cpu": "A CPU"', '"cpu": "A CPU", "gpu": "A GPU"'))
    assert [run.machine["gpu"] for run in report.stored_runs("gpu", tmp_path)] == ["A GPU"]


def test_plots_are_drawn_for_cases_with_something_to_compare(tmp_path):
    one, two = ROWS[1], replace(ROWS[1], contestant="naive", peak_bytes=None)
    run = Run({}, {}, {"case": asdict(CASE)}, (one, two))
    # Two times to compare, but only one peak: no memory plot.
    written = plots.draw(run, "cpu", tmp_path)
    assert [path.name for path in written] == ["cpu_time.png"]
    assert written[0].read_bytes().startswith(b"\x89PNG")


def test_slug_is_a_folder_name():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
