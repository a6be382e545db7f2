"""`cross_entropy` of given logits: values, gradients, and the gradient written over the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import slime_fused as sf
from slime_fused import reference
from tests.support import BACKENDS, DTYPES, assert_close, require_backend

OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smooth_z": {"label_smoothing": 0.2, "z_loss": 0.01},
    "scale_softcap": {"logit_scale": 0.5, "logit_softcap": 4.0, "reduction": "sum"},
    "ignore_0": {"ignore_index": 0, "reduction": "none", "label_smoothing": 0.1},
}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


def make_logits(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    labels.view(-1)[1::3] = -100
    return logits.to(dtype), labels


def value_and_grad(function, logits: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    # A copy of a leaf's storage: the gradient may be written over what the function is given.
    loss = function(leaf * 1, labels, **options)
    upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=torch.float64)[: loss.numel()]
    loss.backward(upstream.reshape(loss.shape).to(loss.dtype))
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", OPTIONS)
def test_value_and_gradient(case, dtype, inplace, backend):
    logits, labels = make_logits(3, 5, 37, dtype=dtype)
    options = OPTIONS[case]
    if options.get("ignore_index") == 0:
        labels = labels.clamp(min=0)
    truth = value_and_grad(reference.cross_entropy, logits.double(), labels, **options)
    plain = value_and_grad(reference.cross_entropy, logits, labels, **options)
    got = value_and_grad(sf.cross_entropy, logits, labels, backend=backend, inplace_backward=inplace, **options)
    # The loss never is of lower precision than float32; the gradient is rounded once to the logits' dtype.
    loss_eps = 8 * torch.finfo(got[0].dtype).eps
    assert_close("loss", got[0], plain[0], truth[0], loss_eps, smallest=16.0)
    grad_eps = {torch.float64: 64, torch.float32: 4}.get(dtype, 0.5) * torch.finfo(dtype).eps
    assert_close("d_logits", got[1], plain[1], truth[1], grad_eps)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 4, 7), (5, 1), (0, 7), (2, 0, 7)])
def test_shapes(shape, backend):
    logits, labels = make_logits(*shape)
    got = value_and_grad(sf.cross_entropy, logits, labels, reduction="none", backend=backend)
    expected = value_and_grad(reference.cross_entropy, logits, labels, reduction="none")
    assert got[0].shape == labels.shape
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def strided(logits: Tensor, labels: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """A differentiable view with strides of all kinds, and its labels."""
    if how == "padded_rows":
        return torch.cat([logits, logits], -1)[..., :9], labels
    if how == "shifted":
        return logits[:, :-1], labels[:, 1:]
    if how == "transposed":
        return logits.transpose(0, 1), labels.T
    return logits.permute(2, 0, 1).contiguous().permute(1, 2, 0), labels


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("how", ["padded_rows", "shifted", "transposed", "columns_apart"])
def test_strides(how, inplace, backend):
    logits, labels = make_logits(3, 6, 9)
    logits.requires_grad_()
    results = []
    options = {"backend": backend, "inplace_backward": inplace}
    for function, extra in ((sf.cross_entropy, options), (reference.cross_entropy, {})):
        view, view_labels = strided(logits * 1, labels, how)
        assert not view.is_contiguous()
        loss = function(view, view_labels, **extra)
        results.append((loss.detach(), *torch.autograd.grad(loss, [logits])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


def test_inplace_gradient_takes_the_memory_of_the_logits(backend):
    logits, labels = make_logits(4, 9)
    logits.requires_grad_()
    loss = sf.cross_entropy(logits, labels, inplace_backward=True, backend=backend)
    (grad,) = torch.autograd.grad(loss, [logits])
    assert grad.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_kept_graph(inplace, backend):
    """In-place writing leaves nothing to start from again: autograd must refuse, not return wrong numbers."""
    logits, labels = make_logits(4, 9)
    logits.requires_grad_()
    loss = sf.cross_entropy(logits, labels, inplace_backward=inplace, backend=backend)
    first = torch.autograd.grad(loss, [logits], retain_graph=True)[0].clone()
    if inplace:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, [logits])
    else:
        assert torch.equal(torch.autograd.grad(loss, [logits])[0], first)


def test_inplace_gradient_is_noticed_by_who_saved_the_logits(backend):
    leaf, labels = make_logits(4, 9)
    leaf.requires_grad_()
    logits = leaf * 1
    other = logits.square().sum()
    sf.cross_entropy(logits, labels, inplace_backward=True, backend=backend).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_changed_logits_are_noticed(backend):
    leaf, labels = make_logits(4, 9)
    leaf.requires_grad_()
    logits = leaf * 1
    loss = sf.cross_entropy(logits, labels, backend=backend)
    logits.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_mean_over_no_label_is_refused_where_pytorch_gives_nan(backend):
    logits, labels = make_logits(4, 9)
    labels.fill_(-100)
    assert torch.isnan(F.cross_entropy(logits, labels))
    with pytest.raises(ValueError, match="labels: expected at least one label"):
        sf.cross_entropy(logits, labels, backend=backend)
    loss, grad = value_and_grad(sf.cross_entropy, logits, labels, reduction="sum", backend=backend)
    assert loss == 0
    assert (grad == 0).all()


def test_gradcheck(backend):
    logits, labels = make_logits(4, 5)
    labels[0] = -100

    def function(x):
        return sf.cross_entropy(
            x, labels, reduction="none", label_smoothing=0.1, z_loss=0.1, logit_softcap=9.0, backend=backend
        )

    assert torch.autograd.gradcheck(function, (logits.requires_grad_(),), eps=1e-6, atol=1e-7)


def test_bf16_logits_under_autocast_keep_their_precision(backend):
    logits, labels = make_logits(4, 9, dtype=torch.bfloat16)
    expected = sf.cross_entropy(logits, labels, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = sf.cross_entropy(logits, labels, backend=backend)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
