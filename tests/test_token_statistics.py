"""``return_stats``: what `linear_logprobs` and `linear_cross_entropy` tell of each token, and the entropy's gradient.

Truth is `slime_fused.reference` in float64, the tolerance that of `tests.support`. Kernels have a grid of their own
(`tests.moment_grid`); here every way through the engine meets them: logits kept for backward, formed again, formed by
blocks of the vocabulary, not needed again; gradients of log-prob, entropy, both, of some tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

import slime_fused as sf
from slime_fused import reference
from slime_fused.autograd.functions import STATISTICS
from slime_fused.backends.base import LinearStatsBackend
from slime_fused.engine.plan import FUSED_LEAST_COLS, Plan
from tests.linear_stats_backend import linear_stats_backend  # noqa: F401
from tests.measure import count_products, memory_of
from tests.support import (
    BACKENDS,
    DTYPES,
    Batch,
    Result,
    assert_close,
    floor_of,
    make_batch,
    pack,
    require_backend,
)

ROWS = {"kept": 1000, "several": 7, "row_by_row": 1}
"""Rows that the workspace holds."""
USES = {"both": (1.0, 0.5), "logps": (1.0, None), "entropy": (None, -2.0), "mostly_entropy": (1e-3, 7.0)}
"""What the two are multiplied with on their way into a loss."""
ALL = ("hidden", "weight", "bias")
HEAD = {"logit_scale": 1.5, "logit_softcap": 8.0, "temperature": 0.7}
CE = {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.01}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


def like_labels(batch: Batch, factor: float) -> Tensor:
    """One coefficient per token, of both signs and with zeros."""
    values = torch.linspace(-2, 3, batch.labels.numel(), dtype=torch.float64).reshape(batch.labels.shape)
    return factor * values.where(values.abs() > 0.2, 0)


def run(
    function: Callable[..., sf.TokenStatistics],
    batch: Batch,
    *,
    use: tuple[float | None, float | None] = USES["both"],
    wanted: tuple[str, ...] = ALL,
    statistics: tuple[str, ...] = STATISTICS,
    **options: Any,
) -> Result:
    """Everything that a call tells, and the gradients of its losses and entropies times `like_labels`."""
    leaves = batch.leaves(wanted)
    out = leaves.call(function, return_stats=statistics, **options)
    own = "losses" if out.logps is None else "logps"
    outputs = {name: getattr(out, name) for name in (own, *statistics)}
    assert all(getattr(out, name) is None for name in {*STATISTICS, "logps", "losses"} - outputs.keys())
    for name, value in outputs.items():
        assert value.shape == batch.labels.shape
        assert value.dtype == torch.bool if name == "is_top1" else value.dtype in (torch.float32, torch.float64)
        assert not value.requires_grad or name in (own, "entropy"), name
    inputs = {name: x for name, x in leaves.tensors().items() if name in wanted}
    pairs = [(outputs.get(name), factor) for name, factor in zip((own, "entropy"), use, strict=True)]
    used = [(x, like_labels(batch, factor).to(x.dtype)) for x, factor in pairs if x is not None and factor]
    outcomes, coefficients = zip(*used, strict=True)
    grads = torch.autograd.grad(outcomes, list(inputs.values()), coefficients) if inputs else ()
    return Result({name: x.detach() for name, x in outputs.items()}, dict(zip(inputs, grads, strict=True)))


def assert_as_exact(
    batch: Batch,
    *,
    function: str = "linear_logprobs",
    options: dict[str, Any] | None = None,
    roundings: float = 1.0,
    call: Callable[..., Any] | None = None,
    **how: Any,
) -> Result:
    """As `tests.support.assert_as_exact_as_plain`; a rank may differ where rounding decides it."""
    options = options or {}
    both = {k: how[k] for k in ("use", "wanted", "statistics") if k in how}
    plain = getattr(reference, function)
    truth = run(plain, batch.to(torch.float64), **options, **both)
    naive = run(plain, batch, **options, **both)
    got = run(call or getattr(sf, function), batch, **options, **how)
    eps = roundings * floor_of(batch.hidden.dtype)
    for name, value in got.outputs.items():
        exact = truth.outputs[name]
        if name == "is_top1":
            assert torch.equal(value, exact) or batch.hidden.dtype.itemsize < 4
            assert (value != exact).sum() <= (naive.outputs[name] != exact).sum() + 1
        else:
            assert_close(name, value, naive.outputs[name], exact, eps, smallest=1.0)
    assert got.grads.keys() == truth.grads.keys()
    for name, grad in got.grads.items():
        assert grad.dtype == batch.tensors()[name].dtype
        assert_close(f"d_{name}", grad, naive.grads[name], truth.grads[name], eps)
    return got


def plan_of(batch: Batch, workspace: int | str, statistics: tuple[str, ...] = STATISTICS, **options: Any) -> Plan:
    return batch.call(sf.explain_plan, loss="token", workspace=workspace, return_stats=statistics, **options)


def workspace_of(rows: int, batch: Batch) -> int:
    return rows * plan_of(batch, "1GiB").problem.row_bytes


# --- values and gradients ---


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("use", USES)
def test_values_and_gradients(use, rows, dtype, backend):
    batch = make_batch((4, 3, 5), dtype=dtype, has_bias=True, ignore_index=3)
    workspace = workspace_of(ROWS[rows], batch)
    options = {**HEAD, "shift": True}
    got = assert_as_exact(batch, options=options, use=USES[use], backend=backend, workspace=workspace)
    ignored = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=3) == 3
    assert all((value[ignored] == 0).all() for value in got.outputs.values())
    plan = plan_of(batch.leaves(), workspace, backend=backend, **options)
    # All rows at once take no more than several and a float32 dW.
    is_kept = rows == "kept" or (rows == "several" and dtype == torch.bfloat16)
    assert plan.kind == ("stream" if is_kept else "resweep")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", ROWS)
def test_cross_entropy(rows, dtype, backend):
    batch = pack(make_batch((4, 3, 5), dtype=dtype, has_bias=True))
    options = {**HEAD, **CE}
    workspace = workspace_of(ROWS[rows], batch)
    assert_as_exact(
        batch, function="linear_cross_entropy", options=options, backend=backend, workspace=workspace
    )


@pytest.mark.parametrize("use", ["both", "entropy", "logps"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("function", ["linear_logprobs", "linear_cross_entropy"])
def test_fused_plan(function, dtype, use, linear_stats_backend: LinearStatsBackend):  # noqa: F811
    vocab = 2 * FUSED_LEAST_COLS + 133
    batch = make_batch((9, 12, 14, 11), vocab_size=vocab, dtype=dtype, has_bias=True)
    how = {"backend": linear_stats_backend.name}
    problem = plan_of(batch.leaves(), "1GiB", **how).problem
    workspace = max(problem.rows * FUSED_LEAST_COLS * problem.itemsize, problem.row_bytes)
    plan = plan_of(batch.leaves(), workspace, **how)
    assert (plan.kind, plan.blocks, plan.products) == ("fused", 3, 4), plan
    options = {**HEAD, **(CE if function == "linear_cross_entropy" else {})}
    assert_as_exact(
        batch,
        function=function,
        options=options,
        use=USES[use],
        workspace=workspace,
        roundings=2 if dtype == torch.float32 else 1,
        **how,
    )
    assert linear_stats_backend.calls == len(plan.chunks)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()], ids="+".join)
def test_wanted_gradients(wanted, rows, backend):
    batch = make_batch((4, 3, 5), has_bias=True)
    assert_as_exact(batch, wanted=wanted, backend=backend, workspace=workspace_of(ROWS[rows], batch))


@pytest.mark.parametrize("name", STATISTICS)
def test_one_statistic_alone(name, backend):
    batch = make_batch((4, 3, 5))
    for rows in (1000, 2):
        workspace = workspace_of(rows, batch)
        assert_as_exact(batch, statistics=(name,), backend=backend, workspace=workspace)
    with torch.no_grad():
        whole, few = (
            batch.call(sf.linear_logprobs, return_stats=[name], backend=backend, workspace=w)
            for w in ("1GiB", workspace_of(2, batch))
        )
    torch.testing.assert_close(getattr(few, name), getattr(whole, name), rtol=1e-13, atol=1e-14)
    assert not whole.logps.requires_grad


def test_log_probs_and_their_gradient_are_those_without_statistics(backend):
    """The entropy's way forms the residual in backward; the numbers are the same but for rounding."""
    batch = make_batch((4, 3, 5), has_bias=True)
    for rows in ROWS.values():
        workspace = workspace_of(rows, batch)
        leaves = batch.leaves()
        logps = leaves.call(sf.linear_logprobs, backend=backend, workspace=workspace)
        grads = torch.autograd.grad(logps, list(leaves.tensors().values()), like_labels(batch, 1.0))
        got = run(sf.linear_logprobs, batch, use=USES["logps"], backend=backend, workspace=workspace)
        torch.testing.assert_close(got.outputs["logps"], logps.detach(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(tuple(got.grads.values()), grads, rtol=1e-12, atol=1e-14)


def test_neither_used(backend):
    leaves = make_batch((4, 3)).leaves()
    out = leaves.call(sf.linear_logprobs, return_stats=STATISTICS, backend=backend)
    other = (leaves.hidden.sum() + 0 * out.mean_logit.sum()).backward()
    assert other is None
    assert leaves.weight.grad is None


def test_names():
    batch = make_batch((4, 3))
    none = batch.call(sf.linear_logprobs, return_stats=())
    assert isinstance(none, sf.TokenStatistics)
    assert torch.equal(none.logps, batch.call(sf.linear_logprobs))
    twice = batch.call(sf.linear_logprobs, return_stats=["lse", "is_top1", "lse"])
    assert twice.entropy is None
    assert twice.lse is not None
    for names, error in (("entropy", TypeError), (3, TypeError), (["entropy", "perplexity"], ValueError)):
        for function in (sf.linear_logprobs, sf.linear_cross_entropy, sf.explain_plan):
            with pytest.raises(error, match=r"return_stats: expected .*'entropy', 'mean_logit'.*got"):
                batch.call(function, return_stats=names)
    with pytest.raises(ValueError, match='return_stats: expected none unless reduction is "none"'):
        batch.call(sf.linear_cross_entropy, return_stats=["lse"])
    with pytest.raises(ValueError, match='return_stats: expected none unless loss is "token"'):
        batch.call(sf.explain_plan, return_stats=["lse"])


# --- layouts and dtypes ---


@pytest.mark.parametrize("layout", ["token_layout", "packed", "any_shape", "every_row", "no_label", "one_row"])
def test_layouts(layout, backend):
    batch = make_batch((4, 4, 4, 4), prompt=0, padding=0) if layout == "every_row" else make_batch((4, 3, 5, 2))
    call = sf.linear_logprobs
    if layout == "packed":
        batch = pack(batch)
    elif layout == "any_shape":
        batch = replace(batch, hidden=batch.hidden.unflatten(0, (2, 2)), labels=batch.labels.unflatten(0, (2, 2)))
    elif layout == "no_label":
        batch = replace(batch, labels=torch.full_like(batch.labels, -100))
    elif layout == "one_row":
        batch = replace(batch, hidden=batch.hidden[0, 3:4], labels=batch.labels[0, 3:4])
    elif layout == "token_layout":
        known = sf.token_layout(batch.labels)

        def call(hidden, weight, labels, *, bias, cu_seqlens, **options):
            return sf.linear_logprobs(hidden, weight, known, bias=bias, **options)

    for rows in ROWS.values():
        workspace = workspace_of(rows, batch)
        assert_as_exact(batch, call=call, wanted=("hidden", "weight"), backend=backend, workspace=workspace)


@pytest.mark.parametrize("rows", ["kept", "several"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_float32_logits(dtype, rows, backend):
    """Statistics of logits of about 100 err by float32 arithmetic alone; rounded logits would err by 0.1."""
    batch = make_batch((4, 3, 5), dtype=dtype, has_bias=True, spread=30.0)
    options = {"logits_dtype": torch.float32, "temperature": 4.0}
    workspace = workspace_of(ROWS[rows], batch)
    got = assert_as_exact(batch, options=options, backend=backend, workspace=workspace)
    exact = run(reference.linear_logprobs, batch.to(torch.float64), temperature=4.0).outputs
    for name, value in got.outputs.items():
        assert (value.double() - exact[name].double()).abs().max() <= 2e-6 * exact[name].double().abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_autocast(dtype, backend):
    """The head is cast, gradients come in float32."""
    batch = make_batch((4, 3, 5), dtype=torch.float32, has_bias=True)
    for rows in ROWS.values():
        workspace = workspace_of(rows, batch)
        with torch.autocast("cpu", dtype):
            got = run(sf.linear_logprobs, batch, backend=backend, workspace=workspace)
            plain = run(reference.linear_logprobs, batch)
        truth = run(reference.linear_logprobs, batch.to(torch.float64))
        for name, value in got.outputs.items():
            if name != "is_top1":
                assert_close(name, value, plain.outputs[name], truth.outputs[name], floor_of(dtype), smallest=1.0)
        for name, grad in got.grads.items():
            assert grad.dtype == torch.float32
            assert_close(name, grad, plain.grads[name], truth.grads[name], floor_of(dtype))


@pytest.mark.parametrize("factor", [2.0**-14, 1.0, 2.0**12])
@pytest.mark.parametrize("rows", ROWS)
def test_float16_under_any_factor(rows, factor, backend):
    """Coefficients at both ends of float16: a mean over thousands of tokens, and a loss scaler's."""
    batch = make_batch((4, 3, 5), dtype=torch.float16, has_bias=True)
    use = (factor, -0.5 * factor)
    assert_as_exact(batch, use=use, backend=backend, workspace=workspace_of(ROWS[rows], batch))


@pytest.mark.parametrize("spread", [2e-3, 40.0])
def test_float16_entropies_at_the_edge(spread, backend):
    """Nearly uniform and nearly certain rows of 5001 tokens: d(entropy)/dz is far below float16's least number.

    Each of the largest rows of dW for itself, under a loss scaler that lifts them to ordinary numbers.
    """
    batch = make_batch((16, 16), hidden_size=8, vocab_size=5001, prompt=0, padding=0, spread=spread)
    batch = batch.to(torch.float16)
    how = {"use": (None, 1024.0), "statistics": ("entropy",), "wanted": ("hidden", "weight")}
    truth = run(reference.linear_logprobs, batch.to(torch.float64), **how)
    naive = run(reference.linear_logprobs, batch, **how)
    for workspace in ("1GiB", 9 * 5008 * 2):
        got = run(sf.linear_logprobs, batch, backend=backend, workspace=workspace, **how)
        for name, exact in truth.grads.items():
            exact = exact.flatten(0, -2)
            seen = exact.norm(dim=1) > 1e-3
            assert seen.any()
            errors = [
                ((x.double().flatten(0, -2) - exact).norm(dim=1) / exact.norm(dim=1))[seen]
                for x in (got.grads[name], naive.grads[name])
            ]
            assert errors[0].median() <= errors[1].median() + 2 * torch.finfo(torch.float16).eps, name


# --- logits that are hard ---


def exact_batch(logits: list[list[float]], labels: list[int], dtype: torch.dtype) -> Batch:
    """Logits that no product rounds, where the dtype holds them: row n is column n of the weight."""
    values = torch.tensor(logits, dtype=torch.float64)
    return Batch(torch.eye(len(logits), dtype=dtype), values.t().contiguous().to(dtype), torch.tensor(labels))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_first_of_equal_maxima_is_the_likeliest(dtype, backend):
    logits = [[1.0, 7.0, 7.0, 0.0]] * 4 + [[2.0, 2.0, 2.0, 2.0]] * 2 + [[-1.0, -2.0, -1.0, -3.0]]
    batch = exact_batch(logits, [1, 2, 0, -100, 0, 3, 2], dtype)
    for options in ({}, {"logit_scale": 0.3, "logit_softcap": 5.0, "temperature": 3.0}):
        out = batch.call(sf.linear_logprobs, return_stats=["is_top1"], backend=backend, **options)
        assert out.is_top1.tolist() == [True, False, False, False, True, False, False]
    negative = batch.call(sf.linear_logprobs, return_stats=["is_top1"], backend=backend, logit_scale=-1.0)
    assert negative.is_top1.tolist() == [False, False, False, False, True, False, False]


@pytest.mark.parametrize("rows", [1000, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_tokens_of_no_probability(dtype, rows, backend):
    """p log p is 0 where a bias of -inf makes p 0: values and gradients as with the others alone."""
    batch = make_batch((4, 3, 5), dtype=dtype)
    is_out = torch.arange(37) % 3 == 1
    labels = torch.where(batch.labels % 3 == 1, batch.labels - 1, batch.labels).where(batch.labels >= 0, -100)
    bias = torch.zeros(37, dtype=dtype).masked_fill(is_out, -torch.inf)
    masked = replace(batch, labels=labels, bias=bias)
    wanted = ("hidden", "weight")
    names = ("entropy", "sum_sq_probs", "is_top1", "lse")
    workspace = workspace_of(rows, masked)
    got = assert_as_exact(masked, wanted=wanted, statistics=names, backend=backend, workspace=workspace)
    assert (got.grads["weight"][is_out] == 0).all()
    told = masked.call(sf.linear_logprobs, return_stats=["mean_logit"], backend=backend).mean_logit
    assert (told[labels >= 0] == -torch.inf).all()


def test_a_row_of_nothing(backend):
    """All logits -inf: not a number, as in PyTorch, and log-sum-exp of nothing is -inf."""
    batch = replace(make_batch((2, 1)), bias=torch.full((37,), -torch.inf, dtype=torch.float64))
    got, plain = (
        batch.call(f, return_stats=["lse", "entropy"], **how)
        for f, how in ((sf.linear_logprobs, {"backend": backend}), (reference.linear_logprobs, {}))
    )
    assert torch.equal(got.lse, plain.lse)
    assert got.entropy.isnan().sum() == got.logps.isnan().sum() == plain.entropy.isnan().sum() == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_logits_of_fifty_thousand(dtype, backend):
    """Sums of e^z z would cancel; nothing is lost where they are formed from differences to the maximum."""
    high = 49152.0  # whose neighbours in bfloat16 are 256 apart
    logits = [
        [high, high, high, high - 256],
        [high - 256, high, -high, 0.0],
        [-high, -high, -high, -high],
        [high, -high, 0.0, 1.0],
        [high, high - 1, high - 3, high - 4],
    ]
    batch = exact_batch(logits, [0, 0, 1, 0, 1], dtype)
    # In 16 bits the last row's logits are equal, and all that is left of a gradient is rounding.
    wanted = ("hidden", "weight") if dtype.itemsize > 2 else ()
    got = assert_as_exact(batch, wanted=wanted, backend=backend)
    entropy = got.outputs["entropy"].double()
    expected = torch.tensor([log(3), 0.0, log(4), 0.0], dtype=torch.float64)
    torch.testing.assert_close(entropy[:4], expected, rtol=1e-6, atol=1e-6)
    assert 0.7 < entropy[4] < log(4) + 1e-6


HARD = {
    "cold": {"temperature": 0.01},
    "hot": {"temperature": 100.0, "logit_softcap": 3.0},
    "zero": {"logit_scale": 0.0},
    "negative": {"logit_scale": -0.7, "logit_softcap": 5.0},
}


@pytest.mark.parametrize("rows", [1000, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", HARD)
def test_transforms_at_their_ends(case, dtype, rows, backend):
    """Logits a hundred times as large or as small; all the same; in the other order."""
    batch = make_batch((4, 3, 5), dtype=dtype, has_bias=True)
    # A logit rounded to float16 is one of 200 here: a cold softmax decides by its last bits.
    roundings = 200 if case == "cold" else 2
    got = assert_as_exact(
        batch, options=HARD[case], roundings=roundings, backend=backend, workspace=workspace_of(rows, batch)
    )
    if case == "zero":
        assert all((grad == 0).all() for grad in got.grads.values())
        labelled = batch.labels >= 0
        expected = torch.full((12,), log(37), dtype=torch.float64)
        torch.testing.assert_close(got.outputs["entropy"][labelled].double(), expected, rtol=1e-6, atol=0)
        assert torch.equal(got.outputs["is_top1"], batch.labels == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_one_column(dtype, backend):
    got = assert_as_exact(make_batch((4, 3), vocab_size=1, dtype=dtype, has_bias=True), backend=backend)
    assert all((grad == 0).all() for grad in got.grads.values())
    assert got.outputs["is_top1"].sum() == 7


# --- the graph ---


@pytest.mark.parametrize("how", ["expanded", "negated", "strided"])
@pytest.mark.parametrize("rows", ROWS)
def test_upstream_of_any_layout(rows, how, backend):
    batch = make_batch((4, 3, 5))
    shape = batch.labels.shape
    given = {
        "expanded": torch.tensor([[0.7]], dtype=torch.float64).expand(shape),
        "negated": torch.complex(*torch.randn(2, *shape, dtype=torch.float64)).conj().imag,
        "strided": torch.randn(*shape[::-1], dtype=torch.float64).t(),
    }[how]
    results = []
    for function in (sf, reference):
        leaves = batch.leaves()
        options = {"backend": backend, "workspace": workspace_of(ROWS[rows], batch), "return_stats": ["entropy"]}
        out = leaves.call(function.linear_logprobs, **options)
        results.append(torch.autograd.grad([out.logps, out.entropy], [leaves.hidden, leaves.weight], [given] * 2))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("statistics", [STATISTICS, ("is_top1",)], ids=["entropy", "without"])
@pytest.mark.parametrize("rows", ROWS)
def test_kept_graph(rows, statistics, backend):
    """Twice with another coefficient, then once more without keeping it, then never again."""
    leaves = make_batch((4, 3, 5), has_bias=True).leaves()
    workspace = workspace_of(ROWS[rows], leaves)
    out = leaves.call(sf.linear_logprobs, return_stats=statistics, backend=backend, workspace=workspace)
    loss = out.logps.square().sum() + (0 if out.entropy is None else (out.entropy * leaves.labels).sum())
    inputs = list(leaves.tensors().values())
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, torch.tensor(4.0, dtype=torch.float64), retain_graph=True)
    third = torch.autograd.grad(loss, inputs)
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(b, 4 * a, rtol=1e-13, atol=1e-14)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("changed", ALL)
@pytest.mark.parametrize("rows", ROWS)
def test_a_change_in_place_before_backward_is_noticed(rows, changed, backend):
    leaves = make_batch((4, 3, 5), has_bias=True).leaves()
    workspace = workspace_of(ROWS[rows], leaves)
    out = leaves.call(sf.linear_logprobs, return_stats=["entropy"], backend=backend, workspace=workspace)
    with torch.no_grad():
        getattr(leaves, changed).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.entropy.sum().backward()


def test_a_second_derivative_is_refused(backend):
    leaves = make_batch((4, 3)).leaves()
    entropy = leaves.call(sf.linear_logprobs, return_stats=["entropy"], backend=backend).entropy
    with pytest.raises(RuntimeError, match="not twice differentiable"):
        torch.autograd.grad(entropy.square().sum(), [leaves.weight], create_graph=True)


# --- cost ---

WANTED = {"all": ("hidden", "weight"), "frozen_head": ("hidden",), "frozen_hidden": ("weight",), "none": ()}


@pytest.mark.parametrize("statistics", [STATISTICS, STATISTICS[1:]], ids=["entropy", "without"])
@pytest.mark.parametrize("rows", ["kept", "several"])
@pytest.mark.parametrize("wanted", WANTED)
def test_products(wanted, rows, statistics, backend):
    """The entropy takes 3 where the logits fit (2 with a frozen head), else 4 (3); other statistics take none."""
    batch = make_batch((4, 3, 5), hidden_size=6, vocab_size=31)
    leaves = batch.leaves(WANTED[wanted])
    workspace = workspace_of(ROWS[rows], leaves)
    plan = plan_of(leaves, workspace, statistics, backend=backend)
    if "entropy" not in statistics:
        without = leaves.call(sf.explain_plan, loss="token", workspace=workspace, backend=backend)
        assert plan.products == without.products
    else:
        assert ("per-token losses and entropies: 12 labelled rows" in str(plan)) and plan.problem.mixes_entropy
        again = 1 if rows == "several" and WANTED[wanted] else 0
        assert plan.products == 1 + len(WANTED[wanted]) + again
    for keeps in (False, True):
        out = None
        with count_products(vocab_size=31, hidden_size=6) as counted:
            out = leaves.call(sf.linear_logprobs, return_stats=statistics, backend=backend, workspace=workspace)
            if WANTED[wanted]:
                loss = out.logps.sum() + (0 if out.entropy is None else out.entropy.sum())
                loss.backward(retain_graph=keeps)
        assert counted.flops == plan.flops
        assert counted.largest_rows <= plan.chunk_rows


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("rows", ["kept", "several"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_peak_memory(dtype, rows, wanted):
    """192 rows x 20011 x 64: the logits of all are 15 (bfloat16: 8) MB, of "several" a sixth; and no second copy."""
    batch = make_batch((24,) * 8, prompt=3, padding=1, hidden_size=64, vocab_size=20011)
    leaves = batch.to(dtype).leaves(WANTED[wanted])
    workspace = workspace_of({"kept": 192, "several": 32}[rows], leaves)
    plan = plan_of(leaves, workspace, backend="cpu")
    assert len(plan.chunks) == {"kept": 1, "several": 6}[rows]

    def step() -> None:
        out = leaves.call(sf.linear_logprobs, return_stats=STATISTICS, backend="cpu", workspace=workspace)
        if WANTED[wanted]:
            (out.logps.sum() + out.entropy.sum()).backward()

    gradients = sum(x.numel() * x.element_size() for n, x in leaves.tensors().items() if n in WANTED[wanted])
    vectors = 64 * 8 * batch.labels.numel()
    own_scratch = (1 << 20) * (1 + torch.get_num_threads())
    peak, _ = memory_of(step)
    hidden_rows = 3 * batch.hidden.numel() * 4
    allowed = gradients + plan.logits_bytes + plan.scratch_bytes + hidden_rows + vectors + own_scratch
    assert plan.workspace_bytes <= peak <= allowed, f"{peak / 2**20:.1f} of {allowed / 2**20:.1f} MiB\n{plan}"
    assert allowed < plan.workspace_bytes * 2 + gradients + plan.accumulator_bytes or rows == "several"
