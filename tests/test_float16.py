"""float16 gradients: one that fits its dtype comes out, one that does not is infinite, whatever factor follows.

The gradients of a loss are formed before anybody knows the upstream factor. These cases lie at both ends of
float16's range (65504, and 6e-8 for its least subnormal), with thousands of tokens summed, responses of very
different lengths, a large channel, and factors from a sixteenth to a loss scaler's 65536. Every plan, because each
sums in its own way; the last test goes over the range of magnitudes one by one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import slime_fused as sf
from slime_fused import reference
from slime_fused.engine.gradients import float16_scale
from tests.support import BACKENDS, Batch, assert_as_exact_as_plain, assert_close, make_batch, require_backend, run

FUNCTIONS = ("slime_loss", "linear_cross_entropy", "linear_logprobs")
ROWS = {"one_chunk": 1 << 20, "several": 3000, "few": 700}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


@pytest.fixture(params=ROWS)
def rows(request) -> int:
    """Rows that the workspace holds: everything, pairs, less than a pair."""
    return ROWS[request.param]


def large_channel(lengths: tuple[int, ...], channel: float = 12.0) -> Batch:
    """One hidden channel at ``channel``: all tokens add to its column of dW with one sign."""
    batch = make_batch(lengths, hidden_size=16, vocab_size=64, prompt=0, padding=0)
    hidden = batch.hidden.clone()
    hidden[..., 3] = channel
    labels = torch.where(batch.labels >= 0, batch.labels % 4, batch.labels)
    return replace(batch, hidden=hidden, labels=labels, weight=batch.weight / channel).to(torch.float16)


def mean_of(name: str):
    """The function, its per-token results averaged."""
    if name == "linear_logprobs":
        return (lambda *a, **k: sf.linear_logprobs(*a, **k).mean()), (
            lambda *a, upcast=True, **k: reference.linear_logprobs(*a, upcast=upcast, **k).mean()
        )
    return getattr(sf, name), getattr(reference, name)


@pytest.mark.parametrize("upstream", [1.0, 1 / 16, 1024.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_mean_of_thousands_of_tokens(name, upstream, rows, backend):
    """dW is about 10 per entry of the large channel, and N times that before the mean."""
    batch = large_channel((2048,) * 4)
    fused, plain = mean_of(name)
    workspace = rows * 64 * 2
    truth = run(plain, batch.to(torch.float64), upstream=upstream)
    assert 0.1 < truth.grads["weight"].abs().max() / upstream < 60
    assert truth.grads["weight"].abs().max() / upstream * 8192 > 65504 / 64
    assert_as_exact_as_plain(
        fused, plain, batch, options={}, upstream=upstream, backend=backend, workspace=workspace
    )


@pytest.mark.parametrize("name", ["slime_loss", "linear_cross_entropy"])
def test_the_same_under_autocast_with_a_float32_head(name, rows, backend):
    """dW is float32 and never float16: 65504 is no limit for it."""
    batch = large_channel((2048,) * 4).to(torch.float32)
    truth = run(getattr(reference, name), batch.to(torch.float64), upstream=65536.0)
    with torch.autocast("cpu", torch.float16):
        got = run(getattr(sf, name), batch, upstream=65536.0, backend=backend, workspace=rows * 64 * 2)
    assert truth.grads["weight"].abs().max() > 65504
    for key, grad in got.grads.items():
        assert_close(f"d_{key}", grad, truth.grads[key], truth.grads[key], 4 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_does_not_fit_is_infinite(name, rows, backend):
    """As plain PyTorch's under a loss scaler, so that the scaler sees it; nothing else is touched."""
    fused, plain = mean_of(name)
    batch = large_channel((2048,) * 4)
    truth = run(plain, batch.to(torch.float64), upstream=2.0**15)
    got = run(fused, batch, upstream=2.0**15, backend=backend, workspace=rows * 64 * 2)
    beyond = truth.grads["weight"].abs() > 65504 * 1.01
    assert beyond.any()
    assert torch.isinf(got.grads["weight"][beyond]).all()
    within = truth.grads["weight"].abs() < 65504 * 0.99
    error = (got.grads["weight"].double() - truth.grads["weight"])[within].abs().max()
    assert error <= 8 * torch.finfo(torch.float16).eps * 65504
    assert torch.isfinite(got.grads["hidden"]).all()


