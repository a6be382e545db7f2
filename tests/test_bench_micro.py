"""The micro-benchmarks on a CPU: stand-in kernels that fail, give wrong numbers or end the run half-way."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bench.cases import HEADLINE
from bench.micro import candidates, products, profile_step, row_kernels, sweep
from bench.micro.common import Report, within
from bench.micro.row_bench import KERNELS, Case, RowBench, row_backend
from slime_fused.backends import get_backend

CPU = torch.device("cpu")
CASE = Case(203, 208, torch.float32, size=208 * 4 * 8)


def bench(backend=None):
    return RowBench(CASE, 100.0, backend or row_backend(CPU), CPU, repeats=1)


class Broken:
    """The stand-in with one kernel replaced."""

    def __init__(self, name, kernel):
        self._whole, self._name, self._kernel = row_backend(CPU), name, kernel

    def __getattr__(self, name):
        original = getattr(self._whole, name)
        return (lambda *a, **k: self._kernel(original, *a, **k)) if name == self._name else original


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_right_kernel_passes_its_check(kernel):
    result = bench().measure(kernel, "shipped")
    assert (result.correct, result.note) == (True, "")
    assert result.milliseconds is not None
    traffic = (1 if kernel == "logits_stats" else 2) * 8 * 203 * 4
    assert result.gigabytes_per_second == pytest.approx(traffic / result.milliseconds / 1e6)


def scale_output(original, logits, out, *args, **kwargs):
    original(logits, out, *args, **kwargs)
    out.mul_(1 + 1e-4)


def write_padding(original, logits, out, *args, **kwargs):
    original(logits, out, *args, **kwargs)
    out.as_strided((8, 208), (208, 1))[:, -1] = 0


def refuse(original, *args, **kwargs):
    raise RuntimeError("too many resources requested\nfor launch")


@pytest.mark.parametrize(
    ("kernel", "mistake", "correct", "note"),
    [
        ("softmax_residual", scale_output, False, "residual off by"),
        ("residual_from_stats", scale_output, False, "residual off by"),
        ("softmax_residual", write_padding, False, "padding columns changed"),
        ("softmax_residual", refuse, None, "too many resources requested"),
        ("logits_stats", refuse, None, "too many resources requested"),
    ],
)
def test_a_wrong_kernel_is_found(kernel, mistake, correct, note):
    result = bench(Broken(kernel, mistake)).measure(kernel, "x")
    assert result.correct is correct
    assert result.note.startswith(note)


def test_other_bits_the_second_time_are_found():
    calls = []

    def drift(original, logits, out, *args, **kwargs):
        original(logits, out, *args, **kwargs)
        calls.append(None)
        out.mul_(1 + 1e-6 * len(calls))

    assert bench(Broken("softmax_residual", drift)).measure("softmax_residual", "x").note == (
        "second run gave other bits"
    )


# --- result files ------------------------------------------------------------------------------------------------


def test_a_run_that_breaks_off_leaves_what_it_measured(monkeypatch, tmp_path):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(row_kernels, "print_results", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        row_kernels.main(["--device", "cpu", "--out", str(path)])
    payload = json.loads(path.read_text())
    assert payload["finished"] is False
    assert [result["kernel"] for result in payload["results"]] == ["slime_terms", *KERNELS, "scale_", "scale_"]
    assert {"commit", "date", "torch"} <= set(payload["machine"])
    assert payload["build"]["torch"] == torch.__version__


def test_no_case_is_begun_after_the_seconds(tmp_path):
    report = Report(tmp_path / "x.json", CPU)
    report.begun -= 10
    assert list(within(20, report, [1, 2])) == [1, 2]
    assert list(within(5, report, [1, 2])) == []
    assert json.loads((tmp_path / "x.json").read_text())["left_out"] == 2


def test_products_are_measured_by_rows_and_output(tmp_path):
    path = tmp_path / "products.json"
    assert products.main(["--device", "cpu", "--out", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    names = ["logits", "R W bfloat16", "R W float32", "dW bfloat16", "dW float32 first", "dW float32 added"]
    assert [(r["rows"], r["product"]) for r in results] == [(rows, name) for rows in (64, 128) for name in names]
    for result in results:
        flops = 2 * result["rows"] * products.TOY_DEPTH * products.TOY_VOCAB
        assert result["tflops"] == pytest.approx(flops / result["milliseconds"] / 1e9)


def test_a_product_that_fails_leaves_the_others(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("addmm: no kernel for this output")

    monkeypatch.setattr(products.products, "residual_times_weight", fail)
    results = products.measure(64, torch.randn(500, 32).bfloat16(), CPU, rounds=1, repeats=1)
    assert [r.product for r in results if r.milliseconds is None] == ["R W float32"]
    assert {r.note for r in results if r.milliseconds is None} == {"addmm: no kernel for this output"}


def test_the_step_is_profiled_with_one_chunk_and_with_two(tmp_path):
    path = tmp_path / "profile.json"
    assert profile_step.main(["--device", "cpu", "--out", str(path)]) == 0
    one, two = json.loads(path.read_text())["results"]
    assert (one["plan"]["chunks"], two["plan"]["chunks"]) == (1, 2)
    assert any(event["host_us"] > 0 for event in one["events"])
    text = (tmp_path / "profile.txt").read_text()
    assert text.index("== 1 chunks") < text.index("== 2 chunks")


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_headline_has_plans_of_one_chunk_and_of_two(chunks):
    """Asked at full size, which takes no memory: on a GPU the answer must not be "no workspace gives it"."""
    twice = HEADLINE.but(tokens=2 * HEADLINE.tokens, pairs=2 * HEADLINE.pairs)
    found = profile_step.with_chunks(HEADLINE, chunks, CPU) or profile_step.with_chunks(twice, chunks, CPU)
    assert found is not None
    assert len(found.plan.chunks) == chunks


# --- sweep -------------------------------------------------------------------------------------------------------


def result(case, layout, ms, *, sweep="rows", correct=True, shipped=False):
    candidate = {"block": int(layout)}
    return {
        "sweep": sweep,
        "case": case,
        "layout": layout,
        "milliseconds": ms,
        "correct": correct,
        "candidate": candidate,
        "is_shipped": shipped,
    }


def test_winners_are_the_fastest_right_candidates():
    results = [
        result("a", "1", 4.0, shipped=True),
        result("a", "2", 1.0, correct=False),
        result("a", "3", 2.0),
        result("b", "1", None, correct=None, shipped=True),
        result("b", "3", 5.0),
    ]
    text = sweep.winners_markdown(results)
    assert "| rows | a | block=3 | 2.0000 | 4.0000 | 2.000 |" in text
    assert "| rows | b | block=3 | 5.0000 | failed |  |" in text


def test_a_constant_is_chosen_over_all_cases_that_it_ran_in():
    """Candidate 1 is 2 and 1 times the best (mean sqrt 2), 2 is 1 and 3 times; 3 failed in one case."""
    results = [
        result(case, layout, ms, sweep="triton-rows", correct=correct)
        for case, layout, ms, correct in [
            ("a", "1", 2.0, True),
            ("a", "2", 1.0, True),
            ("a", "3", 1.0, True),
            ("b", "1", 1.0, True),
            ("b", "2", 3.0, True),
            ("b", "3", None, None),
        ]
    ]
    best = sweep.best_over_cases(results, "triton-rows")
    assert best is not None
    assert best[0] == {"block": 1}
    assert best[1] == pytest.approx(2**0.5)
    text = sweep.winners_markdown(results)
    assert "triton-rows, all cases: RowConfig(block=1), 1.414 x the best of each" in text
    assert sweep.best_over_cases([], "linear") is None


def test_candidates_of_the_cuda_kernel_are_plans_that_it_accepts(monkeypatch):
    """The extension checks each when it is made; every vocabulary has several of both stages."""
    native = row_kernels.native()
    if not hasattr(native, "choose_row_plan"):
        pytest.skip("slime_fused._C was built without CUDA kernels")
    types_alone = SimpleNamespace(RowStage=native.RowStage, RowPlan=native.RowPlan)
    monkeypatch.setattr(candidates, "native", lambda: types_alone)
    for vocab in sweep.VOCABULARIES:
        plans = candidates.row_plans(Case(vocab, vocab, torch.bfloat16), 90, {})
        names = [candidates.describe_plan(plan) for plan in plans]
        assert names[0] == "shipped"
        assert len(set(names)) == len(names) > 20
        assert any(name.startswith("registers") for name in names)
        assert any("cluster=4" in name for name in names)


def test_candidates_come_from_a_file_or_from_the_kernels_own_list(monkeypatch, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        '{"rows": [{"stage": "registers", "threads": 64}], "triton-rows": [{"block": 1, "num_warps": 2}]}'
    )
    listed = candidates.read_listed(path)
    assert [candidates.describe_plan(plan) for plan in candidates.row_plans(CASE, 90, listed)] == [
        "shipped",
        "registers threads=64",
    ]
    stage = SimpleNamespace(shared="shared", registers="registers")
    module = SimpleNamespace(
        RowStage=stage, RowPlan=SimpleNamespace, row_plan_candidates=lambda *arguments: [arguments]
    )
    monkeypatch.setattr(candidates, "native", lambda: module)
    assert candidates.row_plans(CASE, 90, {}) == [None, (203, 4, 90)]
    path.write_text('{"row": []}')
    with pytest.raises(SystemExit, match="expected the kernels rows, triton-rows, triton-stream, linear, got row"):
        candidates.read_listed(path)


def test_candidates_of_triton_reach_the_launch(monkeypatch):
    """Through the backend, whichever way it chooses its own; None leaves the choice to it."""
    pytest.importorskip("triton")
    from bench.micro import triton_bench

    launched = []

    def launch(*arguments, config=None, **keywords):
        launched.append(config)

    monkeypatch.setattr(triton_bench.rows, "logits_stats", launch)
    monkeypatch.setattr(triton_bench.linear_stats, "linear_stats", launch)
    row_config = triton_bench.RowConfig(block=512, num_warps=2)
    bench(triton_bench.TritonRows()).stats(row_config)
    bench(triton_bench.TritonRows()).stats()
    tile = triton_bench.LinearConfig(16, 32, 16, group_m=2, num_warps=4, num_stages=2)
    linear = triton_bench.LinearBench((8, 32, 64), CPU, torch.float32, repeats=1)
    assert linear.measure(tile).correct is False  # nothing was computed
    linear.measure()
    assert launched[0] == row_config
    assert row_config not in launched[1:]
    assert launched[2] == tile
    assert launched[-1] not in (None, tile)


def test_sweep_writes_every_candidate_and_the_winners(tmp_path):
    path = tmp_path / "sweep.json"
    assert sweep.main(["--device", "cpu", "--kernels", "rows", "--vocab", "203", "--out", str(path)]) == 0
    payload = json.loads(path.read_text())
    assert payload["finished"] is True
    assert [r["is_shipped"] for r in payload["results"]] == [True, False, False]
    assert "| rows | 203 bfloat16 |" in (tmp_path / "sweep.md").read_text()


def test_sweep_of_triton_needs_triton_to_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(type(get_backend("triton")), "available", lambda self: (False, "no GPU"))
    arguments = ["--device", "cpu", "--kernels", "linear", "--out", str(tmp_path / "x.json")]
    assert sweep.main(arguments) == 0
    assert "the Triton kernels are left out: no GPU" in capsys.readouterr().out
