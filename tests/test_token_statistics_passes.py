"""Token statistics in autograd's graph, and what they cost: products and memory."""

from __future__ import annotations

import pytest
import torch

import slime_fused as sf
from slime_fused import reference
from slime_fused.autograd.token_losses import STATISTICS
from tests.measure import count_products, memory_of
from tests.statistics_support import (
    ALL,
    ROWS,
    plan_of,
    workspace_of,
)
from tests.support import BACKENDS, make_batch, require_backend


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


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
        assert "per-token losses and entropies: 12 labelled rows" in str(plan)
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
    """192 rows x 20011 x 64: the logits of all are 15 MB (bfloat16: 8), of "several" a sixth; no second copy."""
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
