"""Tensors that are no plain memory of their own: lazily negated, overlapping, sparse, nested, wrapped.

Kernels take addresses, so each kind must be made plain, or refused by name: a wrong number is never an outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import slime_fused as sf
from slime_fused import reference
from tests.support import BACKENDS, make_batch, pack, require_backend

BOUNDS = torch.tensor([0, 2, 5, 7, 9], dtype=torch.int32)
LINEAR = ("slime_loss", "linear_cross_entropy", "linear_logprobs", "sequence_logprobs")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


def lazily_negated(x: Tensor) -> Tensor:
    """The values of ``x`` behind a negation that has not been carried out."""
    view = torch._neg_view(-x)
    assert view.is_neg()
    return view


def imaginary_part_of_conjugate(x: Tensor) -> Tensor:
    """As PyTorch itself makes such a tensor."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


NEGATIONS = {"neg_view": lazily_negated, "conj_imag": imaginary_part_of_conjugate}


@pytest.fixture(params=NEGATIONS)
def negation(request) -> Callable[[Tensor], Tensor]:
    return NEGATIONS[request.param]


def scalar_of(out: Any) -> Tensor:
    """A number whose upstream gradient differs for every entry."""
    return out.loss if isinstance(out, sf.SlimeOutput) else out.square().sum()


def logits_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 37, generator=generator, dtype=torch.float64)
    return logits, torch.tensor([3, 36, -100, 0, 8, 8])


@pytest.mark.parametrize("workspace", ["1GiB", 37 * 8 * 3])
@pytest.mark.parametrize("name", LINEAR)
def test_a_lazily_negated_head(name, workspace, negation, backend):
    """Hidden states, head and bias; the gradients reach the leaves behind the negation."""
    for batch in (make_batch(has_bias=True), pack(make_batch(has_bias=True))):
        results = []
        for wrap in (negation, torch.Tensor.clone):
            leaves = batch.leaves()
            lazy = replace(leaves, **{k: wrap(x) for k, x in leaves.tensors().items()})
            loss = scalar_of(lazy.call(getattr(sf, name), backend=backend, workspace=workspace))
            results.append((loss.detach(), *torch.autograd.grad(loss, list(leaves.tensors().values()))))
        torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


def test_lazily_negated_integers(negation, backend):
    batch = pack(make_batch(has_bias=True))
    expected = batch.call(sf.sequence_logprobs, backend=backend)
    lazy = replace(batch, labels=torch._neg_view(-batch.labels), cu_seqlens=torch._neg_view(-batch.cu_seqlens))
    assert torch.equal(lazy.call(sf.sequence_logprobs, backend=backend), expected)
    logits, labels = logits_and_labels()
    expected = sf.cross_entropy(logits, labels, backend=backend)
    assert torch.equal(sf.cross_entropy(logits, torch._neg_view(-labels), backend=backend), expected)
    logp = -torch.rand(9, dtype=torch.float64)
    expected = sf.slime_terms(logp, BOUNDS, backend=backend).loss
    assert torch.equal(sf.slime_terms(logp, torch._neg_view(-BOUNDS), backend=backend).loss, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_lazily_negated_logits(inplace, negation, backend):
    logits, labels = logits_and_labels()
    results = []
    for wrap in (negation, torch.Tensor.clone):
        leaf = logits.clone().requires_grad_()
        loss = sf.cross_entropy(wrap(leaf * 1), labels, inplace_backward=inplace, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, [leaf])))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_lazily_negated_log_probs(negation, backend):
    logp = -torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for wrap in (negation, torch.Tensor.clone):
        leaf = logp.clone().requires_grad_()
        out = sf.slime_terms(wrap(leaf), BOUNDS, backend=backend)
        results.append((out.loss.detach(), out.margins, *torch.autograd.grad(out.loss, [leaf])))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", [*LINEAR, "cross_entropy", "slime_terms"])
