"""The Triton segment kernels against the float64 oracle: lengths around one block (1024 tokens), and empty ones."""

from __future__ import annotations

import pytest
import torch

from tests.triton_support import DEVICE, skip_unless_kernels_run

skip_unless_kernels_run()

from slime_fused.backends.base import SlimePairs, SlimeWeights  # noqa: E402
from slime_fused.backends.torch import TorchBackend  # noqa: E402
from slime_fused.backends.triton import TritonBackend  # noqa: E402

pytestmark = pytest.mark.gpu

TRITON = TritonBackend()
PLAIN = TorchBackend()
LENGTHS = [1, 1023, 1024, 0, 2500, 7]


def make_cu_seqlens(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("mean", [False, True])
def test_segment_sum_and_backward(mean):
    cu_seqlens = make_cu_seqlens(LENGTHS)
    values = torch.randn(sum(LENGTHS), device=DEVICE)
    out, exact = torch.full((6,), 7.0, device=DEVICE), torch.empty(6, dtype=torch.float64, device=DEVICE)
    TRITON.segment_sum(values, cu_seqlens, out, mean=mean)
    PLAIN.segment_sum(values.double(), cu_seqlens, exact, mean=mean)
    torch.testing.assert_close(out.double(), exact, atol=2e-5, rtol=2e-6)
    assert out[3] == 0

    d_out = torch.randn(6, device=DEVICE)
    d_values, d_exact = torch.full_like(values, 7.0), torch.empty_like(values, dtype=torch.float64)
    TRITON.segment_sum_backward(d_out, cu_seqlens, d_values, mean=mean)
    PLAIN.segment_sum_backward(d_out.double(), cu_seqlens, d_exact, mean=mean)
    torch.testing.assert_close(d_values.double(), d_exact, atol=0, rtol=3e-7)


def slime_of(backend, logp, cu_seqlens, weights, *, want_gradient=True):
    pairs = (cu_seqlens.shape[0] - 1) // 2
    terms = SlimePairs(*torch.full((5, pairs), 7.0, dtype=logp.dtype, device=logp.device).unbind())
    d_logp = torch.full_like(logp, 7.0) if want_gradient else None
    backend.slime_terms(logp, cu_seqlens, weights, terms, d_logp)
    return {**vars(terms), "d_logp": d_logp}


def make_weights(**overrides):
    values = {
        "lambda_w": 0.1,
        "lambda_l": 0.1,
        "lambda_d": 1.0,
        "delta": 1.25,
        "margin_hard": 1.5,
        "margin_soft": 1.0,
        "kappa": 2.5,
        "power": 2.5,
        "pair_weight": 1 / 3,
        "token_weight": 0.0,
    }
    return SlimeWeights(**{**values, **overrides})


@pytest.mark.parametrize(
    "overrides", [{}, {"token_weight": 1 / 3531}, {"power": 1.0, "kappa": 40.0}, {"lambda_l": 0.0}]
)
def test_slime_terms(overrides):
    lengths = [5, 1025, 1024, 1, 2500, 1030]
    cu_seqlens, weights = make_cu_seqlens(lengths), make_weights(**overrides)
    torch.manual_seed(0)
    logp = -torch.rand(sum(lengths), device=DEVICE) * 6
    logp[1050:2054] -= 2  # the third pair's chosen response: a margin on the other side of both thresholds
    exact = slime_of(PLAIN, logp.double(), cu_seqlens, weights)
    actual = slime_of(TRITON, logp, cu_seqlens, weights)
    for name, truth in exact.items():
        torch.testing.assert_close(actual[name].double(), truth, atol=1e-9, rtol=5e-6, msg=lambda m, n=name: n + m)
    without = slime_of(TRITON, logp, cu_seqlens, weights, want_gradient=False)
    assert torch.equal(without["stabilizer"], actual["stabilizer"])


def test_worked_example():
    """P = 1, chosen -0.5, -1.5, rejected -2, -1, -3, the paper's constants: values computed by hand."""
    logp = torch.tensor([-0.5, -1.5, -2.0, -1.0, -3.0], device=DEVICE)
    result = slime_of(TRITON, logp, make_cu_seqlens([2, 3]), make_weights(pair_weight=1.0))
    assert result["anchor"].item() == pytest.approx(0.1, rel=1e-6)
    assert result["margin_loss"].item() == pytest.approx(0.25, rel=1e-6)
    assert result["stabilizer"].item() == pytest.approx(0.22243597, rel=1e-6)
    assert result["d_logp"][:2].tolist() == pytest.approx([-0.45625, -0.45625], rel=1e-6)


def test_extreme_log_probabilities_stay_finite():
    """Tokens of probability 1 and of e^-80 in one response: softplus and its powers neither vanish nor overflow."""
    logp = torch.tensor([0.0, -80.0, -1e-6, -80.0, 0.0, -40.0], device=DEVICE)
    cu_seqlens, weights = make_cu_seqlens([3, 3]), make_weights(pair_weight=1.0)
    exact = slime_of(PLAIN, logp.double(), cu_seqlens, weights)
    for name, value in slime_of(TRITON, logp, cu_seqlens, weights).items():
        torch.testing.assert_close(value.double(), exact[name], atol=1e-9, rtol=5e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0])
def test_scale(dtype, factor):
    tensor = torch.randn(3, 5001, device=DEVICE).to(dtype)
    expected = (tensor.double() * torch.tensor(factor).double().item()).float().to(dtype)
    before = tensor.clone()
    TRITON.scale_(tensor, torch.tensor([factor], device=DEVICE))
    torch.testing.assert_close(tensor, expected, atol=0, rtol=torch.finfo(dtype).eps)
    assert torch.equal(tensor, before) == (factor == 1.0)


def test_nothing_to_do():
    empty, cu_seqlens = torch.empty(0, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    TRITON.segment_sum(empty, cu_seqlens, empty, mean=True)
    TRITON.segment_sum_backward(empty, cu_seqlens, empty, mean=True)
    TRITON.scale_(empty, torch.tensor([2.0], device=DEVICE))
    assert slime_of(TRITON, empty, cu_seqlens, make_weights())["anchor"].numel() == 0
