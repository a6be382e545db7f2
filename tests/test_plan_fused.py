"""When the planner chooses "fused", and what it then says. Pure: no tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_fused.engine.plan import (
    FUSED_BELOW_ROWS,
    FUSED_COL_MULTIPLE,
    FUSED_LEAST_COLS,
    Plan,
    format_bytes,
    make_plan,
)
from slime_fused.engine.problem import Problem, padded_cols

# Four pairs of 2048 rows at the head of a Llama 3 8B, bfloat16.
LLAMA = Problem("pair", 8192, 4096, 128256, 2, True, True, False, (2048,) * 4, linear_stats_row_bytes=12 * 1002)


def plan_of(fitting: float, /, **changes) -> Plan:
    """The plan of a changed `LLAMA` in a workspace that holds the logits of ``fitting`` rows."""
    problem = replace(LLAMA, **changes)
    return make_plan(problem, int(fitting * problem.row_bytes))


def wants(*names: str) -> dict[str, bool]:
    return {f"want_{name}": name in names for name in ("hidden", "weight", "bias")}


@pytest.mark.parametrize("rows", [1, 100, 500, 2047, 4096, 8192])
@pytest.mark.parametrize("unit", ["pair", "token", "later"])
@pytest.mark.parametrize("wanted", [(), ("hidden",), ("hidden", "weight"), ("hidden", "weight", "bias")], ids=str)
def test_never_without_linear_stats(wanted, unit, rows):
    assert plan_of(rows, unit=unit, linear_stats_row_bytes=0, **wants(*wanted)).kind != "fused"


@pytest.mark.parametrize("unit", ["pair", "token", "later"])
def test_evaluation_where_few_rows_fit(unit):
    without = {"unit": unit, **wants()}
    assert plan_of(FUSED_BELOW_ROWS - 1, **without).kind == "fused"
    assert plan_of(FUSED_BELOW_ROWS, **without).kind == "eval"
    assert plan_of(1, **without).kind == "fused"
    # All rows at once: one product either way, and the logits are where they may be.
    few = {"rows": 500, "unit_rows": (500,)}
    assert plan_of(500, **without, **few).kind == "eval"
    assert plan_of(499, **without, **few).kind == "fused"
    for fitting, chunks in ((100, 4), (500, 1)):
        # A row's partial statistics take a 21st of its logits.
        plan = plan_of(fitting, **without)
        assert (plan.products, plan.block_cols, plan.blocks) == (1, 0, 0)
        assert len(plan.chunks) == chunks


@pytest.mark.parametrize("wanted", [("weight",), ("hidden", "weight"), ("hidden", "weight", "bias"), ("bias",),
                                    ("hidden", "bias")], ids="+".join)  # fmt: skip
@pytest.mark.parametrize("unit", ["pair", "later"])
def test_always_in_place_of_a_resweep_that_forms_logits_again(unit, wanted):
    """As many products, and no accumulator: whatever the rows of a chunk (here more than FUSED_BELOW_ROWS too)."""
    for rows in (100, 2047):
        # So many rows that one chunk is no way out.
        many = {"rows": 32768, "unit_rows": (2048,) * 16}
        changes = {"unit": unit, **many, **wants(*wanted)}
        plan, other = plan_of(rows, **changes), plan_of(rows, linear_stats_row_bytes=0, **changes)
        assert (plan.kind, other.kind) == ("fused", "resweep")
        assert plan.products == other.products == 2 + ("hidden" in wanted) + ("weight" in wanted)
        assert plan.accumulator_bytes == 0
        assert (other.accumulator_bytes > 0) == ("weight" in wanted)


def test_a_compiled_graph_that_cannot_keep_the_residual():
    assert plan_of(8192, unit="later", keeps_residual=False).kind == "fused"
    assert plan_of(8192, unit="later", keeps_residual=True).kind == "stream"


@pytest.mark.parametrize("unit", ["pair", "token"])
@pytest.mark.parametrize("wanted", [("weight",), ("hidden", "weight")], ids="+".join)
def test_in_place_of_a_stream_of_small_chunks(unit, wanted):
    """8192 of 128256 columns' worth of dX is added as well, so the limit is a sixteenth below FUSED_BELOW_ROWS."""
    changes = {"unit": unit, "unit_rows": (16,) * 512, **wants(*wanted)}
    assert plan_of(FUSED_BELOW_ROWS * 15 / 16 - 64, **changes).kind == "fused"
    assert plan_of(FUSED_BELOW_ROWS, **changes).kind == "stream"
    assert plan_of(100, **changes, linear_stats_row_bytes=0).kind == "stream"
    if "hidden" not in wanted:
        assert plan_of(FUSED_BELOW_ROWS - 1, **changes).kind == "fused"
    # One chunk accumulates nothing.
    assert plan_of(512, **{**changes, "unit_rows": (512,), "rows": 512}).kind == "stream"


def test_not_where_adding_to_d_hidden_costs_as_much():
    """More rows than columns: a workspace that holds 512 rows holds 256 columns."""
    changes = {"unit": "token", "rows": 65536, "vocab_size": 32768, "linear_stats_row_bytes": 3072}
    assert plan_of(512, **changes).kind == "stream"
    assert plan_of(512, **{**changes, "rows": 4096}).kind == "fused"
    assert plan_of(512, **changes, **wants("weight")).kind == "fused", "no dX to add to"


@pytest.mark.parametrize("itemsize", [4, 8])
def test_wide_dtypes_stream_small_chunks(itemsize):
    """Their dW needs no float32 copy, and their products hide the addition."""
    changes = {"unit_rows": (32,) * 256, "itemsize": itemsize}
    assert plan_of(100, **changes).kind == "stream"
    assert plan_of(20, **changes).kind == "fused", "a resweep otherwise"


