"""What docs/architecture.md and docs/losses.md show runs, gives the right numbers, and names what exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import slime_fused as sf
import slime_fused.backends as registry
from tests import backend_grid as grid

ROOT = Path(__file__).parents[1]
PAGES = ("architecture.md", "losses.md")
CPU = torch.device("cpu")


def blocks_of(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def run_blocks(page: str) -> dict:
    """The names that the blocks of a page define, one after the other in one scope."""
    torch.manual_seed(0)
    name = f"docs_{page.removesuffix('.md')}"
    module = sys.modules[name] = ModuleType(name)  # dataclasses look their module up
    for block in blocks_of(page):
        exec(compile(block, page, "exec"), vars(module))
    return vars(module)


@pytest.fixture(scope="module")
def architecture():
    return run_blocks("architecture.md")


@pytest.fixture(scope="module")
def losses():
    return run_blocks("losses.md")


def check_against_autograd(loss, formula, **given):
    """``formula`` on mean log-probs (P,) of both sides, in float64: value and both gradients, through any plan."""
    torch.manual_seed(1)
    hidden = torch.randn(6, 5, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(41, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 41, (6, 5))
    labels[0, :2] = labels[4, 3:] = -100
    means = sf.reference.sequence_logprobs(hidden, weight, labels, reduction="mean")
    expected = formula(means[:3], means[3:]).mean()
    truth = torch.autograd.grad(expected, (hidden, weight))
    # All pairs at once, each alone, and none whole: 48 columns of float64 are a row of the buffer.
    for workspace, kind in (("auto", "stream"), (10 * 48 * 8, "stream"), (4 * 48 * 8, "resweep")):
        assert sf.explain_plan(hidden, weight, labels, loss=loss, workspace=workspace).kind == kind
        got = sf.preference_loss(hidden, weight, labels, loss=loss, workspace=workspace, **given).loss
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        for gradient, expected_gradient in zip(torch.autograd.grad(got, (hidden, weight)), truth, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_loss_by_formula(architecture):
    loss = architecture["SquaredMargin"](target=2.0)
    check_against_autograd(loss, lambda chosen, rejected: (chosen - rejected - 2.0) ** 2)


def test_loss_by_function(losses):
    check_against_autograd(
        losses["hinge"], lambda chosen, rejected: torch.relu(1 - (chosen - rejected)) - 0.1 * chosen
    )


def test_backend(architecture, monkeypatch):
    """By the grid, where it has a path of its own, and as the backend of a whole call."""
    cls = architecture["RowByRowBackend"]
    names = {"plain", "scale", "temperature", "ignored", "likely_labels", "one_column", "no_rows", "smoothing"}
    cases = [case for case in grid.row_cases() if case.name.rpartition("-")[0] in names]
    assert len(cases) == len(names) * len(grid.DTYPES)
    for case in cases:
        grid.check_softmax_residual(cls(), case, CPU)

    monkeypatch.setitem(registry._CLASSES, cls.name, (cls.__module__, cls.__name__))
    hidden, weight = torch.randn(4, 5, 12, requires_grad=True), torch.randn(41, 12, requires_grad=True)
    labels = torch.randint(0, 41, (4, 5))
    monkeypatch.setattr("slime_fused.functional.arguments.BACKEND_NAMES", (*registry.BACKEND_NAMES, cls.name))
    got = sf.slime_loss(hidden, weight, labels, backend=cls.name).loss
    expected = sf.reference.slime_loss(hidden, weight, labels).loss
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_files_of_a_kernel_and_their_symbols_exist():
    section = (ROOT / "docs" / "architecture.md").read_text().split("## How to add a kernel")[1]
    rows = re.findall(r"^\| `(\S+)` \| `(.+?)` \|", section, re.MULTILINE)
    assert len(rows) >= 15
    for path, symbol in rows:
        assert symbol in (ROOT / path).read_text(), f"{path}: {symbol}"


@pytest.mark.parametrize("page", [*PAGES, "backends.md", "distributed.md", "trainer.md"])
def test_files_and_links_exist(page):
    text = (ROOT / "docs" / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)[)#]", text):
        assert target.startswith("http") or (ROOT / "docs" / target).exists(), target
    folders = (ROOT, ROOT / "slime_fused", ROOT / "tests", ROOT / "csrc" / "cuda")
    for path in re.findall(r"`([\w/]+\.(?:py|cpp|cu|cuh|h|md|sh))`", text):
        assert any((folder / path).exists() for folder in folders), path


def test_every_loss_that_ships_has_its_row():
    text = (ROOT / "docs" / "losses.md").read_text()
    values = [getattr(sf.losses, name) for name in sf.losses.__all__]
    formulas = {
        value.__name__ for value in values if isinstance(value, type) and issubclass(value, sf.losses.Formula)
    }
    named = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert formulas - {"Formula", "Own"} <= named
