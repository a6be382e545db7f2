"""Segment sums and SLIME terms of the native CPU module: order, threads, extremes and bad offsets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from slime_fused.backends.base import SlimePairs, SlimeWeights
from slime_fused.backends.cpu import CpuBackend

BACKEND = CpuBackend()
if not BACKEND.available()[0]:
    pytest.skip(BACKEND.available()[1], allow_module_level=True)

PAPER = SlimeWeights(
    lambda_w=0.1, lambda_l=0.1, lambda_d=1.0, delta=1.25, margin_hard=1.5, margin_soft=1.0, kappa=2.5, power=2.5,
    pair_weight=1.0, token_weight=0.0,
)  # fmt: skip


def terms(logp, lengths, weights=PAPER):
    """All outputs of slime_terms by name, ``d_logp`` among them."""
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    out = SlimePairs(*(torch.full((len(lengths) // 2,), 7.0, dtype=logp.dtype) for _ in range(5)))
    d_logp = torch.full_like(logp, 7.0)
    BACKEND.slime_terms(logp, cu_seqlens, weights, out, d_logp)
    return {**vars(out), "d_logp": d_logp}


def autograd_terms(logp, lengths, weights):
    """The three terms and d_logp by autograd in float64, written from the formulas of the paper."""
    logp = logp.double().detach().requires_grad_()
    parts = logp.split(lengths)
    pairs = len(lengths) // 2
    m_w, m_l = (torch.stack([part.mean() for part in half]) for half in (parts[:pairs], parts[pairs:]))
    margin = m_w - m_l
    anchor = -weights.lambda_w * weights.pair_weight * m_w
    hinge = (weights.margin_hard - margin).clamp(min=0)
    gate = torch.sigmoid(-weights.kappa * (margin - weights.margin_soft))
    margin_loss = weights.lambda_d * weights.pair_weight * hinge * gate
    penalties = [torch.nn.functional.softplus(-part - weights.delta) ** weights.power for part in parts[pairs:]]
    if weights.token_weight:
        stabilizer = torch.stack([p.sum() for p in penalties]) * weights.lambda_l * weights.token_weight
    else:
        stabilizer = torch.stack([p.mean() for p in penalties]) * weights.lambda_l * weights.pair_weight
    (d_logp,) = torch.autograd.grad((anchor + margin_loss + stabilizer).sum(), logp)
    return {"anchor": anchor, "margin_loss": margin_loss, "stabilizer": stabilizer, "d_logp": d_logp}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("token_weight", [0.0, 1 / 57])
def test_terms_and_gradient_match_autograd(dtype, token_weight):
    lengths = [3, 1, 40, 17, 20, 20, 5, 12]
    weights = dataclasses.replace(PAPER, pair_weight=0.25, token_weight=token_weight)
    logp = -(torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    got = terms(logp, lengths, weights)
    for name, expected in autograd_terms(logp, lengths, weights).items():
        # Arithmetic is double throughout: what remains is the rounding of the result, and of both sums in double.
        eps = torch.finfo(dtype).eps
        np.testing.assert_allclose(got[name], expected.detach(), rtol=2 * eps, atol=4e-16, err_msg=name)


def test_worked_example_by_hand():
    got = terms(torch.tensor([-0.5, -1.5, -2.0, -1.0, -3.0], dtype=torch.float64), [2, 3])
    assert got["chosen_logps"].item() == -1
    assert got["rejected_logps"].item() == -2
    assert got["anchor"].item() == pytest.approx(0.1, rel=1e-15)
    assert got["margin_loss"].item() == pytest.approx(0.25, rel=1e-15)
    assert got["stabilizer"].item() == pytest.approx(0.22243597, rel=1e-7)
    np.testing.assert_allclose(got["d_logp"][:2], -0.45625, rtol=1e-15)


def test_a_margin_at_the_hinge_has_no_gradient():
    weights = dataclasses.replace(PAPER, lambda_w=0.0, lambda_l=0.0)
    at_hinge = terms(torch.tensor([-0.5, -2.0], dtype=torch.float64), [1, 1], weights)
    assert (at_hinge["d_logp"] == 0).all()
    assert at_hinge["margin_loss"] == 0
    inside = terms(torch.tensor([-0.5, -1.999], dtype=torch.float64), [1, 1], weights)
    assert (inside["d_logp"] != 0).all()


def test_extreme_log_probabilities():
    certain = terms(torch.zeros(2), [1, 1])
    assert all(torch.isfinite(value).all() for value in certain.values())
    distant = terms(torch.tensor([-1.0, -1e4]), [1, 1])
    assert all(torch.isfinite(value).all() for value in distant.values())
    # An impossible chosen token: infinite loss, yet the limit of the gradient exists and is finite.
    impossible = terms(torch.tensor([-float("inf"), -1.0]), [1, 1])
    assert impossible["margin_loss"] == impossible["anchor"] == float("inf")
    np.testing.assert_allclose(impossible["d_logp"][0], -1.1, rtol=1e-6)
    assert terms(torch.tensor([float("nan"), -1.0]), [1, 1])["margin_loss"].isnan().all()


def test_segments_do_not_depend_on_threads_and_empty_ones_are_zero():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 300, (200,), generator=generator)
    lengths[17] = 0
    cu_seqlens = torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32)
    values = torch.randn(int(lengths.sum()), generator=generator)
    before = torch.get_num_threads()
    try:
        for mean in (False, True):
            exact = torch.segment_reduce(values.double(), "sum", lengths=lengths)
            divisor = lengths.clamp(min=1).double() if mean else torch.ones(200).double()
            sums, gradients = [], []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                sums.append(torch.full((200,), 7.0))
                gradients.append(torch.full_like(values, 7.0))
                BACKEND.segment_sum(values, cu_seqlens, sums[-1], mean=mean)
                BACKEND.segment_sum_backward(sums[0], cu_seqlens, gradients[-1], mean=mean)
            np.testing.assert_allclose(sums[0], exact / divisor, rtol=1e-6, atol=1e-12)
            spread = (sums[0].double() / divisor).repeat_interleave(lengths).float()
            assert torch.equal(gradients[0], spread)
            assert sums[0][17] == 0
            assert torch.equal(sums[0], sums[1])
            assert torch.equal(sums[0], sums[2])
            assert torch.equal(gradients[0], gradients[1])
            assert torch.equal(gradients[0], gradients[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 3, 2], "got 2 after 3 at index 2"),
        ([-1, 3, 4], "got -1 after 0 at index 0"),
        ([0, 3, 9], r"within \[0, 4\], got 9"),
    ],
)
def test_offsets_that_leave_the_values_are_refused(offsets, message):
    with pytest.raises(ValueError, match=message):
        BACKEND.segment_sum(torch.ones(4), torch.tensor(offsets, dtype=torch.int32), torch.empty(2), mean=False)


def test_an_odd_number_of_sequences_is_refused():
    with pytest.raises(ValueError, match=r"expected an even number of segments .* got 3"):
        terms(torch.zeros(3), [1, 1, 1])
