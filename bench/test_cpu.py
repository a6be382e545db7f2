"""Timing tables by pytest-benchmark: `pytest bench/test_cpu.py --benchmark-group-by=group`.

For a quick look while developing. pytest-benchmark times one contestant after the other, so a change of the
machine's load falls on one of them; `bench.cpu` interleaves them and writes the numbers that are published.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import CPU_CASES, Case, make_data
from bench.oracle import errors, float64_gradients
from bench.registry import CONTESTANTS

NAMES = ("products", "slime_fused", "naive", "naive-no-upcast")
# The large vocabulary takes half a minute per contestant; `bench.cpu` has it.
CASES = [case for case in CPU_CASES if case.vocab < 100_000]
# Generous: the accuracy tests live in tests/; here a contestant that computes something else must not be timed.
WORST_ERROR = {"float32": 1e-4, "bfloat16": 3e-2}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(benchmark: Any, case: Case, name: str) -> None:
    """Time one contestant on one case after checking it on a smaller one of the same kind."""
    device = torch.device("cpu")
    contestant = CONTESTANTS[name]
    if contestant.objective != "products":
        small = case.but(tokens=64 * case.pairs, hidden=64, vocab=2003)
        data = make_data(small, device)
        found = errors(contestant.prepare(small, data)(), float64_gradients(small, data, contestant.objective))
        assert found.worst_gradient <= WORST_ERROR[case.dtype]
    benchmark.group = case.name
    benchmark.pedantic(contestant.prepare(case, make_data(case, device)), rounds=3, warmup_rounds=1)
