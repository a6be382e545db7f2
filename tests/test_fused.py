"""The "fused" plan against the float64 oracle: every public function, gradient, dtype and feature; its cost.

Vocabularies are odd and three blocks of columns wide, the last of them short; rows are few, so that the workspace
that holds a block of all of them holds no pair.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import slime_fused as sf
import slime_fused.backends as registry
import slime_fused.engine.plan as planner
from slime_fused import reference
from slime_fused.backends.base import LinearStatsBackend
from slime_fused.engine import products, vocab_sweep
from slime_fused.engine.plan import FUSED_LEAST_COLS, WEIGHT_GRAD_BLOCK_BYTES, Plan
from tests.linear_stats_backend import TorchWithLinearStats, linear_stats_backend  # noqa: F401
from tests.measure import memory_of
from tests.support import DTYPES, Batch, assert_as_exact_as_plain, make_batch, pack, run
from tests.test_properties import assert_same, cases

VOCAB = 2 * FUSED_LEAST_COLS + 133
LENGTHS = (9, 12, 14, 11)
"""Two pairs, of 23 rows each: the least workspace of a block holds 18."""

SIMPO, KTO = sf.losses.SimPO(), sf.losses.KTO(baseline="batch")
FUNCTIONS = {
    # name -> (function, options, operation)
    "simpo": ("preference_loss", {"loss": SIMPO}, SIMPO),
    "kto_batch": (
        "preference_loss",
        {
            "loss": KTO,
            "ref_sum_logps": torch.tensor([-60.0, -75.0, -90.0, -70.0], dtype=torch.float64),
            "desirable": torch.tensor([True, False, False, True]),
        },
        KTO,
    ),
    "slime": ("slime_loss", {}, "slime"),
    "slime_token": ("slime_loss", {"config": sf.SlimeLossConfig(stabilizer_reduction="token")}, "slime"),
    "ce_mean": ("linear_cross_entropy", {"reduction": "mean"}, "cross_entropy"),
    "ce_smooth_z_sum": (
        "linear_cross_entropy",
        {"reduction": "sum", "label_smoothing": 0.2, "z_loss": 0.01},
        "cross_entropy",
    ),
    "ce_smooth_none": ("linear_cross_entropy", {"reduction": "none", "label_smoothing": 0.2}, "token"),
    "logprobs": ("linear_logprobs", {}, "token"),
    "sequence": ("sequence_logprobs", {"reduction": "mean"}, "token"),
}
HEADS = {
    "plain": ({}, {}),
    "softcap": ({"spread": 6.0}, {"logit_softcap": 5.0}),
    "scale": ({}, {"logit_scale": 0.25}),
    "every_row_labelled": ({"lengths": (11,) * 4, "prompt": 0, "padding": 0, "has_bias": True}, {}),
    "all": (
        {"has_bias": True, "ignore_index": 3},
        {"logit_scale": 1.5, "logit_softcap": 8.0, "shift": True},
    ),
}
WANTED = [("hidden", "weight"), ("weight",), ("weight", "bias"), ("hidden", "weight", "bias")]


@pytest.fixture
def backend(linear_stats_backend) -> LinearStatsBackend:  # noqa: F811
    return linear_stats_backend


def fused_workspace(batch: Batch, operation: str, backend: LinearStatsBackend, **options) -> tuple[int, Plan]:
    """(bytes, plan) of a call that takes "fused", with the least block of columns; asserts that it does."""
    options = {"loss": operation, "backend": backend.name, **options}
    problem = batch.call(sf.explain_plan, workspace="1GiB", **options).problem
    workspace = max(problem.rows * FUSED_LEAST_COLS * problem.itemsize, problem.row_bytes)
    plan = batch.call(sf.explain_plan, workspace=workspace, **options)
    assert plan.kind == "fused", plan
    assert plan.workspace_bytes <= workspace
    return workspace, plan


def head_options(options: dict) -> dict:
    return {k: v for k, v in options.items() if k in ("shift", "logit_scale", "logit_softcap")}


def check(name: str, batch: Batch, backend: LinearStatsBackend, options: dict, *, wanted=None, **how) -> Plan:
    function, own, operation = FUNCTIONS[name]
    wanted = wanted or tuple(batch.tensors())
    workspace, plan = fused_workspace(batch.leaves(wanted), operation, backend, **head_options(options))
    before = backend.calls
    # float32 sums here are ten times as long as those that the floor was made for, and in another order than plain.
    how.setdefault("roundings", 2 if batch.hidden.dtype == torch.float32 else 1)
    assert_as_exact_as_plain(
        getattr(sf, function),
        getattr(reference, function),
        batch,
        options={**own, **options},
        wanted=wanted,
        backend=backend.name,
        workspace=workspace,
        **how,
    )
    assert backend.calls - before == len(plan.chunks), "the statistics come from linear_stats"
    return plan


def planned(names, dtypes):
    """(name, dtype) pairs that have a "fused" plan: a wide cross-entropy streams chunks of any size."""
    return [
        pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}")
        for name in names
        for dtype in dtypes
        if FUNCTIONS[name][2] != "cross_entropy" or dtype.itemsize < 4
    ]


@pytest.mark.parametrize(("name", "dtype"), planned(FUNCTIONS, DTYPES))
@pytest.mark.parametrize(("head", "layout"), [*((head, "padded") for head in HEADS), ("all", "packed")])
def test_values_and_gradients(name, head, layout, dtype, backend):
    batch_options, options = HEADS[head]
    batch = make_batch(**{"lengths": LENGTHS, "vocab_size": VOCAB, "dtype": dtype, **batch_options})
    plan = check(name, pack(batch) if layout == "packed" else batch, backend, options)
    assert plan.blocks == 3


@pytest.mark.parametrize(("name", "dtype"), planned(FUNCTIONS, [torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
def test_wanted_gradients(name, wanted, dtype, backend):
    batch = make_batch(LENGTHS, vocab_size=VOCAB, dtype=dtype, has_bias=True)
    plan = check(name, batch, backend, {}, wanted=wanted)
    assert plan.products == 2 + ("hidden" in wanted) + ("weight" in wanted)


@pytest.mark.parametrize("wanted", [("bias",), ("hidden", "bias")], ids="+".join)
@pytest.mark.parametrize("name", ["slime", "logprobs", "ce_smooth_none"])
def test_bias_without_weight(name, wanted, backend):
    check(name, make_batch(LENGTHS, vocab_size=VOCAB, has_bias=True), backend, {}, wanted=wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_evaluation(name, dtype, backend):
    """One launch for the statistics, and no logits: the same numbers as with all logits at once."""
    function, own, operation = FUNCTIONS[name]
    batch = make_batch(LENGTHS, vocab_size=VOCAB, dtype=dtype, has_bias=True)
    workspace, plan = fused_workspace(batch, operation, backend)
    assert (plan.products, plan.block_cols) == (1, 0)
    options = {**own, "backend": backend.name}
    got = run(getattr(sf, function), batch, wanted=(), workspace=workspace, **options)
    assert backend.calls == len(plan.chunks)
    whole = run(getattr(sf, function), batch, wanted=(), workspace="1GiB", **options)
    exact = run(getattr(reference, function), batch.to(torch.float64), wanted=(), **own)
    assert backend.calls == len(plan.chunks)
    for key, value in got.outputs.items():
        eps = 8 * torch.finfo(torch.float32 if dtype.itemsize < 8 else dtype).eps
        # In 16 bits a product may round the other way where it is summed in another order.
        eps = max(eps, torch.finfo(dtype).eps / 4)
        scale = exact.outputs[key].abs().max().clamp(min=1)
        assert (value - whole.outputs[key]).abs().max() <= eps * scale, key


def test_several_launches_for_the_statistics(backend):
    """A workspace that holds the partial statistics of some rows only."""
    batch = make_batch((30, 40, 50, 60), vocab_size=VOCAB)
    workspace = batch.call(sf.explain_plan, backend=backend.name).problem.row_bytes
    plan = batch.call(sf.explain_plan, backend=backend.name, workspace=workspace)
    assert plan.kind == "fused"
    problem = replace(plan.problem, linear_stats_row_bytes=plan.problem.row_bytes // 7)
    assert problem.has_linear_stats
    backend.linear_stats_row_bytes = lambda weight, **_: problem.linear_stats_row_bytes
    plan = batch.call(sf.explain_plan, backend=backend.name, workspace=workspace)
    assert len(plan.chunks) == -(-180 // 7)
    assert_as_exact_as_plain(
        sf.slime_loss, reference.slime_loss, batch, options={}, wanted=(), backend=backend.name, workspace=workspace
    )
    assert backend.calls == len(plan.chunks)


@pytest.mark.parametrize("name", ["slime", "logprobs", "sequence", "ce_mean"])
def test_kept_graph_gives_the_same_gradients_again(name, backend):
    function, own, operation = FUNCTIONS[name]
    dtype = torch.bfloat16 if operation == "cross_entropy" else torch.float64
    batch = make_batch(LENGTHS, vocab_size=VOCAB, has_bias=True, dtype=dtype).leaves()
    workspace, _ = fused_workspace(batch, operation, backend)
    out = batch.call(getattr(sf, function), backend=backend.name, workspace=workspace, **own)
    loss = out.loss if isinstance(out, sf.SlimeOutput) else out.square().sum()
    inputs = list(batch.tensors().values())
    first = [g.clone() for g in torch.autograd.grad(loss, inputs, retain_graph=True)]
    second = torch.autograd.grad(loss, inputs, torch.tensor(4.0, dtype=loss.dtype), retain_graph=True)
    third = torch.autograd.grad(loss, inputs)
    for key, a, b, c in zip(batch.tensors(), first, second, third, strict=True):
        torch.testing.assert_close(b, 4 * a, msg=key)
        assert torch.equal(a, c), key
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("changed", ["hidden", "weight", "bias"])
def test_a_change_in_place_before_backward_is_noticed(changed, backend):
    batch = make_batch(LENGTHS, vocab_size=VOCAB, has_bias=True).leaves()
    workspace, _ = fused_workspace(batch, "token", backend)
    loss = batch.call(sf.linear_logprobs, backend=backend.name, workspace=workspace).sum()
    with torch.no_grad():
        getattr(batch, changed).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["slime", "logprobs"])
def test_what_ignored_rows_hold_does_not_matter(name, backend):
    function, own, operation = FUNCTIONS[name]
    batch = make_batch(LENGTHS, vocab_size=VOCAB)
    dirty = replace(batch, hidden=batch.hidden.masked_fill((batch.labels == -100)[..., None], torch.nan))
    workspace, _ = fused_workspace(batch.leaves(), operation, backend)
    options = {**own, "backend": backend.name, "workspace": workspace}
    clean, got = (run(getattr(sf, function), x, **options) for x in (batch, dirty))
    for key, value in clean.outputs.items():
        assert torch.equal(got.outputs[key], value), key
    for key, value in clean.grads.items():
        assert torch.equal(got.grads[key], value), key
    assert (got.grads["hidden"][batch.labels == -100] == 0).all()


@pytest.mark.parametrize("name", ["slime", "logprobs"])
def test_strides(name, backend):
    """Hidden states with strided columns are copied; a weight with strided columns takes a plan by rows."""
    function, own, operation = FUNCTIONS[name]
    batch = make_batch((11,) * 4, vocab_size=VOCAB, prompt=0, padding=0)
    workspace, _ = fused_workspace(batch.leaves(), operation, backend)
    options = {**own, "backend": backend.name, "workspace": workspace}
    expected = run(getattr(sf, function), batch, **options)
    turned = pack(batch, drop=0)
    turned = replace(turned, hidden=turned.hidden.T.contiguous().T)
    for odd, kind in (
        (turned, "fused"),
        (replace(batch, weight=batch.weight.T.contiguous().T), "resweep"),
        (replace(batch, weight=torch.repeat_interleave(batch.weight, 2, 0)[::2]), "fused"),
    ):
        plan = odd.leaves().call(sf.explain_plan, loss=operation, backend=backend.name, workspace=workspace)
        assert plan.kind == kind
        got = run(getattr(sf, function), odd, **options)
        for key, value in expected.outputs.items():
            torch.testing.assert_close(got.outputs[key].reshape(value.shape), value, msg=key)
        for key, value in expected.grads.items():
            torch.testing.assert_close(got.grads[key].reshape(value.shape), value, msg=key)


@pytest.mark.parametrize(
    ("name", "dtype"), planned(["slime", "logprobs", "ce_mean", "sequence"], [torch.float64, torch.bfloat16])
)
def test_in_a_compiled_graph(name, dtype, backend):
    function, own, operation = FUNCTIONS[name]
    batch = make_batch(LENGTHS, vocab_size=VOCAB, has_bias=True, dtype=dtype)
    workspace, _ = fused_workspace(batch.leaves(), operation, backend)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(sf, function), fullgraph=True, backend="aot_eager")
    options = {**own, "backend": backend.name, "workspace": workspace}
    for wanted in (("hidden", "weight", "bias"), ("weight",)):
        got, expected = (run(f, batch, wanted=wanted, **options) for f in (compiled, getattr(sf, function)))
        for key, value in expected.outputs.items():
            assert torch.equal(got.outputs[key], value), key
        for key, value in expected.grads.items():
            torch.testing.assert_close(got.grads[key], value, rtol=torch.finfo(dtype).eps, atol=0, msg=key)
    torch._dynamo.reset()


@pytest.mark.parametrize("spread", [2.0, 10.0])
def test_statistics_belong_to_the_logits_that_backward_forms(spread, backend):
    """The gradient of a row's logits sums to 0, also where a peaked row's logits round far from the product."""
    batch = make_batch(LENGTHS, vocab_size=VOCAB, dtype=torch.bfloat16, has_bias=True, spread=spread, seed=3)
    workspace, _ = fused_workspace(batch.leaves(), "slime", backend)
    truth = run(reference.slime_loss, batch.to(torch.float64)).grads
    fused, stream = (
        run(sf.slime_loss, batch, backend=backend.name, workspace=w).grads for w in (workspace, "1GiB")
    )
    assert fused["bias"].double().sum().abs() <= torch.finfo(torch.bfloat16).eps * truth["bias"].abs().max()
    for key, exact in truth.items():
        errors = [(x[key].double() - exact).norm() / exact.norm() for x in (fused, stream)]
        assert errors[0] <= 1.1 * errors[1], key


def test_float16_gradients_under_a_loss_scaler(backend):
    batch = make_batch((40, 50, 30, 45), vocab_size=VOCAB, dtype=torch.float16)
    batch = replace(batch, hidden=batch.hidden / 512, weight=batch.weight / 512)
    check("slime", batch, backend, {}, upstream=65536.0)


@pytest.mark.parametrize(
    ("name", "dtype"), planned(["slime", "logprobs", "ce_mean"], [torch.float32, torch.bfloat16])
)
@pytest.mark.parametrize("wanted", [(), ("weight",), ("hidden", "weight"), ("hidden", "weight", "bias")], ids=str)
@pytest.mark.parametrize("linear_stats_backend", ["cpu"], indirect=True)
def test_peak_memory(name, wanted, dtype, backend):
    """512 rows x 50257 x 256. A float32 dW would be 49 MiB, the bfloat16 logits as much: neither fits the bound."""
    function, own, operation = FUNCTIONS[name]
    batch = make_batch((64,) * 8, prompt=5, padding=3, hidden_size=256, vocab_size=50257, has_bias="bias" in wanted)
    leaves = batch.to(dtype).leaves(wanted)
    workspace = 6 << 20
    plan = leaves.call(sf.explain_plan, loss=operation, backend="cpu", workspace=workspace)
    assert plan.kind == "fused"

    def step() -> None:
        out = leaves.call(getattr(sf, function), backend="cpu", workspace=workspace, **own)
        if wanted:
            (out.loss if isinstance(out, sf.SlimeOutput) else out.sum()).backward()

    gradients = sum(x.numel() * x.element_size() for n, x in leaves.tensors().items() if n in wanted)
    # Vectors of rows and of the vocabulary; oneDNN's scratchpad of a bf16 product; the backend's own tile.
    vectors = 32 * 8 * plan.problem.rows + (8 * plan.problem.vocab_size if "bias" in wanted else 0)
    own_scratch = (1 << 20) * torch.get_num_threads() if dtype == torch.bfloat16 else 0
    own_scratch += 1 << 19
    if "bias" in wanted and dtype == torch.bfloat16:
        own_scratch += WEIGHT_GRAD_BLOCK_BYTES
    peak, _ = memory_of(step)
    allowed = gradients + plan.workspace_bytes + plan.scratch_bytes + vectors + own_scratch
    assert peak <= allowed, f"{peak / 2**20:.1f} MiB, allowed {allowed / 2**20:.1f} MiB\n{plan}"
    if wanted:
        assert peak >= plan.workspace_bytes + gradients, "the measurement sees less than must be there"
    logits = plan.problem.rows * plan.problem.row_bytes
    assert allowed - gradients < logits / 2, "the bound would not notice all logits at once"


def test_the_sweep_writes_the_weight_gradient_once_and_in_its_own_dtype(backend, monkeypatch):
    batch = make_batch(LENGTHS, vocab_size=VOCAB, dtype=torch.bfloat16)
    workspace, plan = fused_workspace(batch.leaves(), "slime", backend)
    written = []
    original = products.add_weight_grad

    def spy(d_weight, residual, scaled_hidden, *, is_first):
        written.append((d_weight.dtype, d_weight.shape[0], is_first))
        original(d_weight, residual, scaled_hidden, is_first=is_first)

    monkeypatch.setattr(vocab_sweep.products, "add_weight_grad", spy)
    run(sf.slime_loss, batch, backend=backend.name, workspace=workspace)
    assert [dtype for dtype, _, _ in written] == [torch.bfloat16] * plan.blocks
    assert all(is_first for _, _, is_first in written)
    assert sum(rows for _, rows, _ in written) == VOCAB


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(), name=st.sampled_from(["slime", "logprobs", "sequence"]), least=st.sampled_from([1, 3, 8]))
def test_any_layout_is_the_reference(case, name, least):
    """Labels in gaps, any number of rows, columns and bytes; blocks as narrow as ``least``."""
    function, own, operation = FUNCTIONS[name]
    backend = TorchWithLinearStats()
    options = {**own, "logit_softcap": case.softcap}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "get_backend", lambda _: backend)
        patch.setattr(planner, "FUSED_LEAST_COLS", least)
        patch.setattr(planner, "FUSED_COL_MULTIPLE", least)
        how = {"backend": "torch", "workspace": case.workspace}
        plan = case.batch.leaves().call(sf.explain_plan, loss=operation, logit_softcap=case.softcap, **how)
        event(f"{plan.kind}, {min(plan.blocks, 3)} blocks")
        got = run(getattr(sf, function), case.batch, **options, **how)
    assert (backend.calls > 0) == (plan.kind == "fused")
    assert_same(got, run(getattr(reference, function), case.batch, **options))


def test_explain_plan_says_fused_for_what_runs(backend):
    batch = make_batch(LENGTHS, vocab_size=VOCAB).leaves()
    _, plan = fused_workspace(batch, "slime", backend)
    assert plan.problem.linear_stats_row_bytes == 12 * 2
    assert "plan         fused: the largest pair has 23 rows, the workspace holds 18" in str(plan)
