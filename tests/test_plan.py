"""The planner's promises: what it chooses, and that what runs costs what it says."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slime_fused as sf
from slime_fused.engine.plan import (
    WEIGHT_GRAD_BLOCK_BYTES,
    Plan,
    format_bytes,
    make_plan,
)
from slime_fused.engine.problem import Problem
from slime_fused.engine.workspace import parse_bytes, resolve_workspace
from tests.measure import count_products, memory_of
from tests.support import BACKENDS, Batch, make_batch, pack, require_backend

OPERATIONS = {"slime": "slime_loss", "cross_entropy": "linear_cross_entropy", "token": "linear_logprobs"}


def loss_of(out: sf.SlimeOutput | torch.Tensor) -> torch.Tensor:
    return out.loss if isinstance(out, sf.SlimeOutput) else out.sum()


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


# --- what runs costs what the plan says ---

WANTED = [
    tuple(n for n, on in zip(("hidden", "weight", "bias"), flags, strict=True) if on)
    for flags in product([False, True], repeat=3)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", [1000, 9, 2])
@pytest.mark.parametrize("wanted", WANTED, ids=lambda w: "+".join(w) or "nothing")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_products_and_flops(operation, wanted, rows, dtype, backend):
    """Every product that has the vocabulary as a dimension, against the plan; masked rows cost nothing."""
    batch = make_batch(vocab_size=257, hidden_size=4, prompt=20, dtype=dtype, has_bias=True)
    leaves = batch.leaves(wanted)
    workspace = rows * leaves.call(sf.explain_plan, loss=operation, workspace="1GiB").problem.row_bytes
    plan = leaves.call(sf.explain_plan, loss=operation, workspace=workspace)
    labelled = int((batch.labels != -100).sum())
    assert plan.problem.rows == labelled < batch.labels.numel() / 4
    with count_products(vocab_size=257, hidden_size=4) as counted:
        out = leaves.call(getattr(sf, OPERATIONS[operation]), backend=backend, workspace=workspace)
        if wanted:
            loss_of(out).backward()
    assert counted.flops == plan.flops == 2 * plan.products * labelled * 257 * 4
    assert (len(plan.chunks) == 1) == (rows == 1000)
    assert counted.largest_rows == plan.chunk_rows


def test_products_of_every_plan():
    """The table of the planner, as numbers."""
    both, head_frozen, input_frozen = ("hidden", "weight"), ("hidden",), ("weight",)
    expected = {
        ("slime", 1000): {(): 1, both: 3, head_frozen: 2, input_frozen: 2},
        ("slime", 9): {(): 1, both: 3, head_frozen: 2, input_frozen: 2},
        ("slime", 2): {(): 1, both: 4, head_frozen: 2, input_frozen: 3},
        ("cross_entropy", 2): {(): 1, both: 3, head_frozen: 2, input_frozen: 2},
        ("token", 1000): {(): 1, both: 3, head_frozen: 2, input_frozen: 2},
        ("token", 2): {(): 1, both: 4, head_frozen: 2, input_frozen: 3},
    }
    batch = make_batch()
    row_bytes = batch.call(sf.explain_plan).problem.row_bytes
    for (operation, rows), by_wanted in expected.items():
        for wanted, count in by_wanted.items():
            plan = batch.leaves(wanted).call(sf.explain_plan, loss=operation, workspace=rows * row_bytes)
            assert plan.products == count, f"{operation}, {rows} rows, {wanted}: {plan}"


def test_no_grad_costs_one_product(backend):
    leaves = make_batch(vocab_size=257, hidden_size=24, has_bias=True).leaves()
    for operation, name in OPERATIONS.items():
        with torch.no_grad(), count_products(vocab_size=257, hidden_size=24) as counted:
            plan = leaves.call(sf.explain_plan, loss=operation)
            leaves.call(getattr(sf, name), backend=backend)
        assert plan.kind == "eval"
        assert plan.products == 1
        assert counted.flops == plan.flops
        assert counted.calls == 1


MEMORY_CASES = {
    # name -> (dtype, wanted, workspace)
    "float32": (torch.float32, ("hidden", "weight"), "8MiB"),
    "float32_frozen_head": (torch.float32, ("hidden",), "8MiB"),
    "float32_bias": (torch.float32, ("hidden", "weight", "bias"), "8MiB"),
    "float32_evaluation": (torch.float32, (), "8MiB"),
    "bfloat16": (torch.bfloat16, ("hidden", "weight"), "8MiB"),
    "bfloat16_bias": (torch.bfloat16, ("hidden", "weight", "bias"), "8MiB"),
    "float16": (torch.float16, ("hidden", "weight"), "8MiB"),
    "float16_evaluation": (torch.float16, (), "8MiB"),
    "bfloat16_frozen_head": (torch.bfloat16, ("hidden",), "8MiB"),
    "float32_resweep": (torch.float32, ("hidden", "weight"), "2MiB"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", MEMORY_CASES)
def test_peak_memory(case, operation):
    """1024 tokens x 50257 x 64: 206 MB of float32 logits, in 8 MiB. Nothing else may be of that order."""
    dtype, wanted, workspace = MEMORY_CASES[case]
    batch = make_batch((16,) * 64, prompt=0, padding=0, hidden_size=64, vocab_size=50257, has_bias="bias" in wanted)
    leaves = batch.to(dtype).leaves(wanted)
    plan = leaves.call(sf.explain_plan, loss=operation, workspace=workspace)
    if case == "float32_resweep" and operation == "slime":
        assert plan.kind == "resweep"

    def step() -> None:
        out = leaves.call(getattr(sf, OPERATIONS[operation]), backend="cpu", workspace=workspace)
        if wanted:
            loss_of(out).backward()

    # oneDNN's own scratchpad of a bf16 product; where no accumulator declares them, float32 blocks of fp16 ones.
    own = 0 if dtype == torch.float32 else (1 << 20) * torch.get_num_threads()
    if dtype == torch.float16 and not plan.accumulator_bytes:
        own += WEIGHT_GRAD_BLOCK_BYTES
    gradients = sum(x.numel() * x.element_size() for n, x in leaves.tensors().items() if n in wanted)
    per_row = 32 * 8 * plan.problem.rows
    budget = parse_bytes(workspace)
    assert plan.workspace_bytes <= budget
    allowed = gradients + 1.05 * budget + plan.scratch_bytes + plan.accumulator_bytes + per_row + own
    peak, _ = memory_of(step)
    assert peak <= allowed, f"{peak / 2**20:.1f} MiB, allowed {allowed / 2**20:.1f} MiB\n{plan}"
    assert peak >= plan.workspace_bytes + gradients, "the measurement sees less than must be there"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_after_backward_the_gradients_alone_are_held(operation):
    """The loss may stay alive for logging: the residual that was kept for backward must not."""
    leaves = make_batch((64, 64), prompt=0, padding=0, vocab_size=5003, dtype=torch.float32).leaves()
    plan = leaves.call(sf.explain_plan, loss=operation)
    assert len(plan.chunks) == 1

    def step() -> object:
        out = leaves.call(getattr(sf, OPERATIONS[operation]), backend="cpu")
        loss_of(out).backward()
        return out

    gradients = sum(x.numel() * x.element_size() for x in leaves.tensors().values())
    _, held = memory_of(step)
    assert gradients <= held <= gradients + 32 * 8 * plan.problem.rows


# --- what it chooses ---


def test_the_printed_plan_tells_the_numbers():
    leaves = make_batch(dtype=torch.bfloat16).leaves(("hidden", "weight"))
    plan = leaves.call(sf.explain_plan, workspace=9 * 80)
    text = str(plan)
    assert plan.kind == "stream"
    assert re.search(r"plan +stream: the largest pair \(\d+ rows\) fits", text)
    assert f"{plan.problem.rows} labelled rows x 37 vocabulary x 5 hidden, 2 bytes each" in text
    assert f"chunks       {len(plan.chunks)} of at most {plan.chunk_rows} rows" in text
    assert "gradients: hidden, weight" in text
    assert format_bytes(plan.accumulator_bytes) in text
    assert f"products     {plan.products} of" in text


def test_accumulator_is_declared_only_where_it_is_needed():
    batch = make_batch()
    for dtype, rows, expected in (
        (torch.float32, 9, False),
        (torch.float64, 9, False),
        (torch.bfloat16, 9, True),
        (torch.float16, 9, True),
        (torch.bfloat16, 1000, False),
    ):
        leaves = batch.to(dtype).leaves()
        row_bytes = leaves.call(sf.explain_plan).problem.row_bytes
        plan = leaves.call(sf.explain_plan, workspace=rows * row_bytes)
        assert (plan.accumulator_bytes > 0) == expected, plan
    frozen = batch.to(torch.bfloat16).leaves(("hidden", "bias"))
    assert frozen.call(sf.explain_plan, workspace=9 * 80).accumulator_bytes == 0


problems = st.builds(
    Problem,
    unit=st.sampled_from(["pair", "token", "later"]),
    rows=st.just(0),
    hidden_size=st.integers(1, 5000),
    vocab_size=st.integers(1, 300_000),
    itemsize=st.sampled_from([2, 4, 8]),
    want_hidden=st.booleans(),
    want_weight=st.booleans(),
    want_bias=st.booleans(),
    unit_rows=st.lists(st.integers(2, 400), min_size=1, max_size=40).map(tuple),
    keeps_residual=st.booleans(),
)


@given(problem=problems, capacity=st.integers(1, 6000), slack=st.integers(0, 10**6))
def test_chunks_cover_everything_once_within_the_budget(problem, capacity, slack):
    problem = replace(problem, rows=sum(problem.unit_rows))
    workspace = capacity * problem.row_bytes + slack
    plan = make_plan(problem, workspace)
    by_pairs = problem.unit == "pair" and plan.kind == "stream"
    assert plan.chunks[0].begin == 0
    assert plan.chunks[-1].end == (len(problem.unit_rows) if by_pairs else problem.rows)
    for before, after in zip(plan.chunks, plan.chunks[1:], strict=False):
        assert before.end == after.begin
    for chunk in plan.chunks:
        assert chunk.end > chunk.begin
        rows = sum(problem.unit_rows[chunk.begin : chunk.end]) if by_pairs else chunk.end - chunk.begin
        assert chunk.rows == rows
    accumulator = 4 * problem.vocab_size * problem.hidden_size if problem.want_weight else 0
    if plan.workspace_bytes > workspace:
        # One chunk instead of several that would add to a float32 dW: no more memory than those.
        assert problem.itemsize == 2
        assert len(plan.chunks) == 1
        assert plan.accumulator_bytes == 0
        assert plan.logits_bytes <= workspace + accumulator
        return
    if plan.accumulator_bytes:
        # And several only where one would take more.
        one = make_plan(problem, problem.rows * problem.row_bytes)
        if len(one.chunks) == 1 and one.kind == "stream":
            assert one.logits_bytes + one.scratch_bytes > workspace + accumulator + plan.scratch_bytes
    if by_pairs:
        # Greedy by pairs is optimal for ordered pairs: no plan has fewer chunks.
        fewest, room = 0, 0
        for rows in problem.unit_rows:
            if rows > room:
                fewest, room = fewest + 1, workspace // problem.row_bytes
            room -= rows
        assert len(plan.chunks) == fewest
    else:
        sizes = [c.rows for c in plan.chunks]
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-problem.rows // (workspace // problem.row_bytes))


@given(problem=problems, is_gpu=st.booleans())
def test_automatic_workspace_always_works(problem, is_gpu):
    problem = replace(problem, rows=sum(problem.unit_rows))
    workspace = resolve_workspace("auto", problem, is_gpu=is_gpu)
    plan = make_plan(problem, workspace)
    accumulator = 4 * problem.vocab_size * problem.hidden_size + (8 << 20) if problem.want_weight else 0
    assert workspace <= max(4 << 30 if is_gpu else 1 << 30, problem.row_bytes) + accumulator
    assert isinstance(plan, Plan)


@pytest.mark.parametrize(
    ("rows", "itemsize", "want_weight", "chunks"),
    [
        # Llama-3-8B's head on a GPU: a float32 copy of dW takes as much as the logits of about 8200 rows.
        (4096, 2, True, 1),
        (8192, 2, True, 1),
        (11520, 2, True, 1),
        (16384, 2, True, 4),
        (8192, 2, False, 2),
        (8192, 4, True, 2),
    ],
)
@pytest.mark.parametrize("workspace", ["auto", 4096])
@pytest.mark.parametrize("unit", ["pair", "token", "later"])
def test_one_chunk_rather_than_several_and_a_float32_copy_of_the_gradient(
    unit, workspace, rows, itemsize, want_weight, chunks
):
    """Whether "auto" or the user's number (here the rows it holds): the budget counts the accumulator."""
    pairs = (512,) * (rows // 512) + ((rows % 512,) if rows % 512 else ())
    problem = Problem(unit, rows, 4096, 128256, itemsize, True, want_weight, False, pairs if unit == "pair" else ())
    budget = resolve_workspace("auto", problem, is_gpu=True) if workspace == "auto" else 4096 * problem.row_bytes
    plan = make_plan(problem, budget)
    assert len(plan.chunks) == chunks
    assert plan.kind == ("resweep" if unit == "later" and chunks > 1 else "stream")
    assert plan.products == (4 if plan.kind == "resweep" and want_weight else 2 + want_weight)
    if chunks == 1 and rows > 4096:
        in_rows = 4096 * problem.row_bytes + 4 * 4096 * 128256 + (8 << 20) + 4096 * problem.row_scratch_bytes
        assert plan.logits_bytes + plan.scratch_bytes <= in_rows
        assert workspace == "auto" or f"all {rows} rows at once take no more than" in plan.reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512MiB", 512 << 20),
        ("1GiB", 1 << 30),
        ("2 KiB", 2048),
        ("1.5GB", 1_500_000_000),
        ("3kb", 3000),
        ("7", 7),
        (" 8 b ", 8),
    ],
)
def test_workspace_strings(text, expected):
    assert parse_bytes(text) == expected


def test_rows_of_the_buffer_are_aligned():
    for itemsize, vocab in product([2, 4, 8], [1, 7, 8, 50257, 128256]):
        problem = Problem("later", 4, 8, vocab, itemsize, True, True, False)
        assert problem.row_pitch * itemsize % 16 == 0
        assert 0 <= problem.row_pitch - vocab < 16 // itemsize


def test_explain_plan_reads_the_layout():
    padded = make_batch((4, 3, 5, 2))
    plan = padded.call(sf.explain_plan)
    packed: Batch = pack(padded)
    assert plan.problem.unit_rows == (9, 5)
    assert packed.call(sf.explain_plan).problem == plan.problem
    # The shift loses the first label of a sequence that begins with one.
    unprompted = make_batch((4, 3, 5, 2), prompt=0)
    assert unprompted.call(sf.explain_plan, shift=True).problem.unit_rows == (7, 3)