@pytest.mark.parametrize("lengths", [(1, 4000, 3, 2), (4000, 1, 1, 1)], ids=str)
def test_short_responses_beside_long_ones(lengths, rows, backend):
    """The coefficient of a response of one token is thousands of times that of a token of a long one."""
    batch = large_channel(lengths, channel=60.0)
    for upstream in (1.0, 65536.0 / 4096):
        assert_as_exact_as_plain(
            sf.slime_loss,
            reference.slime_loss,
            batch,
            options={},
            upstream=upstream,
            backend=backend,
            workspace=rows * 64 * 2,
        )


@pytest.mark.parametrize("exponent", [-13, -6, 0, 8, 15])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_hidden_states_of_any_size(name, exponent, rows, backend):
    """From the least normal number to 32768, against weights that make ordinary logits of them."""
    fused, plain = mean_of(name)
    batch = make_batch((600, 500, 700, 400), hidden_size=4, vocab_size=40, prompt=0, padding=0)
    hidden = (batch.hidden.clamp(-1.9, 1.9) * 2.0**exponent).half()
    weight = (batch.weight / 2.0 ** max(exponent, -10)).half()
    batch = replace(batch.to(torch.float16), hidden=hidden, weight=weight)
    assert_as_exact_as_plain(
        fused, plain, batch, options={}, upstream=1.0, roundings=2.0, backend=backend, workspace=rows * 40 * 2
    )


def test_a_hopeless_token_does_not_overflow(backend):
    """The stabilizer's coefficient grows without bound (here to 700) while the gradient, a mean's, fits."""
    batch = large_channel((400, 300, 200, 500), channel=40.0)
    batch = replace(batch, weight=batch.weight * 120)
    truth = run(reference.slime_loss, batch.to(torch.float64))
    assert truth.outputs["rejected_logps"].min() < -100
    assert truth.grads["weight"].abs().max() < 65504
    assert_as_exact_as_plain(sf.slime_loss, reference.slime_loss, batch, options={}, backend=backend)


@pytest.mark.parametrize(
    ("scale", "z_loss"), [(1.0, 0.0), (1 / 16, 0.0), (1 / 1024, 0.0), (-0.3, 0.0), (2000.0, 0.0), (50.0, 0.5)]
)
@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_logprobs"])
def test_small_and_large_residuals(name, scale, z_loss, rows, backend):
    """Probabilities of 1e-4 to 1e-9 times a logit scale: the residual itself leaves float16 at either end.

    Each row of dW for itself: a token that is no label has gradients that are small beside those of the labels.
    """
    batch = make_batch((16, 16, 16, 16), hidden_size=8, vocab_size=5001, prompt=0, padding=0, spread=3.0)
    batch = replace(batch, weight=batch.weight / max(abs(scale), 1.0)).to(torch.float16)
    options = {"logit_scale": scale}
    fused, plain = mean_of(name)
    if name == "linear_cross_entropy":
        options["z_loss"] = z_loss
    upstream = 65536.0 / max(1.0, 64 * abs(scale))
    truth = run(plain, batch.to(torch.float64), upstream=upstream, **options)
    naive = run(plain, batch, upstream=upstream, **options)
    got = run(fused, batch, upstream=upstream, backend=backend, workspace=max(rows // 100, 9) * 5008 * 2, **options)
    eps = torch.finfo(torch.float16).eps
    for key, grad in got.grads.items():
        exact = truth.grads[key].flatten(0, -2)
        seen = exact.norm(dim=1) > 1e-3  # the others are below float16's normal numbers
        assert seen.float().mean() > 0.5
        errors = [
            ((x.double().flatten(0, -2) - exact).norm(dim=1) / exact.norm(dim=1))[seen]
            for x in (grad, naive.grads[key])
        ]
        assert errors[0].median() <= errors[1].median() + 2 * eps, key
        assert errors[0].quantile(0.99) <= 1.5 * errors[1].quantile(0.99) + 4 * eps, key


@pytest.mark.parametrize("coefficient", [0.0, 1e-30, 3e-7, 1.0, 500.0, 1e30])
def test_the_scale_of_a_product(coefficient):
    """A power of two, and the largest product is in [2^14, 2^15) unless that is out of float32's reach."""
    rows = torch.tensor([[0.0, -3.0], [0.25, 0.125]]).half()
    scale = float16_scale(rows, torch.tensor([-coefficient, 0.5 * coefficient]))
    assert torch.frexp(scale).mantissa == 0.5
    largest = 3.0 * coefficient * scale.item()
    assert coefficient in (0.0, 1e-30) or 2**14 <= largest < 2**15
    assert largest < 2**15


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_the_scale_of_what_is_not_finite(value):
    assert float16_scale(torch.ones(2, 3).half(), torch.tensor([value, 1.0])) == 1.0
    assert float16_scale(torch.ones(0, 3).half(), torch.ones(0)) == 1.0
