"""The bare loop of examples/ trains, and each of its steps is the one that plain PyTorch would have made."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

from slime_fused import reference

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import bare_loop


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_a_step_of_the_bare_loop_is_that_of_the_reference(dtype, tolerance):
    torch.manual_seed(1)
    model = bare_loop.TinyDecoder().to(dtype)
    ids, labels = bare_loop.make_batch(3, torch.Generator().manual_seed(1))
    out = bare_loop.training_step(model, ids, labels)
    out.loss.backward()
    plain = copy.deepcopy(model).double()
    plain.zero_grad()
    expected = reference.slime_loss(plain(ids), plain.head.weight, labels, shift=True)
    expected.loss.backward()
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=tolerance, atol=0)
    for name in ("anchor", "margin_loss", "stabilizer", "chosen_logps", "rejected_logps"):
        torch.testing.assert_close(
            getattr(out, name).double(), getattr(expected, name), rtol=tolerance, atol=tolerance, msg=name
        )
    gradients = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        grad = gradients[name].grad
        floor = tolerance * float(grad.abs().max())
        torch.testing.assert_close(parameter.grad.double(), grad, rtol=50 * tolerance, atol=5 * floor, msg=name)
        assert float(grad.abs().max()) > 0, name


def test_the_bare_loop_learns(capsys):
    bare_loop.main()
    assert "step 60: loss" in capsys.readouterr().out
    torch.manual_seed(0)
    said = bare_loop.train(bare_loop.TinyDecoder(), steps=40)
    assert said[-1].loss.item() < 0.8 * said[0].loss.item()
    assert said[-1].margins.mean().item() > 1.0
