"""The backward pass by vocabulary blocks against autograd in float64, and its memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from slime_fused.backends import get_backend
from slime_fused.backends.base import HeadTransform, TokenLoss, acc_dtype
from slime_fused.engine.chunks import Head
from slime_fused.engine.gradients import GradientDtypes
from slime_fused.engine.row_results import RowResults
from slime_fused.engine.vocab_sweep import VocabBlocks, vocab_sweep_backward

ROWS, DEPTH, VOCAB = 23, 16, 75
EVERYTHING = {"want_hidden": True, "want_weight": True, "want_bias": True}


def make_problem(dtype, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, DEPTH, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, DEPTH, generator=generator).div(2).to(dtype)
    bias = torch.randn(VOCAB, generator=generator).to(dtype)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    labels[[0, 9]] = -100
    labels[1], labels[2] = 0, VOCAB - 1
    return hidden, weight, bias, labels, torch.randn(ROWS, generator=generator).to(acc_dtype(dtype))


def autograd(problem, head, token_loss, dtype, *, has_bias):
    """(statistics, logp, d_hidden, d_weight, d_bias) in ``dtype``."""
    hidden, weight, bias, labels, row_scale = problem
    leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    raw = leaves[0] @ leaves[1].t()
    z = (raw + leaves[2] * has_bias) * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    keep = labels >= 0
    lse = z.logsumexp(1)
    logp = F.log_softmax(z, 1).gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    eps = token_loss.label_smoothing
    loss = -(1 - eps) * logp + eps * (lse - z.mean(1)) + token_loss.z_loss * lse**2
    (loss * keep * row_scale.to(dtype)).sum().backward()
    row_max = z.amax(1)
    stats = torch.stack([row_max, (lse - row_max).exp()])
    return stats.detach(), (logp * keep).detach(), *[leaf.grad for leaf in leaves]


def sweep(problem, head, token_loss, stats, logp, *, has_bias, block_cols, backend="torch", **wanted):
    hidden, weight, bias, labels, coefficient = problem
    acc, kernels = acc_dtype(hidden.dtype), get_backend(backend)
    dtypes = GradientDtypes(hidden.dtype, weight.dtype, acc)
    bias = bias if has_bias else None
    call = Head(hidden, weight, bias, head, token_loss, kernels, dtypes, logits_dtype=hidden.dtype)
    known = RowResults(*stats.to(acc), logp.to(acc), loss=torch.empty_like(logp, dtype=acc))
    blocks = VocabBlocks(block_cols, **{**EVERYTHING, **wanted})
    gradients = vocab_sweep_backward(call, labels, known, coefficient, blocks)
    gradients = gradients.times(None, dtypes, kernels, keeps=False)
    return gradients.hidden, gradients.weight, gradients.bias


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_cols", [1, 16, 75, 1000])
@pytest.mark.parametrize(
    ("head", "token_loss", "has_bias"),
    [
        (HeadTransform(), TokenLoss(), False),
        (HeadTransform(scale=0.5, softcap=4.0), TokenLoss(label_smoothing=0.1, z_loss=0.01), True),
    ],
)
def test_gradients(backend, dtype, block_cols, head, token_loss, has_bias):
    """One column, a tail block, exactly one block, and a block wider than the vocabulary."""
    if not get_backend(backend).available()[0]:
        pytest.skip(get_backend(backend).available()[1])
    problem = make_problem(dtype)
    stats, logp, *truth = autograd(problem, head, token_loss, torch.float64, has_bias=has_bias)
    plain = autograd(problem, head, token_loss, dtype, has_bias=has_bias)[2:]
    got = sweep(problem, head, token_loss, stats, logp, has_bias=has_bias, block_cols=block_cols, backend=backend)
    for name, value, exact, reference in zip(("hidden", "weight", "bias"), got, truth, plain, strict=True):
        if name == "bias" and not has_bias:
            continue
        error = (value.double() - exact).norm() / exact.norm()
        # Plain PyTorch in the same dtype, and the rounding of each block's sum where one column is a block.
        allowed = (reference.double() - exact).norm() / exact.norm() + 4 * torch.finfo(dtype).eps
        assert error <= allowed, f"d_{name}: {error:.2e}, allowed {allowed:.2e}"
    assert got[0].dtype == got[1].dtype == dtype
    assert (got[0][[0, 9]] == 0).all()


@pytest.mark.parametrize("skipped", ["want_hidden", "want_weight", "want_bias"])
def test_what_is_not_wanted_is_not_formed_and_changes_nothing(skipped):
    problem = make_problem(torch.float64)
    stats, logp, *_ = autograd(problem, HeadTransform(), TokenLoss(), torch.float64, has_bias=True)
    options = {"has_bias": True, "block_cols": 16}
    everything = sweep(problem, HeadTransform(), TokenLoss(), stats, logp, **options)
    without = sweep(problem, HeadTransform(), TokenLoss(), stats, logp, **options, **{skipped: False})
    for name, a, b in zip(EVERYTHING, everything, without, strict=True):
        if name == skipped:
            assert b is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_small_coefficients_survive_in_float16():
    """Coefficients of a thousandth times residuals of a millionth are below float16; their sums are not."""
    problem = list(make_problem(torch.float16))
    problem[4] = problem[4] * 1e-4
    stats, logp, *truth = autograd(problem, HeadTransform(), TokenLoss(), torch.float64, has_bias=False)
    got = sweep(problem, HeadTransform(), TokenLoss(), stats, logp, has_bias=False, block_cols=16)
    for value, exact in zip(got[:2], truth[:2], strict=True):
        assert (value.double() - exact).norm() / exact.norm() < 4e-3


def test_inputs_stay_as_they_are_and_bits_repeat():
    problem = make_problem(torch.bfloat16)
    before = [t.clone() for t in problem]
    stats, logp, *_ = autograd(problem, HeadTransform(), TokenLoss(), torch.float64, has_bias=True)
    first, second = (
        sweep(problem, HeadTransform(), TokenLoss(), stats, logp, has_bias=True, block_cols=16) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(problem, before, strict=True))


def test_block_cols_is_checked():
    problem = make_problem(torch.float32)
    with pytest.raises(ValueError, match="block_cols: expected at least 1, got 0"):
        sweep(
            problem,
            HeadTransform(),
            TokenLoss(),
            problem[4].expand(2, -1),
            problem[4],
            has_bias=False,
            block_cols=0,
        )