def test_a_lazily_negated_upstream_gradient(name, negation, backend):
    results = []
    for wrap in (negation, torch.Tensor.clone):
        if name == "cross_entropy":
            logits, labels = logits_and_labels()
            leaf = logits.requires_grad_()
            out = sf.cross_entropy(leaf, labels, reduction="none", backend=backend)
        elif name == "slime_terms":
            leaf = torch.linspace(-2, -1, 9, dtype=torch.float64).requires_grad_()
            out = sf.slime_terms(leaf, BOUNDS, backend=backend).loss
        else:
            batch = make_batch(prompt=0, padding=0, lengths=(4, 4, 4, 4), has_bias=True).leaves()
            leaf, out = batch.hidden, batch.call(getattr(sf, name), backend=backend)
            out = out.loss if name == "slime_loss" else out
        upstream = torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
        results.append(torch.autograd.grad(out, [leaf], wrap(upstream))[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_lazily_negated_tensors_in_a_graph(compiler, negation):
    """Operators get them from PyTorch's dispatcher, which carries the negation out."""
    torch._dynamo.reset()
    logits, labels = logits_and_labels()
    batch = make_batch(has_bias=True)
    lazy = replace(batch, **{k: negation(x) for k, x in batch.tensors().items()})
    compiled = torch.compile(sf.cross_entropy, fullgraph=True, backend=compiler)
    assert torch.equal(compiled(negation(logits), labels), sf.cross_entropy(logits, labels))
    linear = torch.compile(sf.linear_cross_entropy, fullgraph=True, backend=compiler)
    torch.testing.assert_close(lazy.call(linear), batch.call(sf.linear_cross_entropy), rtol=1e-13, atol=0)
    torch._dynamo.reset()


def test_lazy_zeros(backend):
    """PyTorch's zero tensors have no memory at all until they are read."""
    zeros, labels = torch._efficientzerotensor((6, 37)), logits_and_labels()[1]
    assert sf.cross_entropy(zeros, labels, backend=backend) == sf.cross_entropy(zeros + 0, labels, backend=backend)


def overlapping(logits: Tensor, how: str) -> Tensor:
    """(4, 6, 9) logits some of whose elements share memory."""
    if how == "rows":
        return logits[:, :1].expand(4, 6, 9)
    if how == "one_row":
        return logits[0, 0].expand(4, 6, 9)
    if how == "columns":
        return logits[..., :1].expand(4, 6, 9)
    if how == "all":
        return logits[0, 0, 0].expand(4, 6, 9)
    if how == "batch":
        return logits[:1].expand(4, 6, 9)
    # "windows": each row begins two elements after the last one.
    return logits.flatten()[: 23 * 2 + 9].unfold(0, 9, 2).view(4, 6, 9)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("how", ["rows", "one_row", "columns", "all", "batch", "windows"])
def test_overlapping_logits(how, reduction, inplace, backend):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 6, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 9, (4, 6), generator=generator)
    labels[0, 1] = -100
    results = []
    for function, options in (
        (sf.cross_entropy, {"backend": backend, "inplace_backward": inplace}),
        (reference.cross_entropy, {}),
    ):
        leaf = logits.clone().requires_grad_()
        loss = function(overlapping(leaf * 1, how), labels, reduction=reduction, **options)
        upstream = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64).reshape(loss.shape)
        results.append((loss.detach(), *torch.autograd.grad(loss, [leaf], upstream)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("how", ["rows", "windows"])
def test_overlapping_memory_is_never_written(how, backend):
    logits = torch.randn(4, 6, 9, dtype=torch.float64)
    before = logits.clone()
    view = overlapping(logits, how).requires_grad_()
    sf.cross_entropy(view, torch.zeros(4, 6, dtype=torch.long), inplace_backward=True, backend=backend).backward()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("expanded", ["hidden", "weight", "bias", "labels"])
@pytest.mark.parametrize("name", LINEAR)
def test_an_expanded_input_of_a_linear_loss(name, expanded, backend):
    batch = make_batch(lengths=(4, 4, 4, 4), prompt=0, padding=0, has_bias=True)
    results = []
    for copies in (False, True):
        leaves = batch.leaves()
        source = getattr(leaves, expanded)
        wide = source[..., :1].expand(source.shape)
        wide = wide.contiguous() if copies else wide
        loss = scalar_of(replace(leaves, **{expanded: wide}).call(getattr(sf, name), backend=backend))
        results.append((loss.detach(), *torch.autograd.grad(loss, list(leaves.tensors().values()))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


# --- kinds that are refused by name ---


def quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


KINDS = {
    "sparse_coo": (torch.Tensor.to_sparse, r"layout torch\.sparse_coo; call to_dense\(\)"),
    "sparse_csr": (
        lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(),
        r"layout torch\.sparse_csr; call to_dense",
    ),
    "mkldnn": (torch.Tensor.to_mkldnn, r"layout torch\._mkldnn; call to_dense\(\)"),
    "quantized": (quantized, r"quantized torch\.qint8; call dequantize\(\)"),
    "nested": (nested, r"nested tensor; pass its values\(\) with cu_seqlens"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("argument", ["hidden", "weight", "logits", "logp"])
def test_a_kind_that_is_refused(argument, kind):
    convert, message = KINDS[kind]
    batch = make_batch(dtype=torch.float32)
    calls = {
        "hidden": (batch.hidden, lambda x: replace(batch, hidden=x).call(sf.linear_cross_entropy)),
        "weight": (batch.weight, lambda x: replace(batch, weight=x).call(sf.slime_loss)),
        "logits": (torch.randn(4, 9), lambda x: sf.cross_entropy(x, torch.tensor([0, 1, 2, 3]))),
        "logp": (torch.randn(1, 9), lambda x: sf.slime_terms(x, BOUNDS)),
    }
    value, call = calls[argument]
    with pytest.raises(TypeError, match=rf"{argument}: expected .* got .*{message}"):
        call(convert(value))


def test_sparse_labels_and_bounds_are_refused():
    batch = pack(make_batch())
    with pytest.raises(TypeError, match=r"labels: expected a dense tensor, got layout torch\.sparse_coo"):
        replace(batch, labels=batch.labels.to_sparse()).call(sf.linear_logprobs)
    with pytest.raises(TypeError, match=r"cu_seqlens: expected a dense tensor, got layout torch\.sparse_coo"):
        replace(batch, cu_seqlens=batch.cu_seqlens.to_sparse()).call(sf.linear_logprobs)


def test_a_tensor_of_a_wrapping_class_is_refused():
    """As a DTensor or a compressed weight: only its own class can multiply it."""
    from torch.testing._internal.two_tensor import TwoTensor

    batch = make_batch()
    wrapped = TwoTensor(batch.weight, batch.weight)
    with pytest.raises(TypeError, match="weight: expected a plain tensor, got TwoTensor; call dequantize"):
        replace(batch, weight=wrapped).call(sf.linear_cross_entropy)
    logits, labels = logits_and_labels()
    with pytest.raises(TypeError, match="logits: expected a plain tensor, got TwoTensor"):
        sf.cross_entropy(TwoTensor(logits, logits), labels)
