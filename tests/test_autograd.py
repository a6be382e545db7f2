"""What autograd may do to the losses: graphs kept or not, upstream gradients, leaves or not, strides, in-place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

import slime_fused as sf
from slime_fused import reference
from slime_fused.engine import products
from tests.support import BACKENDS, PLANS, assert_as_exact_as_plain, force_plan, make_batch, require_backend, run


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


@dataclass(frozen=True)
class Scalar:
    """A scalar of a public function, here and in plain PyTorch."""

    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    operation: str

    def __call__(self, *args, **options) -> Tensor:
        return self.fused(*args, **options)


def squares(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar whose upstream gradient differs for every entry."""
    return lambda *args, **options: function(*args, **options).square().sum()


SCALARS = {
    "slime_loss": Scalar(
        lambda *a, **k: sf.slime_loss(*a, **k).loss, lambda *a, **k: reference.slime_loss(*a, **k).loss, "slime"
    ),
    "linear_cross_entropy": Scalar(sf.linear_cross_entropy, reference.linear_cross_entropy, "cross_entropy"),
    "linear_logprobs": Scalar(squares(sf.linear_logprobs), squares(reference.linear_logprobs), "token"),
    "sequence_logprobs": Scalar(squares(sf.sequence_logprobs), squares(reference.sequence_logprobs), "token"),
}


@pytest.fixture(params=SCALARS)
def scalar(request) -> Scalar:
    return SCALARS[request.param]


@pytest.fixture(params=PLANS)
def kind(request) -> str:
    return request.param


def workspace_for(kind: str, operation: str, batch) -> int:
    """A workspace of the plan's size; operations that have no such plan get the budget all the same."""
    probe = batch.call(sf.explain_plan, loss=operation, workspace="1GiB").problem
    rows = {"stream": probe.rows, "stream_several": 8, "resweep": 3}[kind]
    return rows * probe.row_bytes


def test_kept_graph_gives_the_same_gradients_again(scalar, kind, backend):
    batch = make_batch(has_bias=True).leaves()
    loss = batch.call(scalar, backend=backend, workspace=workspace_for(kind, scalar.operation, batch))
    inputs = list(batch.tensors().values())
    first = [g.clone() for g in torch.autograd.grad(loss, inputs, retain_graph=True)]
    second = torch.autograd.grad(loss, inputs, torch.tensor(3.0, dtype=loss.dtype), retain_graph=True)
    third = torch.autograd.grad(loss, inputs)
    for name, a, b, c in zip(batch.tensors(), first, second, third, strict=True):
        torch.testing.assert_close(b, 3 * a, rtol=1e-12, atol=1e-13, msg=name)
        assert torch.equal(a, c), name


def test_second_backward_without_a_kept_graph_is_refused(scalar, kind, backend):
    batch = make_batch().leaves()
    loss = batch.call(scalar, backend=backend, workspace=workspace_for(kind, scalar.operation, batch))
    loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


def test_a_second_derivative_is_refused(scalar, kind, backend):
    batch = make_batch().leaves()
    loss = batch.call(scalar, backend=backend, workspace=workspace_for(kind, scalar.operation, batch))
    with pytest.raises(RuntimeError, match="not twice differentiable"):
        torch.autograd.grad(loss, [batch.hidden], create_graph=True)


def test_a_second_derivative_of_the_logits_losses_is_refused(backend):
    logits = torch.randn(4, 9, requires_grad=True)
    loss = sf.cross_entropy(logits, torch.tensor([1, 2, 3, 4]), backend=backend)
    with pytest.raises(RuntimeError, match="not twice differentiable"):
        torch.autograd.grad(loss, [logits], create_graph=True)
    logp = torch.randn(4, requires_grad=True)
    loss = sf.slime_terms(logp, torch.tensor([0, 2, 4], dtype=torch.int32), backend=backend).loss
    with pytest.raises(RuntimeError, match="not twice differentiable"):
        torch.autograd.grad(loss, [logp], create_graph=True)


