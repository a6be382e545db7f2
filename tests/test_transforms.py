"""Transforms that hand-written passes cannot follow say what to use instead; modes and defaults change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import slime_fused as sf
from slime_fused import reference
from tests.support import BACKENDS, make_batch, require_backend

BOUNDS = torch.tensor([0, 2, 5, 7, 9], dtype=torch.int32)
LINEAR = ("slime_loss", "linear_cross_entropy", "linear_logprobs", "sequence_logprobs")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


def scalar_of(out: Any) -> Tensor:
    """A number whose upstream gradient differs for every entry."""
    return out.loss if isinstance(out, sf.SlimeOutput) else out.square().sum()


def losses(backend: str) -> dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """(input, scalar of it) for every public function."""
    batch = make_batch(has_bias=True)
    logits = torch.randn(6, 37, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.tensor([3, 36, -100, 0, 8, 8])

    def linear(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: scalar_of(replace(batch, hidden=x).call(getattr(sf, name), backend=backend))

    return {
        **{name: (batch.hidden, linear(name)) for name in LINEAR},
        "cross_entropy": (logits, lambda x: sf.cross_entropy(x, labels, backend=backend)),
        "slime_terms": (
            torch.linspace(-2, -1, 9, dtype=torch.float64),
            lambda x: sf.slime_terms(x, BOUNDS, backend=backend).loss,
        ),
    }


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
}


@pytest.mark.parametrize("name", [*LINEAR, "cross_entropy", "slime_terms"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_say_what_to_use(transform, name, backend):
    x, loss = losses(backend)[name]
    with pytest.raises(RuntimeError, match=r"cannot run under torch\.func .*backward\(\).*slime_fused\.reference"):
        TRANSFORMS[transform](loss, x)


@pytest.mark.parametrize("name", [*LINEAR, "cross_entropy", "slime_terms"])
def test_forward_mode_says_what_to_use(name, backend):
    x, loss = losses(backend)[name]
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative: call backward\(\)"):
            loss(forward_ad.make_dual(x, x.clone()))
        # A level alone, or tangents elsewhere, harm nothing.
        assert torch.isfinite(loss(x))


@pytest.mark.parametrize("name", [*LINEAR, "cross_entropy", "slime_terms"])
def test_batched_upstream_gradients_say_what_to_use(name, backend):
    x, loss = losses(backend)[name]
    leaf = x.clone().requires_grad_()
    for batch_gradients in (
        lambda: torch.autograd.grad(loss(leaf), [leaf], torch.ones(3, dtype=x.dtype), is_grads_batched=True),
        lambda: torch.autograd.functional.jacobian(loss, x, vectorize=True),
    ):
        with pytest.raises(RuntimeError, match=r"one upstream gradient at a time.*retain_graph=True"):
            batch_gradients()


def test_what_the_errors_point_to_works():
    """The reference follows the transforms, and one upstream gradient after the other gives a batch."""
    batch = make_batch()

    def plain(x: Tensor) -> Tensor:
        return reference.linear_cross_entropy(x, batch.weight, batch.labels)

    x = batch.hidden.clone().requires_grad_()
    expected = torch.autograd.grad(sf.linear_cross_entropy(x, batch.weight, batch.labels), [x])[0]
    torch.testing.assert_close(torch.func.grad(plain)(batch.hidden), expected, rtol=1e-10, atol=1e-12)
    assert torch.func.vmap(plain)(torch.stack([batch.hidden] * 2)).shape == (2,)
    upstreams = torch.randn(3, *batch.labels.shape, dtype=torch.float64)
    ours = sf.linear_logprobs(x, batch.weight, batch.labels)
    one_by_one = [torch.autograd.grad(ours, [x], u, retain_graph=True)[0] for u in upstreams]
    theirs = reference.linear_logprobs(x, batch.weight, batch.labels)
    (batched,) = torch.autograd.grad(theirs, [x], upstreams, is_grads_batched=True)
    torch.testing.assert_close(torch.stack(one_by_one), batched, rtol=1e-10, atol=1e-12)


# --- modes and defaults ---


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*LINEAR, "cross_entropy", "slime_terms"])
def test_the_default_dtype_does_not_matter(name, default, backend):
    x, loss = losses(backend)[name]
    results = []
    before = torch.get_default_dtype()
    for dtype in (before, default):
        torch.set_default_dtype(dtype)
        try:
            leaf = x.clone().requires_grad_()
            value = loss(leaf)
            results.append((value.detach(), *torch.autograd.grad(value, [leaf])))
        finally:
            torch.set_default_dtype(before)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["cross_entropy", "slime_terms"])
def test_modes_without_gradients(name, backend):
    x, loss = losses(backend)[name]
    expected = loss(x)
    leaf = x.clone().requires_grad_()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            value = loss(leaf)
        assert not value.requires_grad
        assert torch.equal(value.clone(), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every_other", "expanded"])
def test_labels_of_any_layout(layout, dtype, backend):
    logits = torch.randn(6, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 9, (6, 4), generator=torch.Generator().manual_seed(2))
    if layout == "expanded":
        labels = labels[:, :1].expand(6, 4)
    expected = reference.cross_entropy(logits, labels)
    other = {
        "contiguous": labels,
        "transposed": labels.T.contiguous().T,
        "every_other": labels.repeat_interleave(2, 1)[:, ::2],
        "expanded": labels,
    }[layout].to(dtype)
    got = sf.cross_entropy(logits, other, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    got = sf.linear_cross_entropy(logits, torch.eye(9, dtype=torch.float64), other, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
