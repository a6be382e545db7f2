"""The backward pass by vocabulary blocks on the Triton kernels: in the interpreter, or on a GPU where there is one.

`test_vocab_sweep.py` has the grid of shapes; here the Triton kernels meet its seams, tails and head transforms.
"""

from __future__ import annotations

import pytest
import torch

from tests.test_vocab_sweep import autograd, make_problem, sweep
from tests.triton_support import DEVICE, INTERPRETING, skip_unless_kernels_run

skip_unless_kernels_run()

from slime_fused.backends.base import HeadTransform, TokenLoss  # noqa: E402

pytestmark = pytest.mark.gpu
CAPPED, FULL_LOSS = HeadTransform(scale=0.5, softcap=4.0), TokenLoss(label_smoothing=0.1, z_loss=0.01)


# In the interpreter only the casts differ with the dtype, and a case takes a second.
CASES = [
    (dtype, block_cols, *options)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for block_cols in (16, 75)
    for options in ((HeadTransform(), TokenLoss(), False), (CAPPED, FULL_LOSS, True))
]
if INTERPRETING:
    CASES = [CASES[1], CASES[4]]


@pytest.mark.parametrize(("dtype", "block_cols", "head", "token_loss", "has_bias"), CASES)
def test_gradients(dtype, block_cols, head, token_loss, has_bias):
    """Blocks with a tail, and all columns at once; no worse than plain PyTorch in the same dtype, on the CPU."""
    problem = make_problem(dtype)
    stats, logp, *truth = autograd(problem, head, token_loss, torch.float64, has_bias=has_bias)
    plain = autograd(problem, head, token_loss, dtype, has_bias=has_bias)[2:]
    on_device = [t.to(DEVICE) for t in problem]
    options = {"has_bias": has_bias, "block_cols": block_cols, "backend": "triton"}
    got = sweep(on_device, head, token_loss, stats.to(DEVICE), logp.to(DEVICE), **options)
    for name, value, exact, reference in zip(("hidden", "weight", "bias"), got, truth, plain, strict=True):
        if name == "bias" and not has_bias:
            continue
        error = (value.cpu().double() - exact).norm() / exact.norm()
        allowed = (reference.double() - exact).norm() / exact.norm() + 4 * torch.finfo(dtype).eps
        assert error <= allowed, f"d_{name}: {error:.2e}, allowed {allowed:.2e}"
    assert (got[0][[0, 9]] == 0).all()
    again = sweep(on_device, head, token_loss, stats.to(DEVICE), logp.to(DEVICE), **options)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, again, strict=True))
