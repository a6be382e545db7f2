"""Logit scales of 0 and below through the public functions, on every plan: values and gradients as in float64.

A scale of 0 makes every token equally likely: the gradient is 0, exactly, whatever the loss adds. A negative one
reverses the order of the logits. Vocabularies have a tail in every kernel; the grid of `tests.row_cases` has the
rest, and `test_triton_fused.py` the Triton kernels.
"""

from __future__ import annotations

import pytest
import torch

import slime_fused as sf
from slime_fused import reference
from slime_fused.backends.base import LinearStatsBackend
from tests import test_fused
from tests.linear_stats_backend import linear_stats_backend  # noqa: F401
from tests.support import (
    BACKENDS,
    PLANS,
    Batch,
    assert_as_exact_as_plain,
    force_plan,
    make_batch,
    require_backend,
    run,
)
from tests.test_cross_entropy import make_logits, value_and_grad

SCALES = (0.0, -0.7)
SMOOTH_Z = {"label_smoothing": 0.2, "z_loss": 0.01}
FUNCTIONS = {
    # name -> (function, options, operation)
    "slime": ("slime_loss", {}, "slime"),
    "cross_entropy": ("linear_cross_entropy", SMOOTH_Z, "cross_entropy"),
    "logprobs": ("linear_logprobs", {}, "token"),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


def workspace_of(plan: str, batch: Batch, operation: str, **options) -> int:
    """Bytes that force the plan; a token operation has no unit but the row, and no gradient before backward."""
    if operation == "slime":
        return force_plan(plan, batch, **options)[0]
    problem = batch.call(sf.explain_plan, loss=operation, workspace="1GiB", **options).problem
    return {"stream": problem.rows, "stream_several": 5, "resweep": 1}[plan] * problem.row_bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_public_functions(function, scale, plan, dtype, backend):
    name, own, operation = FUNCTIONS[function]
    batch = make_batch(dtype=dtype, has_bias=True)
    options = {"logit_scale": scale, "logit_softcap": 5.0 if plan == "stream_several" else None}
    how = {
        "backend": backend,
        "workspace": workspace_of(plan, batch.leaves(), operation, backend=backend, **options),
    }
    fused, plain = getattr(sf, name), getattr(reference, name)
    assert_as_exact_as_plain(fused, plain, batch, options={**own, **options}, **how)
    if scale == 0.0:
        grads = run(fused, batch, **own, **options, **how).grads
        assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_cross_entropy(softcap, scale, inplace, dtype, backend):
    logits, labels = make_logits(3, 5, 37, dtype=dtype)
    options = {"logit_scale": scale, "logit_softcap": softcap, **SMOOTH_Z}
    truth = value_and_grad(reference.cross_entropy, logits.double(), labels, **options)
    plain = value_and_grad(reference.cross_entropy, logits, labels, **options)
    got = value_and_grad(sf.cross_entropy, logits, labels, backend=backend, inplace_backward=inplace, **options)
    for value, rough, exact, eps in zip(got, plain, truth, (8, 2), strict=True):
        unit = torch.finfo(value.dtype).eps
        error = (value.double() - exact).abs().max()
        assert error <= (rough.double() - exact).abs().max() + eps * unit * exact.abs().max()
    if scale == 0.0:
        assert (got[1] == 0).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["slime", "ce_smooth_z_sum", "logprobs"])
def test_fused_plan(name, scale, linear_stats_backend: LinearStatsBackend):  # noqa: F811
    batch = make_batch(test_fused.LENGTHS, vocab_size=test_fused.VOCAB, dtype=torch.bfloat16, has_bias=True)
    test_fused.check(name, batch, linear_stats_backend, {"logit_scale": scale})


@pytest.mark.parametrize("scale", [*SCALES, 4.0])
def test_logits_at_the_ends_of_float16(scale, backend):
    """Hidden states of one channel give logits of +-65504 themselves: scaled in float32, they stay finite."""
    hidden = torch.tensor([[65504.0], [-65504.0], [60000.0]], dtype=torch.float16)
    weight = torch.tensor([[1.0], [-1.0], [0.0], [0.5]], dtype=torch.float16)
    batch = Batch(hidden, weight, torch.tensor([0, 0, 3]))
    options = {"logit_scale": scale, "reduction": "sum"}
    fused, plain = sf.linear_cross_entropy, reference.linear_cross_entropy
    # Not the weight's gradient: it is beyond float16, in plain PyTorch too.
    assert_as_exact_as_plain(fused, plain, batch, options=options, wanted=("hidden",), backend=backend)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("vocab_size", [1, 37])
def test_one_row(vocab_size, scale, backend):
    logits, labels = torch.linspace(-4, 4, vocab_size)[None], torch.zeros(1, dtype=torch.int64)
    options = {"logit_scale": scale, "reduction": "none"}
    truth = value_and_grad(reference.cross_entropy, logits.double(), labels, **options)
    got = value_and_grad(sf.cross_entropy, logits, labels, backend=backend, **options)
    for value, exact in zip(got, truth, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)
