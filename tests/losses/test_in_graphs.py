"""Losses that a compiled function makes itself: its graph finds the value by its name, as one from outside."""

from __future__ import annotations

import pytest
import torch

import slime_fused as sf

MADE = {
    "simpo": lambda: sf.losses.SimPO(beta=3.0, gamma=0.5),
    "cpo": lambda: sf.losses.CPO(beta=0.2, nll_weight=0.5),
    "slime": lambda: sf.losses.Slime(lambda_w=0.3, stabilizer_reduction="token"),
    "sft": lambda: sf.losses.SFT(),
}
"""Numbers, integers, strings, nothing: the kinds of fields that a name is made of."""


@pytest.mark.parametrize("made", MADE)
def test_a_loss_made_in_the_graph(made):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(50, (4, 6), generator=generator)

    def step(hidden, weight):
        return sf.preference_loss(hidden, weight, labels, loss=MADE[made]()).loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(hidden, weight)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
