"""The inputs that PyTorch tests its own cross-entropy with, values and gradients: they ship inside the wheel.

Of these samples those with class-index targets and without class weights are what `cross_entropy` and
`linear_cross_entropy` take. Their shapes are (C,), (N, C) and (N, C, d1, ...), the reductions all three, labels are
ignored one by one and all together. The class dimension, second in PyTorch, is moved to the end.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import slime_fused as sf
from tests.support import BACKENDS, DTYPES, assert_close, require_backend


@dataclass(frozen=True)
class Sample:
    """Logits (..., V), labels (...), and the keywords that PyTorch and this package share."""

    logits: Tensor
    labels: Tensor
    options: dict[str, Any]


def internal(module: str, name: str) -> Callable[..., Any]:
    """A sample function of PyTorch's private test modules; a skip where it has moved."""
    frozen = "__allow_nonbracketed_mutation_flag"
    before = getattr(torch.backends, frozen)
    try:
        found = getattr(importlib.import_module(f"torch.testing._internal.{module}"), name)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"torch {torch.__version__} has no torch.testing._internal.{module}.{name}: {error}")
    finally:
        # The module freezes torch.backends for the whole process.
        setattr(torch.backends, frozen, before)
    return found


def op_samples(name: str, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    samples = internal("common_methods_invocations", f"sample_inputs_{name}")(None, "cpu", dtype, False)
    for sample in samples:
        yield sample.input, sample.args[0], sample.kwargs


def module_samples(name: str, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    samples = internal("common_modules", f"module_inputs_torch_nn_{name}")(None, "cpu", dtype, False, True)
    for sample in samples:
        yield *sample.forward_input.args, sample.constructor_input.kwargs


SOURCES = {
    "cross_entropy": op_samples,
    "nll_loss": op_samples,
    "CrossEntropyLoss": module_samples,
    "NLLLoss": module_samples,
}
EXPECTED = {"cross_entropy": 8, "nll_loss": 19, "CrossEntropyLoss": 54, "NLLLoss": 8}
"""Samples of each source that are left, at the least: a filter that lets none pass would pass every test."""


@cache
def samples_of(source: str, dtype: torch.dtype) -> list[Sample]:
    torch.manual_seed(0)
    result = []
    for raw, labels, options in SOURCES[source](source, dtype):
        if labels.is_floating_point() or options.get("weight") is not None:
            continue
        logits = raw.movedim(1, -1) if raw.dim() > 1 else raw
        result.append(Sample(logits.detach(), labels, dict(options)))
    assert len(result) >= EXPECTED[source], len(result)
    return result


def torch_cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """PyTorch's, with the classes last."""
    return F.cross_entropy(logits.movedim(-1, 1) if logits.dim() > 1 else logits, labels, **options)


def value_and_grads(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(*leaves)
    upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=torch.float64)[: loss.numel()]
    loss.backward(upstream.reshape(loss.shape).to(loss.dtype))
    return loss.detach(), *(x.grad for x in leaves)


def check(
    names: tuple[str, ...], got: Any, plain: Any, truth: Any, dtype: torch.dtype, rounded_logits: float = 0.0
) -> None:
    """Each value is as exact as PyTorch's. Where logits of magnitude ``rounded_logits`` were rounded to ``dtype``,
    each rounding moves a loss by as much, and a probability by that share of itself."""
    # The loss is never of lower precision than float32; a gradient is rounded to its dtype, products as well.
    loss_eps = max(8 * torch.finfo(got[0].dtype).eps, torch.finfo(dtype).eps if rounded_logits else 0.0)
    eps = {torch.float64: 64, torch.float32: 4}.get(dtype, 1.0) * torch.finfo(dtype).eps * max(1.0, rounded_logits)
    for name, *values in zip(names, got, plain, truth, strict=True):
        if name == "loss":
            assert_close(name, *values, loss_eps, smallest=rounded_logits or 16.0)
        else:
            assert_close(name, *values, eps)


def is_refused(call: Callable[[], Tensor], labels: Tensor, options: dict[str, Any]) -> bool:
    """Whether it is the mean over no label: NaN in PyTorch, and an error here, which is looked for."""
    no_label = bool((labels == options.get("ignore_index", -100)).all())
    if not no_label or options.get("reduction", "mean") != "mean":
        return False
    with pytest.raises(ValueError, match="labels: expected at least one label"):
        call()
    return True


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("source", SOURCES)
def test_cross_entropy(source, dtype, backend):
    for s in samples_of(source, dtype):

        def plain(x, s=s):
            return torch_cross_entropy(x, s.labels, **s.options)

        def fused(x, s=s):
            return sf.cross_entropy(x, s.labels, backend=backend, **s.options)

        if is_refused(lambda f=fused, x=s.logits: f(x), s.labels, s.options):
            continue
        results = [
            value_and_grads(f, x) for f, x in ((fused, s.logits), (plain, s.logits), (plain, s.logits.double()))
        ]
        check(("loss", "d_logits"), *results, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("source", SOURCES)
def test_linear_cross_entropy(source, dtype, backend):
    """The sample's logits are hidden states of a head that is the identity: products are exact in every dtype."""
    for s in samples_of(source, dtype):
        hidden, labels = (s.logits, s.labels) if s.logits.dim() > 1 else (s.logits[None], s.labels[None])
        identity = torch.eye(hidden.shape[-1], dtype=dtype)

        def plain(x, w, labels=labels, s=s):
            return torch_cross_entropy(F.linear(x, w), labels, **s.options)

        def fused(x, w, labels=labels, s=s):
            return sf.linear_cross_entropy(x, w, labels, backend=backend, **s.options)

        if is_refused(lambda f=fused, x=hidden, w=identity: f(x, w), labels, s.options):
            continue
        double = hidden.double(), identity.double()
        inputs = ((fused, hidden, identity), (plain, hidden, identity), (plain, *double))
        results = [value_and_grads(*call) for call in inputs]
        check(("loss", "d_hidden", "d_weight"), *results, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_linear_cross_entropy_on_its_own_samples(dtype, backend):
    """Those of torch.nn.functional.linear_cross_entropy, where PyTorch has it, with two-dimensional heads."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy")
    torch.manual_seed(0)
    count = 0
    for sample in internal("common_methods_invocations", "sample_inputs_linear_cross_entropy")(
        None, "cpu", dtype, False
    ):
        (weight, labels), options = sample.args, dict(sample.kwargs)
        bias = options.pop("linear_bias", None)
        if labels.is_floating_point() or options.get("weight") is not None or weight.dim() != 2:
            continue
        hidden = sample.input if sample.input.dim() > 1 else sample.input[None]
        labels = labels if sample.input.dim() > 1 else labels[None]
        inputs = [hidden, weight, *(() if bias is None else (bias,))]

        def plain(x, w, b=None, labels=labels, options=options):
            return torch_cross_entropy(F.linear(x, w, b), labels, **options)

        def fused(x, w, b=None, labels=labels, options=options):
            return sf.linear_cross_entropy(x, w, labels, bias=b, backend=backend, **options)

        if is_refused(lambda f=fused, x=inputs: f(*x), labels, options):
            continue
        double = [x.double() for x in inputs]
        largest = F.linear(*double).abs().max().item()
        results = [value_and_grads(f, *x) for f, x in ((fused, inputs), (plain, inputs), (plain, double))]
        check(("loss", "d_hidden", "d_weight", "d_bias")[: len(results[0])], *results, dtype, largest)
        count += 1
    assert count >= 5


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_two_dimensional_targets(dtype, reduction, backend):
    """Labels (S, T), some ignored, over a vocabulary that fills no vector, against PyTorch's (S, V, T)."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(37, 8, generator=generator, dtype=torch.float64).to(dtype)
    logits = F.linear(hidden.double(), weight.double()).to(dtype)
    labels = torch.randint(0, 37, (3, 5), generator=generator)
    labels[0, :3] = labels[2, 4] = -100
    options = {"reduction": reduction, "label_smoothing": 0.1}

    def plain(x):
        return torch_cross_entropy(x, labels, **options)

    def fused(x):
        return sf.cross_entropy(x, labels, backend=backend, **options)

    results = [value_and_grads(f, x) for f, x in ((fused, logits), (plain, logits), (plain, logits.double()))]
    check(("loss", "d_logits"), *results, dtype)

    def plain_head(x, w):
        return torch_cross_entropy(F.linear(x, w), labels, **options)

    def fused_head(x, w):
        return sf.linear_cross_entropy(x, w, labels, backend=backend, **options)

    double = hidden.double(), weight.double()
    inputs = ((fused_head, hidden, weight), (plain_head, hidden, weight), (plain_head, *double))
    largest = F.linear(*double).abs().max().item()
    check(("loss", "d_hidden", "d_weight"), *(value_and_grads(*call) for call in inputs), dtype, largest)
