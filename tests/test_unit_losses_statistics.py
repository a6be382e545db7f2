"""``return_stats`` of losses of pairs, sequences and tokens: what trainers log, from the pass that forms the loss.

Each plan of `tests.unit_loss_cases`: one chunk, several (a pair's rows are two spans), logits formed again; what is
told of a token comes out in its place, and loss, gradients and products are those without.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import slime_fused as sf
from slime_fused.autograd.token_losses import STATISTICS
from tests.linear_stats_backend import linear_stats_backend  # noqa: F401
from tests.measure import count_products
from tests.statistics_support import assert_told
from tests.support import BACKENDS, DTYPES, Batch, floor_of, make_batch, pack, require_backend
from tests.unit_loss_cases import CASES, options_of, plan_of

SOME = ("slime", "ipo", "kto_batch", "own_tokens", "own_sequences", "grpo", "gspo")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


def gradients(batch: Batch, name: str, **options) -> tuple[sf.PreferenceOutput | sf.PolicyOutput, list[Tensor]]:
    leaves = batch.leaves()
    out = leaves.call(CASES[name].fused, **options_of(CASES[name], batch), **options)
    return out, list(torch.autograd.grad(out.loss, list(leaves.tensors().values())))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ["one", "several", "least"])
@pytest.mark.parametrize("name", SOME)
def test_statistics(name, kind, dtype, backend):
    batch = make_batch(dtype=dtype, has_bias=True)
    batch = pack(batch) if kind == "several" else batch
    workspace, _ = plan_of(kind, batch.leaves(), CASES[name].value, backend=backend)
    how = {"temperature": 1.5, "backend": backend, "workspace": workspace}
    out, grads = gradients(batch, name, return_stats=STATISTICS, **how)
    assert_told(out.stats, batch, temperature=1.5)
    without, expected = gradients(batch, name, **how)
    assert without.stats is None
    # Where a residual is not formed in the same visit as its statistics, sums may be in another order.
    eps = 4 * floor_of(dtype)
    torch.testing.assert_close(out.loss, without.loss, rtol=eps, atol=eps)
    for got, grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=0, atol=eps * grad.abs().max().item())


@pytest.mark.parametrize("name", SOME)
def test_the_reference_tells_the_same(name):
    batch, case = make_batch(), CASES[name]
    options = options_of(case, batch) | {"return_stats": ("entropy", "is_top1")}
    got, expected = (batch.leaves().call(f, **options).stats for f in (case.fused, case.plain))
    assert got.lse is expected.lse is None
    for key in ("logps", "entropy", "is_top1"):
        assert not getattr(expected, key).requires_grad
        torch.testing.assert_close(getattr(got, key), getattr(expected, key), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["slime", "own_tokens", "grpo"])
def test_fused_plan(name, linear_stats_backend):  # noqa: F811
    batch = make_batch((9, 12, 14, 11), vocab_size=645, dtype=torch.bfloat16, has_bias=True)
    how = {"backend": linear_stats_backend.name, "workspace": 46 * 256 * 2}
    plan = batch.leaves().call(sf.explain_plan, loss=CASES[name].value, return_stats=STATISTICS, **how)
    assert plan.kind == "fused", plan
    out, _ = gradients(batch, name, return_stats=STATISTICS, **how)
    assert linear_stats_backend.calls == len(plan.chunks)
    assert_told(out.stats, batch)


@pytest.mark.parametrize("asked", [STATISTICS, ("lse",), ()], ids=len)
@pytest.mark.parametrize("name", ["slime", "grpo"])
def test_in_one_graph(name, asked):
    torch._dynamo.reset()
    case, batch = CASES[name], make_batch(has_bias=True)
    options = options_of(case, batch)
    compiled = torch.compile(
        lambda *a, **k: case.fused(*a, **k, **options, return_stats=asked), fullgraph=True, backend="aot_eager"
    )
    results = []
    for function in (compiled, lambda *a, **k: case.fused(*a, **k, **options, return_stats=asked)):
        leaves = batch.leaves()
        out = leaves.call(function)
        told = [x for x in vars(out.stats).values() if x is not None]
        assert len(told) == 1 + len(asked)
        results.append([out.loss.detach(), *told, *torch.autograd.grad(out.loss, list(leaves.tensors().values()))])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["slime", "kto_batch", "grpo"])
def test_no_product_more(name, backend):
    batch = make_batch(vocab_size=257, hidden_size=4)
    case, leaves = CASES[name], batch.leaves()
    for kind in ("one", "several", "least"):
        workspace, plan = plan_of(kind, leaves, case.value, return_stats=STATISTICS)
        assert plan.products == plan_of(kind, leaves, case.value)[1].products
        with count_products(vocab_size=257, hidden_size=4) as counted:
            gradients(batch, name, return_stats=STATISTICS, backend=backend, workspace=workspace)
        assert counted.flops == plan.flops


@pytest.mark.parametrize("name", ["slime", "grpo"])
def test_refusals(name):
    batch, case = make_batch(), CASES[name]
    with pytest.raises(ValueError, match=r"return_stats: expected names among .*got 'perplexity'"):
        batch.call(case.fused, return_stats=["perplexity"], **options_of(case, batch))
    with pytest.raises(TypeError, match=r"return_stats: expected a sequence of names"):
        batch.call(case.fused, return_stats="entropy", **options_of(case, batch))
