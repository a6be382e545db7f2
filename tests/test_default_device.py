"""Scripts set a default device for their own tensors; ours must lie where the caller's lie.

The meta device stands for any other: a tensor that lands on it by mistake has no values, and the first use of them
fails or leaves the result wrong.
"""

from __future__ import annotations

import pytest
import torch

import slime_fused as sf
from tests.support import BACKENDS, PLANS, force_plan, make_batch, pack, require_backend, run

FUNCTIONS = {
    "slime_loss": "slime",
    "linear_cross_entropy": "cross_entropy",
    "linear_logprobs": "token",
    "sequence_logprobs": "token",
}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_linear_losses(name, kind, packed, dtype, backend):
    batch = make_batch(dtype=dtype, has_bias=True)
    batch = pack(batch) if packed else batch
    workspace, _ = force_plan(kind, batch.leaves()) if name == "slime_loss" else (8 * 80, None)
    options = {"backend": backend, "workspace": workspace, "shift": packed}
    expected = run(getattr(sf, name), batch, **options)
    with torch.device("meta"):
        leaves = batch.leaves()
        out = leaves.call(getattr(sf, name), **options)
        loss = out.loss if name == "slime_loss" else out
        loss.backward(torch.ones(loss.shape, dtype=loss.dtype, device="cpu"))
    assert torch.equal(loss, next(iter(expected.outputs.values())))
    for key, leaf in leaves.tensors().items():
        assert torch.equal(leaf.grad, expected.grads[key]), f"d_{key}"


def test_losses_of_logits_and_log_probs(backend):
    logits = torch.randn(6, 33, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, -100, 3, 32, -100, 0])
    logp = torch.linspace(-3, -0.1, 10)
    bounds = torch.tensor([0, 2, 5, 6, 10], dtype=torch.int32)

    def both() -> tuple[torch.Tensor, ...]:
        leaf, other = logits.clone().requires_grad_(), logp.clone().requires_grad_()
        loss = sf.cross_entropy(leaf, labels, label_smoothing=0.1, backend=backend)
        terms = sf.slime_terms(other, bounds, backend=backend).loss
        return loss, terms, *torch.autograd.grad(loss + terms, [leaf, other])

    expected = both()
    with torch.device("meta"):
        got = both()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
