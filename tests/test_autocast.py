"""Autocast: the head's tensors are cast once, nothing inside is cast again, float64 is left alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import slime_fused as sf
from slime_fused import reference
from tests.support import BACKENDS, assert_close, make_batch, require_backend, run

NAMES = ("slime_loss", "linear_cross_entropy", "linear_logprobs", "sequence_logprobs")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", [1000, 9, 1])
def test_as_the_reference_under_autocast(rows, dtype, name, backend):
    """float32 parameters and 16-bit products, as a mixed-precision trainer has them; gradients in float32."""
    batch = make_batch(dtype=torch.float32, has_bias=True)
    truth = run(getattr(reference, name), batch.to(torch.float64))
    with torch.autocast("cpu", dtype):
        workspace = rows * batch.call(sf.explain_plan, loss="token").problem.row_bytes
        plain = run(getattr(reference, name), batch)
        got = run(getattr(sf, name), batch, backend=backend, workspace=workspace)
    eps = torch.finfo(dtype).eps
    for key, value in got.outputs.items():
        assert value.dtype == torch.float32
        assert_close(key, value, plain.outputs[key], truth.outputs[key], eps, smallest=1.0)
    for key, grad in got.grads.items():
        assert grad.dtype == torch.float32
        assert_close(f"d_{key}", grad, plain.grads[key], truth.grads[key], eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", [1000, 9, 1])
def test_autocast_is_the_cast_and_nothing_more(rows, dtype, name, backend):
    """As with tensors cast by hand, but for the rounding of gradients that stay float32: nothing else is cast."""
    batch = make_batch(dtype=torch.float32, has_bias=True)
    workspace = rows * batch.to(dtype).call(sf.explain_plan, loss="token").problem.row_bytes
    with torch.autocast("cpu", dtype):
        under = run(getattr(sf, name), batch, backend=backend, workspace=workspace)
    by_hand = run(getattr(sf, name), batch.to(dtype), backend=backend, workspace=workspace)
    eps = torch.finfo(dtype).eps
    for key, value in by_hand.outputs.items():
        torch.testing.assert_close(under.outputs[key], value, rtol=eps / 4, atol=eps / 4)
    for key, grad in by_hand.grads.items():
        floor = 2 * eps * grad.abs().max().item()
        torch.testing.assert_close(under.grads[key], grad.float(), rtol=2 * eps, atol=floor, msg=f"d_{key}")
    if dtype == torch.float16:
        # Sums of float32 products: a float16 dW would have lost their last bits.
        d_weight = under.grads["weight"]
        assert (d_weight != d_weight.half().float()).any()


class _DtypesOfProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.seen |= {x.dtype for x in args if isinstance(x, torch.Tensor) and x.dim() == 2}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1000, 9, 1])
def test_float64_is_left_alone(rows, name, backend):
    batch = make_batch(has_bias=True)
    workspace = rows * batch.call(sf.explain_plan, loss="token").problem.row_bytes
    expected = run(getattr(sf, name), batch, backend=backend, workspace=workspace)
    with _DtypesOfProducts() as products, torch.autocast("cpu", torch.bfloat16):
        got = run(getattr(sf, name), batch, backend=backend, workspace=workspace)
    assert products.seen == {torch.float64}
    for key, value in (*expected.outputs.items(), *expected.grads.items()):
        assert torch.equal({**got.outputs, **got.grads}[key], value), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", [1000, 9, 1])
def test_backward_may_run_under_autocast_too(rows, dtype, name, backend):
    """A forward pass without autocast, whose backward runs under it: float32 products stay so (float16's too)."""
    batch = make_batch(dtype=dtype, has_bias=True)
    workspace = rows * batch.call(sf.explain_plan, loss="token").problem.row_bytes
    leaves = [batch.leaves(), batch.leaves()]
    losses = []
    for b in leaves:
        out = b.call(getattr(sf, name), backend=backend, workspace=workspace)
        losses.append(out.loss if name == "slime_loss" else out.sum())
    losses[0].backward()
    with _DtypesOfProducts() as products, torch.autocast("cpu", torch.bfloat16):
        losses[1].backward()
    assert products.seen <= {torch.float32}
    for key, leaf in leaves[0].tensors().items():
        assert torch.equal(leaves[1].tensors()[key].grad, leaf.grad), key


def test_mixed_dtypes_are_fine_under_autocast_only(name, backend):
    """hidden in bfloat16 from a model's body, the head's weight in float32."""
    batch = make_batch(dtype=torch.float32)
    mixed = replace(batch, hidden=batch.hidden.bfloat16()).leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out = mixed.call(getattr(sf, name), backend=backend)
    (out.loss if name == "slime_loss" else out.sum()).backward()
    assert mixed.hidden.grad.dtype == torch.bfloat16
    assert mixed.weight.grad.dtype == torch.float32
    with pytest.raises(ValueError, match=r"weight: expected the dtype of hidden .*autocast"):
        mixed.call(getattr(sf, name), backend=backend)


def test_disabled_autocast_is_none(name, backend):
    batch = make_batch(dtype=torch.float32)
    expected = run(getattr(sf, name), batch, backend=backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        got = run(getattr(sf, name), batch, backend=backend)
    for key, value in expected.outputs.items():
        assert torch.equal(got.outputs[key], value)
