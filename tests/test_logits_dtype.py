"""``logits_dtype=torch.float32``: products of 16-bit operands that are never rounded to 16 bits.

An output then errs by float32 arithmetic alone: its tolerance is the error of plain PyTorch that forms float32
logits of the same operands, plus a few float32 units of the largest logit. Rounded logits miss that by a factor of
hundreds at least, and every test of an output asserts that they do. The residual keeps its 16 bits, so gradients
have the tolerance that they have elsewhere, one rounding of the largest entry; but where logits reach 100, rounded
ones change the probabilities themselves, and the gradients are far outside it.

Logits of standard deviation 2 and 30, an odd vocabulary, chunks whose float32 blocks end in a remainder: every way
through the engine, each loss, both backends of this machine, and the plan "fused" on its test double.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import slime_fused as sf
from bench import precision
from slime_fused import reference
from slime_fused.backends import get_backend, native
from slime_fused.backends.base import LinearStatsBackend, LogitsBlock, RowStats
from slime_fused.engine.plan import FUSED_LEAST_COLS, WEIGHT_GRAD_BLOCK_BYTES, Plan, make_plan
from slime_fused.engine.problem import WIDE_LOGITS_ROWS, Problem
from slime_fused.engine.workspace import parse_bytes
from tests.linear_stats_backend import linear_stats_backend  # noqa: F401
from tests.measure import count_products, memory_of
from tests.narrow_residual import CASES, HALVES, check_narrow_residual
from tests.row_cases import NLL, PLAIN_HEAD
from tests.support import BACKENDS, Batch, Result, assert_close, floor_of, make_batch, require_backend, run

WIDE = {"logits_dtype": torch.float32}
FUNCTIONS = {
    # name -> (function, options, planner's operation)
    "slime": ("slime_loss", {}, "slime"),
    "mean": ("linear_cross_entropy", {"label_smoothing": 0.1, "z_loss": 0.001}, "cross_entropy"),
    "none": ("linear_cross_entropy", {"reduction": "none"}, "token"),
    "sequence": ("sequence_logprobs", {}, "token"),
}
ROWS = {"one_chunk": 1000, "several": 11, "few": 5}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


@pytest.fixture(params=HALVES, ids=lambda d: str(d)[6:])
def dtype(request) -> torch.dtype:
    return request.param


def largest_logit(batch: Batch) -> float:
    logits = batch.hidden.double() @ batch.weight.double().t()
    return logits.abs().max().item()


def assert_float32(name: str, batch: Batch, *, rounded: Result | None = None, **how: Any) -> Result:
    """As the module says; ``rounded``: what the same call gives with rounded logits."""
    function, options, _ = FUNCTIONS[name]
    fused, plain = getattr(sf, function), getattr(reference, function)
    wanted = {"wanted": how.pop("wanted")} if "wanted" in how else {}
    truth = run(plain, batch.to(torch.float64), **options, **wanted)
    naive = run(plain, batch, **options, **WIDE, **wanted)
    got = run(fused, batch, **options, **WIDE, **how, **wanted)
    if rounded is None:
        rounded = run(fused, batch, **options, **how, **wanted)
    unit = 16 * torch.finfo(torch.float32).eps
    for key, value in got.outputs.items():
        assert value.dtype == torch.float32
        # The stabilizer's slope at a hopeless token carries an error of a log-prob into the loss.
        smallest = largest_logit(batch) if truth.outputs[key].abs().max() < 1e3 else 0.0
        assert_close(key, value, naive.outputs[key], truth.outputs[key], unit, smallest=smallest)
    key = next(iter(truth.outputs))
    error, of_rounded = ((x.outputs[key].double() - truth.outputs[key]).abs().max() for x in (got, rounded))
    assert of_rounded > 10 * error, "logits were rounded, or rounding them did no harm: no test of anything"
    for key, grad in got.grads.items():
        assert_close(f"d_{key}", grad, naive.grads[key], truth.grads[key], floor_of(batch.hidden.dtype))
    return got


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_residual_of_fewer_bits(case, dtype, backend):
    check_narrow_residual(get_backend(backend), case, dtype, torch.device("cpu"))


@pytest.mark.parametrize("isa", native._C.cpu.runnable_isas() if native._C else [])
def test_residual_of_fewer_bits_on_every_instruction_set(isa, dtype):
    native._C.cpu.use_isa(isa)
    try:
        for case in CASES:
            check_narrow_residual(get_backend("cpu"), case, dtype, torch.device("cpu"))
    finally:
        native._C.cpu.use_isa("")


def test_residuals_of_other_dtypes_are_refused():
    """The native kernels would write beyond the buffer."""
    labels, stats = torch.zeros(2, dtype=torch.int64), RowStats(*torch.empty(3, 2))
    for dtype, out_dtype in (
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
    ):
        logits, out = torch.zeros(2, 8, dtype=dtype), torch.zeros(2, 8, dtype=out_dtype)
        with pytest.raises(TypeError, match="out: expected dtype"):
            get_backend("cpu").softmax_residual(LogitsBlock(logits, labels, None, PLAIN_HEAD), out, NLL, stats)


@pytest.mark.parametrize("spread", [2.0, 30.0])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_plan(name, rows, spread, dtype, backend):
    batch = make_batch((6, 7, 5, 4), vocab_size=301, dtype=dtype, spread=spread, has_bias=True)
    operation = FUNCTIONS[name][2]
    leaves = batch.leaves()
    problem = leaves.call(sf.explain_plan, loss=operation, **WIDE).problem
    workspace = problem.buffer_bytes(ROWS[rows])
    plan = leaves.call(sf.explain_plan, loss=operation, workspace=workspace, **WIDE)
    assert (len(plan.chunks) == 1) == (rows == "one_chunk")
    if rows == "few" and operation != "cross_entropy":
        assert plan.kind == "resweep"
    if rows == "one_chunk":
        assert 0 < plan.logits_rows < plan.chunk_rows
    assert_float32(name, batch, backend=backend, workspace=workspace)


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ()], ids=lambda w: "+".join(w) or "nothing")
@pytest.mark.parametrize("rows", ["one_chunk", "few"])
@pytest.mark.parametrize("name", ["slime", "none"])
def test_frozen_inputs_and_evaluation(name, rows, wanted, dtype, backend):
    batch = make_batch((6, 7, 5, 4), vocab_size=301, dtype=dtype, spread=30.0)
    workspace = ROWS[rows] * batch.leaves(wanted).call(sf.explain_plan, **WIDE).problem.buffer_bytes(1)
    assert_float32(name, batch, wanted=wanted, backend=backend, workspace=workspace)


def test_gradients_of_large_logits_are_those_of_exact_ones(dtype, backend):
    """Rounding logits of 100 to bfloat16 moves them by a quarter, and their probabilities with them."""
    batch = make_batch((9,) * 6, vocab_size=301, hidden_size=32, dtype=dtype, spread=30.0)
    truth = run(reference.linear_logprobs, batch.to(torch.float64))
    wide = run(sf.linear_logprobs, batch, backend=backend, **WIDE)
    rounded = run(sf.linear_logprobs, batch, backend=backend)
    for name, exact in truth.grads.items():
        error, of_rounded = ((x.grads[name].double() - exact).norm() for x in (wide, rounded))
        assert error < of_rounded / 4


@pytest.mark.parametrize("spread", [2.0, 30.0])
@pytest.mark.parametrize("name", ["slime", "none", "sequence"])
def test_fused_plan(name, spread, dtype, linear_stats_backend: LinearStatsBackend):  # noqa: F811
    """Statistics of products that were not rounded, and residuals by blocks of columns and of rows."""
    batch = make_batch((6, 7, 5, 4), vocab_size=601, dtype=dtype, spread=spread, has_bias=True)
    name_of_backend = linear_stats_backend.name
    options = {"loss": FUNCTIONS[name][2], "backend": name_of_backend, **WIDE}
    leaves = batch.leaves()
    problem = leaves.call(sf.explain_plan, **options).problem
    workspace = problem.rows * FUSED_LEAST_COLS * 2 + problem.wide_bytes(-(-problem.rows // 4), FUSED_LEAST_COLS)
    plan = leaves.call(sf.explain_plan, workspace=workspace, **options)
    assert plan.kind == "fused", plan
    assert plan.workspace_bytes <= workspace
    assert plan.blocks > 1
    assert 1 < plan.logits_rows < problem.rows
    function, own, _ = FUNCTIONS[name]
    rounded = run(getattr(sf, function), batch, **own, backend="torch", workspace="1GiB")
    calls = linear_stats_backend.calls
    assert_float32(name, batch, backend=name_of_backend, workspace=workspace, rounded=rounded)
    assert linear_stats_backend.calls > calls


@pytest.mark.parametrize("rows", ["one_chunk", "few"])
def test_under_autocast(rows, dtype, backend):
    """Operands are cast, logits and the bias are not: float32 products of 16-bit operands and a float32 bias."""
    batch = make_batch((6, 7, 5, 4), vocab_size=301, dtype=torch.float32, spread=30.0, has_bias=True)
    cast = batch.to(dtype).to(torch.float32)
    cast = Batch(cast.hidden, cast.weight, cast.labels, batch.bias)
    with torch.autocast("cpu", dtype):
        problem = batch.leaves().call(sf.explain_plan, loss="token", **WIDE).problem
        workspace = problem.buffer_bytes(ROWS[rows])
        got = run(sf.linear_logprobs, batch, backend=backend, workspace=workspace, **WIDE)
        plain = run(reference.linear_logprobs, batch, **WIDE)
    truth = run(reference.linear_logprobs, cast.to(torch.float64))
    unit = 16 * torch.finfo(torch.float32).eps
    for result in (got, plain):
        value, exact = result.outputs["value"], truth.outputs["value"]
        assert (value.double() - exact).abs().max() <= unit * largest_logit(batch)
    for name, grad in got.grads.items():
        assert grad.dtype == torch.float32
        assert_close(f"d_{name}", grad, plain.grads[name], truth.grads[name], floor_of(dtype))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_products(name, rows, dtype, backend):
    """As many as with rounded logits, however many blocks of rows form them."""
    batch = make_batch((6, 7, 5, 4), vocab_size=257, hidden_size=4, dtype=dtype, has_bias=True).leaves()
    function, options, operation = FUNCTIONS[name]
    workspace = batch.call(sf.explain_plan, loss=operation, **WIDE).problem.buffer_bytes(ROWS[rows])
    plan = batch.call(sf.explain_plan, loss=operation, workspace=workspace, **WIDE)
    with count_products(vocab_size=257, hidden_size=4) as counted:
        out = batch.call(getattr(sf, function), backend=backend, workspace=workspace, **options, **WIDE)
        (out.loss if isinstance(out, sf.SlimeOutput) else out.sum()).backward()
    assert counted.flops == plan.flops == 2 * plan.products * plan.problem.rows * 257 * 4


@pytest.mark.parametrize("wanted", [("hidden", "weight"), ("hidden",), ()], ids=lambda w: "+".join(w) or "nothing")
@pytest.mark.parametrize("operation", ["slime_loss", "linear_logprobs"])
def test_peak_memory(operation, wanted, dtype):
    """1024 tokens x 50257 x 64: 103 MB of 16-bit logits, 206 MB of float32 ones, in 12 MiB."""
    batch = make_batch((16,) * 64, prompt=0, padding=0, hidden_size=64, vocab_size=50257)
    leaves = batch.to(dtype).leaves(wanted)
    loss = "slime" if operation == "slime_loss" else "token"
    plan = leaves.call(sf.explain_plan, loss=loss, workspace="12MiB", **WIDE)

    def step() -> None:
        out = leaves.call(getattr(sf, operation), backend="cpu", workspace="12MiB", **WIDE)
        if wanted:
            (out.loss if isinstance(out, sf.SlimeOutput) else out.sum()).backward()

    # oneDNN's own scratchpad of a bf16 product, and the float32 blocks of the head, where no accumulator has room.
    own = (1 << 20) * torch.get_num_threads() + (0 if plan.accumulator_bytes else WEIGHT_GRAD_BLOCK_BYTES)
    gradients = sum(x.numel() * x.element_size() for n, x in leaves.tensors().items() if n in wanted)
    assert plan.workspace_bytes <= parse_bytes("12MiB")
    allowed = gradients + 1.05 * parse_bytes("12MiB") + plan.scratch_bytes + plan.accumulator_bytes + own
    peak, _ = memory_of(step)
    assert peak <= allowed + 32 * 8 * 1024, f"{peak / 2**20:.1f} MiB, allowed {allowed / 2**20:.1f} MiB\n{plan}"


def problem_of(rows: int, **options: Any) -> Problem:
    flags = {"want_hidden": True, "want_weight": True, "want_bias": False, **options}
    return Problem("token", rows, 4096, 128_255, 2, logits_itemsize=4, **flags)


def test_what_the_plan_holds():
    """A chunk fits its budget with its float32 block, one row more does not, and blocks end at 512 rows."""
    for budget in (parse_bytes("5MiB"), parse_bytes("100MiB"), parse_bytes("1GiB"), parse_bytes("20GiB")):
        problem = problem_of(1_000_000)
        plan = make_plan(problem, budget)
        capacity = problem.rows_within(budget)
        assert plan.chunk_rows <= capacity
        assert plan.workspace_bytes <= budget < problem.buffer_bytes(capacity + 1)
        pitch = 128_256
        assert plan.workspace_bytes == 2 * pitch * plan.chunk_rows + 4 * pitch * plan.logits_rows
        assert plan.logits_rows == min(WIDE_LOGITS_ROWS, -(-plan.chunk_rows // 4))
    evaluation = problem_of(1_000_000, want_hidden=False, want_weight=False)
    plan = make_plan(evaluation, parse_bytes("1GiB"))
    assert plan.logits_rows == plan.chunk_rows
    assert plan.workspace_bytes == 4 * 128_256 * plan.chunk_rows
    with pytest.raises(ValueError, match=f"workspace: expected at least {6 * 128_256} bytes"):
        make_plan(problem_of(10), 6 * 128_256 - 1)


def test_explain_plan_says_what_it_costs():
    batch = make_batch(dtype=torch.bfloat16).leaves()
    rounded: Plan = batch.call(sf.explain_plan)
    wide: Plan = batch.call(sf.explain_plan, **WIDE)
    assert "float32" not in str(rounded)
    (line,) = [line for line in str(wide).splitlines() if line.startswith("logits ")]
    assert f"{wide.logits_rows} rows at once" in line
    assert "in 4 bytes each instead of 2" in line
    assert wide.workspace_bytes > rounded.workspace_bytes
    assert wide.flops == rounded.flops


def test_the_dtype_of_the_operands_is_the_default(backend):
    for dtype in (*HALVES, torch.float32, torch.float64):
        batch = make_batch(dtype=dtype)
        named = run(sf.slime_loss, batch, backend=backend, logits_dtype=dtype)
        default = run(sf.slime_loss, batch, backend=backend)
        assert named.outputs["loss"] == default.outputs["loss"]
        assert batch.call(sf.explain_plan, logits_dtype=dtype) == batch.call(sf.explain_plan)


@pytest.mark.parametrize(
    "name", ["slime_loss", "linear_logprobs", "sequence_logprobs", "linear_cross_entropy", "explain_plan"]
)
def test_refusals(name):
    function = getattr(sf, name)
    for dtype, logits_dtype in (
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.int32),
    ):
        with pytest.raises(ValueError, match=rf"logits_dtype: expected None, .*{dtype}.*, got {logits_dtype}"):
            make_batch(dtype=dtype).call(function, logits_dtype=logits_dtype)
    with pytest.raises(TypeError, match=r"logits_dtype: expected None or a torch\.dtype, got 'float32'"):
        make_batch(dtype=torch.bfloat16).call(function, logits_dtype="float32")


def test_modules_and_compiled_graphs_take_it(dtype):
    batch = make_batch((6, 7, 5, 4), vocab_size=301, dtype=dtype, spread=30.0, has_bias=True)
    expected = run(sf.slime_loss, batch, **WIDE)
    compiled = torch.compile(sf.slime_loss, fullgraph=True, backend="aot_eager")
    for function, options in ((sf.SlimeLoss(**WIDE), {}), (compiled, WIDE)):
        got = run(function, batch, **options)
        assert got.outputs["loss"] == expected.outputs["loss"]
        for name, grad in expected.grads.items():
            assert_close(name, got.grads[name], grad, grad.double(), floor_of(dtype))
    got = run(torch.compile(sf.linear_logprobs, fullgraph=True, backend="aot_eager"), batch, **WIDE)
    expected = run(sf.linear_logprobs, batch, **WIDE)
    assert torch.equal(got.outputs["value"], expected.outputs["value"])
    for name, grad in expected.grads.items():
        assert_close(name, got.grads[name], grad, grad.double(), floor_of(dtype))


def test_the_table_of_errors(monkeypatch, backend):
    """`python -m bench.precision`: rounded logits err by more than float32 ones in every column."""
    for name, size in (("TOKENS", 48), ("HIDDEN", 32), ("VOCAB", 301)):
        monkeypatch.setattr(precision, name, size)
    rows = precision.render(HALVES, (30.0,), backend).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:3] for row in cells] == [
        ["bfloat16", "30", "bfloat16"],
        ["bfloat16", "30", "float32"],
        ["float16", "30", "float16"],
        ["float16", "30", "float32"],
    ]
    for rounded, wide in zip(cells[::2], cells[1::2], strict=True):
        assert all(float(a) > 2 * float(b) for a, b in zip(rounded[3:], wide[3:], strict=True))
        assert float(rounded[3]) > 100 * float(wide[3])