@pytest.mark.parametrize("upstream", [0.0, 1.0, 1 / 3, -2.5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_upstream(upstream, dtype, kind, backend):
    batch = make_batch(dtype=dtype, has_bias=True)
    workspace, _ = force_plan(kind, batch.leaves())
    assert_as_exact_as_plain(
        sf.slime_loss,
        reference.slime_loss,
        batch,
        options={},
        upstream=upstream,
        backend=backend,
        workspace=workspace,
    )


def test_an_upstream_factor_is_not_rounded_to_16_bits(backend):
    """1/3 in bfloat16 is 0.26 % off: a rounded factor would bias every gradient alike."""
    batch = make_batch((50, 50), hidden_size=32, dtype=torch.bfloat16)
    grads = [run(sf.slime_loss, batch, backend=backend, upstream=u).grads["weight"].double() for u in (1.0, 1 / 3)]
    assert (grads[1].norm() / grads[0].norm()).item() == pytest.approx(1 / 3, rel=5e-4)


@pytest.mark.parametrize("lengths", [(1, 1), (4, 3, 5, 2), (300, 200)], ids=str)
@pytest.mark.parametrize("name", ["slime_loss", "linear_cross_entropy"])
def test_a_loss_scaler_saves_float16_gradients(name, lengths, kind, backend):
    """GradScaler's 65536 arrives after the gradients were formed: they must neither underflow nor overflow."""
    scalar = SCALARS[name]
    batch = make_batch(lengths, prompt=0, padding=0, dtype=torch.float16)
    # Small head weights and many tokens make the smallest gradients: 1e-8 is below float16's least number.
    batch = replace(batch, hidden=batch.hidden / 512, weight=batch.weight / 512)
    workspace = workspace_for(kind, scalar.operation, batch.leaves())
    assert_as_exact_as_plain(
        scalar.fused, scalar.plain, batch, options={}, upstream=65536.0, backend=backend, workspace=workspace
    )


def test_summed_float16_cross_entropy_with_a_loss_scaler(backend):
    batch = make_batch((6, 5), dtype=torch.float16)
    batch = replace(batch, hidden=batch.hidden / 1024, weight=batch.weight / 1024)
    assert_as_exact_as_plain(
        sf.linear_cross_entropy,
        reference.linear_cross_entropy,
        batch,
        options={"reduction": "sum"},
        upstream=65536.0,
        backend=backend,
    )


def test_one_input_at_a_time(scalar, kind, backend):
    batch = make_batch(has_bias=True).leaves()
    workspace = workspace_for(kind, scalar.operation, batch)
    together = torch.autograd.grad(
        batch.call(scalar, backend=backend, workspace=workspace), list(batch.tensors().values())
    )
    for (name, leaf), expected in zip(batch.tensors().items(), together, strict=True):
        loss = batch.call(scalar, backend=backend, workspace=workspace)
        (grad,) = torch.autograd.grad(loss, [leaf])
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-13, msg=name)


def test_inputs_that_are_no_leaves_and_have_other_uses(scalar, backend):
    """Hidden states with a second use, a head tied to an embedding, a bias formed from a parameter."""
    batch = make_batch(has_bias=True)
    grads = []
    for loss in (partial(scalar.fused, backend=backend), scalar.plain):
        embedding = batch.weight.clone().requires_grad_()
        scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        offset = batch.bias.clone().requires_grad_()
        tokens = batch.labels.clamp(min=0)
        hidden = torch.tanh(embedding[tokens] + batch.hidden)
        total = loss(hidden, embedding * scale, batch.labels, bias=offset * 2) + hidden.square().mean()
        grads.append(torch.autograd.grad(total, [embedding, scale, offset]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


def strided(x: Tensor, how: str) -> Tensor:
    """The same values with other strides."""
    if how == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "sliced":
        padded = x.new_full((*x.shape[:-1], x.shape[-1] + 3), 7)
        padded[..., 1:-2] = x
        return padded[..., 1:-2]
    doubled = torch.repeat_interleave(x, 2, 0)
    return doubled[::2]


@pytest.mark.parametrize("how", ["transposed", "sliced", "every_other"])
def test_strides_do_not_matter(how, scalar, kind, backend):
    batch = make_batch(has_bias=True).leaves()
    workspace = workspace_for(kind, scalar.operation, batch)
    options = {"backend": backend, "workspace": workspace}
    inputs = list(batch.tensors().values())
    expected = torch.autograd.grad(batch.call(scalar, **options), inputs)
    odd = replace(
        batch,
        hidden=strided(batch.hidden, how),
        weight=strided(batch.weight, how),
        labels=strided(batch.labels, how),
        bias=strided(batch.bias, "every_other"),
    )
    assert not odd.weight.is_contiguous()
    assert not odd.labels.is_contiguous()
    got = torch.autograd.grad(odd.call(scalar, **options), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["linear_logprobs", "sequence_logprobs"])
@pytest.mark.parametrize("changed", ["hidden", "weight", "bias"])
def test_a_change_in_place_before_backward_is_noticed(changed, name, kind, backend):
    scalar = SCALARS[name]
    batch = make_batch(has_bias=True).leaves()
    loss = batch.call(scalar, backend=backend, workspace=workspace_for(kind, scalar.operation, batch))
    with torch.no_grad():
        getattr(batch, changed).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["slime_loss", "linear_cross_entropy"])
def test_losses_that_need_no_input_in_backward_allow_a_change(name, backend):
    """Their gradients exist by then, so an optimiser that steps early does no harm."""
    scalar = SCALARS[name]
    batch = make_batch(has_bias=True)
    expected = batch.leaves()
    expected.call(scalar, backend=backend).backward()
    changed = batch.leaves()
    loss = changed.call(scalar, backend=backend)
    with torch.no_grad():
        changed.weight.zero_()
    loss.backward()
    assert torch.equal(changed.weight.grad, expected.weight.grad)


def test_gradients_accumulate_over_micro_batches(backend):
    """Two losses divided by two, as a trainer accumulates: .grad of the first call must not be written over."""
    batches = [make_batch(seed=s, has_bias=True) for s in (1, 2)]
    grads = []
    for function, options in ((sf.slime_loss, {"backend": backend}), (reference.slime_loss, {})):
        weight = batches[0].weight.clone().requires_grad_()
        for batch in batches:
            leaves = replace(batch.leaves(("hidden",)), weight=weight)
            (leaves.call(function, **options).loss / 2).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, scalar, backend):
    batch = make_batch(has_bias=True).leaves()
    inputs = list(batch.tensors().values())
    expected = torch.autograd.grad(batch.call(scalar, backend=backend), inputs)

    def loss(hidden, weight, bias):
        return scalar(hidden, weight, batch.labels, bias=bias, backend=backend)

    torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=use_reentrant).backward()
    for leaf, grad in zip(inputs, expected, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_inference_mode(scalar, backend):
    batch = make_batch(has_bias=True)
    expected = batch.leaves().call(scalar, backend=backend).detach()
    with torch.inference_mode():
        got = batch.call(scalar, backend=backend)
    torch.testing.assert_close(got.clone(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["linear_logprobs", "sequence_logprobs"])
def test_a_backward_that_was_broken_off_leaves_nothing_in_the_next(name, kind, backend, monkeypatch):
    """Out of memory, or Ctrl-C, after some chunks: the sums so far are no part of the pass that is tried again."""
    scalar = SCALARS[name]
    batch = make_batch(has_bias=True).leaves()
    options = {"backend": backend, "workspace": workspace_for(kind, scalar.operation, batch)}
    inputs = list(batch.tensors().values())
    expected = torch.autograd.grad(batch.call(scalar, **options), inputs)
    loss = batch.call(scalar, **options)
    add_bias_grad, calls = products.add_bias_grad, []

    def fail_after_the_first_chunk(*args):
        calls.append(add_bias_grad(*args))
        raise MemoryError

    monkeypatch.setattr(products, "add_bias_grad", fail_after_the_first_chunk)
    with pytest.raises(MemoryError):
        torch.autograd.grad(loss, inputs, retain_graph=True)
    assert calls
    monkeypatch.setattr(products, "add_bias_grad", add_bias_grad)
    again = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_two_threads_go_backward_through_one_kept_graph(kind, backend):
    batch = make_batch((40, 30, 50, 20), hidden_size=16, vocab_size=301, has_bias=True).leaves()
    workspace = workspace_for(kind, "token", batch)
    loss = batch.call(SCALARS["linear_logprobs"], backend=backend, workspace=workspace)
    inputs = list(batch.tensors().values())
    expected = torch.autograd.grad(loss, inputs, retain_graph=True)
    results = [None] * 4

    def go(i):
        results[i] = torch.autograd.grad(loss, inputs, retain_graph=True)

    threads = [threading.Thread(target=go, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
