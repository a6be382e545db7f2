"""The numbers of the SLIME loss: worked by hand, and by the authors' formula written independently here."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch import Tensor

import slime_fused as sf
from tests.support import BACKENDS, make_batch, require_backend

CHOSEN, REJECTED = [-0.5, -1.5], [-2.0, -1.0, -3.0]


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


def worked_example() -> tuple[Tensor, Tensor]:
    logp = torch.tensor(CHOSEN + REJECTED, dtype=torch.float64, requires_grad=True)
    return logp, torch.tensor([0, 2, 5], dtype=torch.int32)


def test_worked_values(backend):
    logp, bounds = worked_example()
    out = sf.slime_terms(logp, bounds, backend=backend)
    assert out.chosen_logps.tolist() == [-1.0]
    assert out.rejected_logps.tolist() == [-2.0]
    assert out.margins.tolist() == [1.0]
    assert out.accuracy.item() == 1.0
    assert out.anchor.item() == pytest.approx(0.1, abs=1e-15)
    assert out.margin_loss.item() == pytest.approx(0.25, abs=1e-15)
    assert out.stabilizer.item() == pytest.approx(0.22243597, abs=5e-9)
    assert out.loss.item() == pytest.approx(0.57243597, abs=5e-9)


def test_worked_gradient(backend):
    logp, bounds = worked_example()
    sf.slime_terms(logp, bounds, backend=backend).loss.backward()
    d_margin = -(0.5 + 2.5 * 0.5 * 0.25)
    expected = [(-0.1 + d_margin) / 2] * 2
    for value in REJECTED:
        u = -value - 1.25
        softplus, sigmoid = math.log1p(math.exp(u)), 1 / (1 + math.exp(-u))
        expected.append(-d_margin / 3 - 0.1 * 2.5 * softplus**1.5 * sigmoid / 3)
    assert expected[0] == -0.45625
    torch.testing.assert_close(logp.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-15)


def test_gradient_ends_at_the_hinge(backend):
    """D = margin_hard exactly: the subgradient is 0, as relu's in PyTorch."""
    logp = torch.tensor([-1.0, -2.5], dtype=torch.float64, requires_grad=True)
    config = sf.SlimeLossConfig(lambda_w=0, lambda_l=0)
    sf.slime_terms(logp, torch.tensor([0, 1, 2], dtype=torch.int32), config, backend=backend).loss.backward()
    assert logp.grad.tolist() == [0.0, 0.0]


def authors_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """One pass of the authors' loss (arXiv 2602.02383, their trainer), on padded logits in concatenated order."""
    logp = torch.log_softmax(logits, -1)
    keep = labels != -100
    token = torch.gather(logp, 2, labels.clamp(min=0).unsqueeze(2)).squeeze(2) * keep
    mean = token.sum(-1) / keep.sum(-1)
    half = len(labels) // 2
    chosen, rejected = mean[:half], mean[half:]
    delta = chosen - rejected
    likelihood = -0.1 * chosen.mean()
    margin = (1.0 * torch.relu(1.5 - delta) * torch.sigmoid(-2.5 * (delta - 1.0))).mean()
    penalty = torch.nn.functional.softplus(-token[half:] - 1.25) ** 2.5
    stabilizer = 0.0005 * penalty[keep[half:]].mean()
    return likelihood + margin + stabilizer


@pytest.mark.parametrize("triple", [False, True])
def test_authors_code(triple, backend):
    batch = make_batch((1, 7, 3, 12, 2, 5)).leaves()
    expected = authors_loss(batch.hidden @ batch.weight.T, batch.labels) * (3 if triple else 1)
    wanted = torch.autograd.grad(expected, [batch.hidden, batch.weight])
    config = sf.SlimeLossConfig.authors_code(triple=triple)
    loss = batch.call(sf.slime_loss, config=config, backend=backend).loss
    got = torch.autograd.grad(loss, [batch.hidden, batch.weight])
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-14)


def test_reductions_differ_where_lengths_do(backend):
    batch = make_batch((2, 2, 1, 30))
    by_sequence, by_token = (
        batch.call(sf.slime_loss, backend=backend, config=sf.SlimeLossConfig(stabilizer_reduction=name))
        for name in ("sequence", "token")
    )
    assert by_sequence.anchor == by_token.anchor
    assert by_sequence.margin_loss == by_token.margin_loss
    assert abs(by_sequence.stabilizer - by_token.stabilizer) > 1e-3