@pytest.mark.parametrize("unit", ["pair", "token", "later"])
@pytest.mark.parametrize("rows", [1, 100, 2047, 4096])
def test_never_with_a_frozen_head(rows, unit):
    plan = plan_of(rows, unit=unit, **wants("hidden"))
    assert plan.kind in ("stream", "resweep")
    assert plan.products == 2


@pytest.mark.parametrize("wanted", [("bias",), ("hidden", "bias")], ids="+".join)
def test_a_bias_alone_keeps_the_stream(wanted):
    """db needs no product and no float32 dW: a stream is one product less."""
    changes = {"unit": "token", **wants(*wanted)}
    plan = plan_of(100, **changes)
    assert plan.kind == "stream"
    assert plan.products == len(wanted)


def test_only_where_a_block_of_columns_fits():
    row_of_block = FUSED_LEAST_COLS * LLAMA.itemsize
    assert make_plan(LLAMA, LLAMA.rows * row_of_block).kind == "fused"
    plan = make_plan(LLAMA, LLAMA.rows * row_of_block - 1)
    assert plan.kind == "resweep"
    # A vocabulary narrower than that is one block, if anything.
    narrow = {"vocab_size": 100, "linear_stats_row_bytes": 12, "unit": "later", "keeps_residual": False}
    assert plan_of(8192, **narrow).block_cols == 100
    assert plan_of(8191, **narrow).kind == "resweep"


def test_no_rows():
    for changes in (wants(), wants("hidden", "weight")):
        plan = plan_of(100, unit="later", rows=0, unit_rows=(), **changes)
        assert plan.kind != "fused"
        assert plan.chunks == ()


def test_the_printed_plan_tells_the_numbers():
    plan = plan_of(500)
    text = str(plan)
    assert "plan         fused: the largest pair has 2048 rows, the workspace holds 500" in text
    assert f"backward goes by blocks of {plan.block_cols} columns" in text
    assert "chunks       1 of at most 8192 rows (statistics; no logits are written)" in text
    assert f"blocks       17 of at most {plan.block_cols} columns x 8192 rows (backward)" in text
    assert f"workspace    {format_bytes(plan.workspace_bytes)} of {format_bytes(plan.workspace)}" in text
    assert f"scratch      {format_bytes(plan.scratch_bytes)} of" in text
    assert "accumulator  0 B" in text
    assert "products     4 of rows" in text
    assert plan.flops == 2 * 4 * 8192 * 128256 * 4096
    assert plan.scratch_bytes == 8192 * 4096 * (2 + 2 + 4)
    assert "blocks" not in str(plan_of(500, **wants()))
    assert plan_of(500, **wants()).scratch_bytes == 8192 * 4096 * 2


fused_problems = st.builds(
    Problem,
    unit=st.sampled_from(["pair", "token", "later"]),
    rows=st.just(0),
    hidden_size=st.integers(1, 5000),
    vocab_size=st.integers(1, 300_000),
    itemsize=st.sampled_from([2, 4]),
    want_hidden=st.booleans(),
    want_weight=st.booleans(),
    want_bias=st.booleans(),
    unit_rows=st.lists(st.integers(2, 400), min_size=1, max_size=40).map(tuple),
    keeps_residual=st.booleans(),
)


@given(
    problem=fused_problems, capacity=st.integers(1, 6000), slack=st.integers(0, 10**6), tile=st.integers(64, 256)
)
def test_whatever_is_chosen_covers_everything_within_the_budget(problem, capacity, slack, tile):
    row_bytes = 12 * -(-problem.vocab_size // tile)
    problem = replace(problem, rows=sum(problem.unit_rows), linear_stats_row_bytes=row_bytes)
    workspace = capacity * problem.row_bytes + slack
    plan = make_plan(problem, workspace)
    other = make_plan(replace(problem, linear_stats_row_bytes=0), workspace)
    if plan.kind != "fused":
        assert replace(plan, problem=other.problem) == other
        return
    assert plan.workspace_bytes <= workspace
    assert plan.accumulator_bytes == 0
    assert sum(c.rows for c in plan.chunks) == problem.rows
    assert [c.begin for c in plan.chunks] == [0, *[c.end for c in plan.chunks[:-1]]]
    assert max(c.rows for c in plan.chunks) - min(c.rows for c in plan.chunks) <= 1
    if not problem.wants_gradient:
        assert (plan.block_cols, plan.products) == (0, 1)
        return
    cols, vocab = plan.block_cols, problem.vocab_size
    assert min(FUSED_LEAST_COLS, vocab) <= cols <= vocab
    assert cols % FUSED_COL_MULTIPLE == 0 or cols == vocab
    assert problem.rows * padded_cols(cols, problem.itemsize) * problem.itemsize <= workspace
    # As few blocks as blocks of a multiple allow, and about equally wide.
    wider = workspace // (problem.rows * problem.itemsize) // FUSED_COL_MULTIPLE * FUSED_COL_MULTIPLE
    assert plan.blocks == (1 if cols == vocab else -(-vocab // wider))
    assert plan.blocks == 1 or vocab / plan.blocks > cols - FUSED_COL_MULTIPLE
    # Never more products than what it takes the place of, but for the one that the accumulator cost.
    assert plan.products - other.products == (0 if other.kind == "resweep" else 1)
    is_beyond_the_budget = other.workspace_bytes > workspace
    assert other.kind == "resweep" or other.accumulator_bytes > 0 or is_beyond_the_budget
