"""What a benchmark's row says beside its time: which backend ran, on which plan, and how the GPU's clocks stood."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from bench import clocks, report
from bench.cases import QUICK_CASES, Case, make_data
from bench.contestants import softmax_residual_
from bench.measure import Timing
from bench.observe import observed_backends, warning_of
from bench.registry import CONTESTANTS
from bench.results import OK, Row
from bench.runner import Protocol, run_case
from slime_fused.backends import get_backend

CPU = torch.device("cpu")
CASE = Case("case", tokens=48, hidden=16, vocab=101, dtype="float64", pairs=2, masked=0.25)


# --- what ran ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["slime_fused", "slime_fused-logps", "ce-slime_fused", "dpo-slime_fused", "simpo-slime_fused"]
)
def test_a_row_says_what_ran(name):
    (row,) = run_case(QUICK_CASES[0], [CONTESTANTS[name]], CPU, Protocol(rounds=1))
    native = get_backend("cpu").available()[0]
    assert row.ran["backends"] == (["cpu"] if native else ["torch"])
    assert bool(row.warning) != native
    assert row.ran["plan"]["chunks"] == 1
    assert row.ran["plan"]["workspace_bytes"] == 64 * 500 * 4
    assert row.ran["build"]["torch"] == torch.__version__
    json.dumps(asdict(row))


def test_a_row_that_ran_on_another_backend_is_marked(monkeypatch):
    """As after a failed build: "auto" takes the next backend without a word."""
    monkeypatch.setattr(type(get_backend("cpu")), "available", lambda self: (False, "the module is not built"))
    (row,) = run_case(QUICK_CASES[0], [CONTESTANTS["slime_fused"]], CPU, Protocol(rounds=1))
    assert row.status == OK
    assert row.ran["backends"] == ["torch"]
    assert row.warning == "ran on torch, not cpu: the module is not built"
    assert f"slime_fused [{row.warning}]" in report.format_rows([row], {"quick-fp32": QUICK_CASES[0]})
    # On a GPU, and with nothing run at all.
    assert warning_of("auto", torch.device("cuda"), {"triton"}).startswith("ran on triton, not cuda")
    assert warning_of("triton", torch.device("cuda"), {"triton"}) == ""
    assert warning_of("cuda", torch.device("cuda"), set()).startswith("ran on no backend, not cuda")


def test_watching_leaves_the_backends_as_they_were():
    before = {name: dict(vars(get_backend(name))) for name in ("cpu", "torch", "cuda", "triton")}
    with observed_backends():
        pass
    assert {name: dict(vars(get_backend(name))) for name in before} == before


def test_the_products_multiply_a_true_residual():
    data = make_data(CASE, CPU)
    logits = data.hidden.detach() @ data.weight.detach().t()
    labels = torch.arange(len(logits)) % CASE.vocab
    expected = torch.softmax(logits, 1) - torch.nn.functional.one_hot(labels, CASE.vocab)
    softmax_residual_(logits, labels)
    assert torch.allclose(logits, expected, atol=1e-6)
    # The contestant's own: rows of its dW and dX sum as those of a residual do.
    gradients = CONTESTANTS["products"].prepare(CASE, data)()
    assert torch.allclose(gradients.d_weight.sum(0), torch.zeros(CASE.hidden, dtype=torch.float64), atol=1e-5)


def test_ratios_are_taken_round_by_round():
    """A spell that slows both by ten changes no ratio."""
    mine, products = Timing((2.0, 2.2, 20.0, 22.0, 3.0, 3.3)), Timing((1.0, 1.1, 10.0, 11.0, 1.0, 1.1))
    assert mine.ratios_to(products, 2) == pytest.approx((2.0, 2.0, 3.0))
    row = Row("c", "x", "slime", OK, median_ms=9.0, products_ms=1.0, ratios=mine.ratios_to(products, 2))
    assert row.over_products == pytest.approx(2.0)
    assert report.over_products(row) == "2.000 (2.000-3.000)"
    # Files of before there were ratios.
    assert report.over_products(Row("c", "x", "slime", OK, median_ms=9.0, products_ms=4.0)) == "2.250"


# --- clocks ------------------------------------------------------------------------------------------------------


def test_clocks_are_numbers_and_words():
    lines = [
        "1980, 2619, 655.12, 700.00, 54, 0x0000000000000004",
        "1410, 2619, 120.00, 700.00, 40, 0x0000000000000001",
        "nonsense",
        "[N/A], [N/A], [N/A], [N/A], [N/A], [N/A]",
        "345, 2619, [N/A], 700.00, 40, 0x0000000000000000",
    ]
    assert clocks.parse_line(lines[0]) == {
        "clocks.sm": 1980.0,
        "clocks.mem": 2619.0,
        "power.draw": 655.12,
        "enforced.power.limit": 700.0,
        "temperature.gpu": 54.0,
        "held back by": ["software power cap"],
    }
    summary = clocks.summarize(lines)
    assert summary["answers"] == 3
    assert summary["clocks.sm"] == [345.0, 1410.0, 1980.0]
    assert summary["power.draw"] == [120.0, 655.12, 655.12]
    assert summary["held back by"] == {"software power cap": 1 / 3, "idle": 1 / 3}
    assert clocks.summarize([]) == {"answers": 0, "held back by": {}}


def test_clocks_of_older_drivers_are_asked_by_the_older_name(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$*" in *clocks_event*) exit 2;; esac\necho "1980, 2619, 655.12, 700.00, 54, 0x40"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    answer = clocks.read_clocks()
    assert answer is not None
    assert answer["held back by"] == ["hardware thermal slowdown"]
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert clocks.read_clocks() is None
