"""Losses whose derivative is autograd's, inside the operator that a compiled graph calls.

One loss per unit, one with references, one of your own, one that needs the whole batch: each way that log-probs
reach a formula. The operator itself, and SLIME's kernel in it, are tested in `tests/test_compile.py`.
"""

from __future__ import annotations

import pytest
import torch

import slime_fused as sf
from slime_fused import losses as L


def hinge(pairs):
    return torch.relu(1 - (pairs.chosen_mean_logps - pairs.rejected_mean_logps))


OWN = L.Own(hinge)
REFERENCES = {"ref_sum_logps": torch.tensor([-20.0, -22.0, -19.0, -25.0], dtype=torch.float64)}
DESIRABLE = {"desirable": torch.tensor([True, False, False, True])}
CASES = {
    "pair": ("preference_loss", L.SimPO(), {}),
    "references": ("preference_loss", L.DPO(), REFERENCES),
    "own": ("preference_loss", OWN, {}),
    "sequence": ("preference_loss", L.KTO(), {**REFERENCES, **DESIRABLE, "kl_baseline": 0.1}),
    "batch": ("preference_loss", L.KTO(baseline="batch"), {**REFERENCES, **DESIRABLE}),
    "token": ("token_policy_loss", L.PolicyGradient(), {"advantages": torch.tensor([1.0, -0.5, 0.3, -0.8])}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_graph(case):
    name, loss, given = CASES[case]
    torch._dynamo.reset()
    torch.manual_seed(0)
    hidden = torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(32, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 32, (4, 6))

    def total(hidden, weight):
        return getattr(sf, name)(hidden, weight, labels, loss=loss, **given).loss

    got = torch.compile(total, fullgraph=True, backend="aot_eager")(hidden, weight)
    expected = getattr(sf.reference, name)(hidden, weight, labels, loss=loss, **given).loss
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(x, (hidden, weight)) for x in (got, expected))
    for gradient, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-10, atol=1e-12)
