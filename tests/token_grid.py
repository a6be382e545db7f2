"""The part of the grid for every backend that works on tokens: segment sums, SLIME terms, and the scale in place.

Truth and tolerance: `tests.backend_grid`. Segments of 0, 1, a few and 5000 tokens, and many of them; responses of 1
to 900 tokens, margins on both sides of the hinge and on it, a certain and a hopeless token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from slime_fused.backends.base import Backend, SlimePairs, SlimeWeights, acc_dtype
from tests.backend_grid import assert_as_exact

SEGMENTS = ((3, 1, 0, 7), (1,), (5000, 2), (1,) * 70)


def check_segment_sum(backend: Backend, lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Sums, means and their gradients over segments of any length, empty ones included."""
    generator = torch.Generator().manual_seed(sum(lengths))
    values = torch.randn(sum(lengths), generator=generator, dtype=torch.float64).to(dtype)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    cu_seqlens = bounds.to(torch.int32).to(device)
    pieces = torch.split(values, list(lengths))
    d_out = torch.randn(len(lengths), generator=generator, dtype=torch.float64).to(dtype)
    for mean in (False, True):
        divisors = [max(n, 1) if mean else 1 for n in lengths]
        truth = torch.stack([p.double().sum() / n for p, n in zip(pieces, divisors, strict=True)])
        plain = torch.stack([p.sum() / n for p, n in zip(pieces, divisors, strict=True)])
        out = torch.full((len(lengths),), torch.nan, dtype=dtype, device=device)
        backend.segment_sum(values.to(device), cu_seqlens, out, mean=mean)
        # A sum's rounding grows with the magnitude of what it adds, not with its result.
        volume = torch.stack([p.double().abs().sum() / n for p, n in zip(pieces, divisors, strict=True)])
        allowed = (plain.double() - truth).abs() + 8 * torch.finfo(dtype).eps * (volume + truth.abs())
        assert ((out.cpu().double() - truth).abs() <= allowed).all()
        d_values = torch.full_like(values, torch.nan, device=device)
        backend.segment_sum_backward(d_out.to(device), cu_seqlens, d_values, mean=mean)
        expected = torch.cat([(d / n).expand(len(p)) for d, n, p in zip(d_out, divisors, pieces, strict=True)])
        torch.testing.assert_close(d_values.cpu(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


WEIGHTS = {
    "sequence": SlimeWeights(0.1, 0.1, 1.0, 1.25, 1.5, 1.0, 2.5, 2.5, 0.25, 0.0),
    "token": SlimeWeights(0.3, 0.05, 2.0, 0.5, 2.0, 0.5, 1.5, 1.0, 0.125, 1 / 40),
}


def check_slime_terms(backend: Backend, weights: SlimeWeights, dtype: torch.dtype, device: torch.device) -> None:
    """Terms and g against autograd in float64: 1-token responses, very unequal pairs, both sides of the hinge."""
    generator = torch.Generator().manual_seed(5)
    lengths = (1, 40, 3, 700, 1, 2, 900, 7)
    num_pairs = len(lengths) // 2
    logp = (-3 * torch.rand(sum(lengths), generator=generator, dtype=torch.float64) ** 2).to(dtype)
    logp[:41] *= 0.01  # pairs 0 and 1: margins beyond margin_hard
    logp[-1] = 0.0  # a certain token
    logp[-2] = -80.0  # and a hopeless one
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    leaf = logp.detach().double().requires_grad_()
    parts = torch.split(leaf, list(lengths))
    chosen = torch.stack([p.mean() for p in parts[:num_pairs]])
    rejected = torch.stack([p.mean() for p in parts[num_pairs:]])
    w = weights
    margin = chosen - rejected
    anchor = -w.lambda_w * w.pair_weight * chosen
    gate = torch.sigmoid(-w.kappa * (margin - w.margin_soft))
    margin_loss = w.lambda_d * w.pair_weight * torch.relu(w.margin_hard - margin) * gate
    stabilizer = torch.stack(
        [
            (w.lambda_l * (w.token_weight or w.pair_weight / len(p)) * F.softplus(-p - w.delta) ** w.power).sum()
            for p in parts[num_pairs:]
        ]
    )
    (anchor + margin_loss + stabilizer).sum().backward()
    assert leaf.grad is not None
    truths = SlimePairs(chosen, rejected, anchor, margin_loss, stabilizer)

    out, again = (
        SlimePairs(*torch.full((5, num_pairs), torch.nan, dtype=dtype, device=device).unbind()) for _ in range(2)
    )
    d_logp = torch.full_like(logp, torch.nan, device=device)
    backend.slime_terms(logp.to(device), cu_seqlens.to(device), weights, out, d_logp)
    for name, truth in vars(truths).items():
        assert_as_exact(getattr(out, name), truth.detach(), truth.detach().to(dtype), name)
    assert_as_exact(d_logp, leaf.grad, leaf.grad.to(dtype), "d_logp")
    backend.slime_terms(logp.to(device), cu_seqlens.to(device), weights, again, None)
    assert all(torch.equal(a, b) for a, b in zip(vars(again).values(), vars(out).values(), strict=True))


def check_margin_at_the_hinge(backend: Backend, device: torch.device) -> None:
    """At D = margin_hard exactly the margin term has gradient 0, as the derivation says."""
    weights = replace(WEIGHTS["sequence"], lambda_w=0.0, lambda_l=0.0, pair_weight=1.0)
    logp = torch.tensor([-0.5, -2.0], device=device)  # D = 1.5 = margin_hard, without rounding
    cu_seqlens = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    d_logp = torch.full((2,), torch.nan, device=device)
    backend.slime_terms(logp, cu_seqlens, weights, SlimePairs(*torch.empty(5, 1, device=device).unbind()), d_logp)
    assert d_logp.tolist() == [0.0, 0.0]


def check_scale(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    """Any size and alignment; a factor of 1 leaves every bit."""
    for size in (0, 1, 7, 1025):
        for factor in (1.0, -0.37):
            tensor = torch.linspace(-3, 3, size + 1, device=device).to(dtype)[1:]
            expected = (tensor.cpu().double() * factor).to(dtype)
            number = torch.tensor(factor, dtype=acc_dtype(dtype), device=device)
            backend.scale_(tensor, number)
            if factor == 1.0:
                assert torch.equal(tensor.cpu(), expected)
            else:
                unit = torch.finfo(dtype).eps
                torch.testing.assert_close(tensor.cpu(), expected, rtol=unit, atol=0)
