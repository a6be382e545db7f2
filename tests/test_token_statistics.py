"""``return_stats``: what `linear_logprobs` and `linear_cross_entropy` tell of each token, and entropy's gradient.

Truth is `slime_fused.reference` in float64, the tolerance that of `tests.support`. Kernels have a grid of their own
(`tests.moment_grid`); here every way through the engine meets them: logits kept for backward, formed again, formed
by blocks of the vocabulary, not needed again; gradients of log-prob, entropy, both, of some tensors alone.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import slime_fused as sf
from slime_fused import reference
from slime_fused.autograd.token_losses import STATISTICS
from slime_fused.backends.base import LinearStatsBackend
from slime_fused.engine.plan import FUSED_LEAST_COLS
from tests.linear_stats_backend import linear_stats_backend  # noqa: F401
from tests.statistics_support import (
    CE,
    HEAD,
    ROWS,
    USES,
    assert_as_exact,
    like_labels,
    plan_of,
    run,
    workspace_of,
)
from tests.support import BACKENDS, DTYPES, assert_close, floor_of, make_batch, pack, require_backend


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("use", USES)
def test_values_and_gradients(use, rows, dtype, backend):
    batch = make_batch((4, 3, 5), dtype=dtype, has_bias=True, ignore_index=3)
    workspace = workspace_of(ROWS[rows], batch)
    options = {**HEAD, "shift": True}
    how = {"use": USES[use], "backend": backend, "workspace": workspace}
    # An entropy of few nats changes with each logit, and every product rounds those of 16 bits in its own way.
    got = assert_as_exact(batch, options=options, roundings=2 if dtype.itemsize == 2 else 1, **how)
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
    assert_as_exact(batch, function="linear_cross_entropy", options=options, backend=backend, workspace=workspace)


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
    with pytest.raises(ValueError, match="return_stats: expected none for loss 'slime'"):
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