def test_output_fields(backend):
    batch = make_batch(dtype=torch.float32).leaves()
    out = batch.call(sf.slime_loss, backend=backend)
    pairs = len(batch.labels) // 2
    for scalar in (out.loss, out.anchor, out.margin_loss, out.stabilizer, out.accuracy):
        assert scalar.shape == ()
        assert scalar.dtype == torch.float32
    for vector in (out.chosen_logps, out.rejected_logps, out.margins):
        assert vector.shape == (pairs,)
        assert vector.dtype == torch.float32
    assert out.loss.requires_grad
    for name in ("anchor", "margin_loss", "stabilizer", "chosen_logps", "rejected_logps", "margins", "accuracy"):
        assert not getattr(out, name).requires_grad, name
    torch.testing.assert_close(out.anchor + out.margin_loss + out.stabilizer, out.loss.detach(), rtol=1e-6, atol=0)
    expected = sum(float(w > r) for w, r in zip(out.chosen_logps, out.rejected_logps, strict=True)) / pairs
    assert out.accuracy.item() == pytest.approx(expected)


def test_accuracy_counts_margins_above_zero(backend):
    logp = torch.tensor([-1.0, -1.0, -1.0, -1.1, -1.0, -0.9])
    out = sf.slime_terms(logp, torch.arange(7, dtype=torch.int32), backend=backend)
    torch.testing.assert_close(out.margins, torch.tensor([0.1, 0.0, -0.1]))
    assert out.accuracy.item() == pytest.approx(1 / 3)


def test_swapped_pairs_negate_margins_and_mirror_accuracy(backend):
    batch = make_batch()
    swapped = dataclasses.replace(batch, hidden=batch.hidden.roll(3, 0), labels=batch.labels.roll(3, 0))
    out, other = (b.call(sf.slime_loss, backend=backend) for b in (batch, swapped))
    # Two products: where a row stands may change the order of its sum.
    torch.testing.assert_close(out.margins, -other.margins, rtol=1e-12, atol=1e-13)
    assert out.accuracy + other.accuracy == 1


def test_config_defaults_are_the_papers():
    assert dataclasses.asdict(sf.SlimeLossConfig()) == {
        "lambda_w": 0.1,
        "lambda_l": 0.1,
        "lambda_d": 1.0,
        "delta": 1.25,
        "margin_hard": 1.5,
        "margin_soft": 1.0,
        "kappa": 2.5,
        "power": 2.5,
        "stabilizer_reduction": "sequence",
    }


def test_config_is_frozen_hashable_and_copies():
    config = sf.SlimeLossConfig(kappa=3.0, stabilizer_reduction="token")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.kappa = 1.0
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), dataclasses.replace(config)):
        assert twin == config
        assert hash(twin) == hash(config)
    with pytest.raises(ValueError, match=r"power: .* 0"):
        dataclasses.replace(config, power=0)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("lambda_w", -0.1, ValueError),
        ("lambda_l", -1, ValueError),
        ("lambda_d", -1e-9, ValueError),
        ("kappa", 0, ValueError),
        ("kappa", -2.5, ValueError),
        ("power", 0.99, ValueError),
        ("delta", math.nan, ValueError),
        ("margin_hard", math.inf, ValueError),
        ("margin_soft", -math.inf, ValueError),
        ("lambda_w", "0.1", TypeError),
        ("lambda_d", None, TypeError),
        ("delta", True, TypeError),
        ("stabilizer_reduction", "mean", ValueError),
        ("stabilizer_reduction", None, ValueError),
    ],
)
def test_config_refuses(field, value, error):
    with pytest.raises(error) as caught:
        sf.SlimeLossConfig(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field}: expected ")
    assert message.endswith(f"got {value!r}")


@pytest.mark.parametrize("module", [sf.SlimeLoss(), sf.SlimeLoss(sf.SlimeLossConfig(kappa=2.0), shift=True)])
def test_module_is_the_function(module, backend):
    batch = make_batch(has_bias=True)
    out = module(batch.hidden, batch.weight, batch.labels, bias=batch.bias)
    expected = batch.call(sf.slime_loss, config=module.config, **module.options)
    assert torch.equal(out.loss, expected.loss)
    assert "kappa" in repr(module)
    assert torch.equal(
        pickle.loads(pickle.dumps(module))(batch.hidden, batch.weight, batch.labels, bias=batch.bias).loss, out.loss
    )


def test_cross_entropy_module_is_the_function():
    batch = make_batch(has_bias=True)
    module = sf.LinearCrossEntropyLoss(reduction="sum", label_smoothing=0.1)
    got = module(batch.hidden, batch.weight, batch.labels, bias=batch.bias)
    assert torch.equal(got, batch.call(sf.linear_cross_entropy, reduction="sum", label_smoothing=0.1))
    assert "label_smoothing" in repr(module)
