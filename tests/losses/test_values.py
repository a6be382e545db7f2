"""Every loss's values and gradients against its published formula, written a second time in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_fused import losses as L
from slime_fused import reference
from tests.losses.batches import batches, evaluate, given_for, random_batch
from tests.losses.formulas import CASES, ORACLES, oracle

BACKENDS = ("cpu", "torch")


def differing_fields(loss):
    return ",".join(
        f"{f.name}={getattr(loss, f.name)}" for f in dataclasses.fields(loss) if getattr(loss, f.name) != f.default
    )


CASE = pytest.mark.parametrize("loss", CASES, ids=lambda loss: f"{type(loss).__name__}({differing_fields(loss)})")


def assert_close(got, expected, *, rtol, atol=0.0, label=""):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=lambda text: f"{label}: {text}")


@CASE
@given(drawn=batches())
@settings(max_examples=20, deadline=None)
def test_float64_equals_the_published_formula_on_hostile_log_probs(loss, drawn):
    batch = given_for(loss, drawn)
    terms, d_logps = evaluate(loss, batch)
    shares, expected = oracle(loss, batch)
    # Sums of up to eight numbers as large as 1e4 in float64, squared by IPO and raised to 2.5 by SLIME: their
    # rounding errors are below 1e-11 of the largest number that enters.
    largest = 1 + batch.logps.abs().max().item()
    assert_close(terms.loss, shares, rtol=1e-9, atol=1e-11 * largest)
    assert_close(d_logps, expected, rtol=1e-9, atol=1e-11 * largest)


@CASE
@given(drawn=batches(st.floats(-8, -1e-3)))
@settings(max_examples=10, deadline=None)
def test_float32_is_as_exact_as_plain_pytorch(loss, drawn):
    rounded = dataclasses.replace(
        drawn,
        logps=drawn.logps.float().double(),
        given={k: v.float().double() if v.is_floating_point() else v for k, v in drawn.given.items()},
    )
    batch = given_for(loss, rounded)
    terms, d_logps = evaluate(loss, batch, torch.float32)
    got, plain, truth = (terms.loss, d_logps), oracle(loss, batch, torch.float32), oracle(loss, batch)
    floor = 64 * torch.finfo(torch.float32).eps
    for ours, naive, expected in zip(got, plain, truth, strict=True):
        assert ours.dtype == torch.float32
        tolerance = 4 * (naive.double() - expected).abs().max() + floor * (1 + expected.abs().max())
        assert ((ours.double() - expected).abs() <= tolerance).all(), (ours, expected)


@CASE
@given(drawn=batches())
@settings(max_examples=10, deadline=None)
def test_float32_stays_finite_on_hostile_log_probs(loss, drawn):
    terms, d_logps = evaluate(loss, given_for(loss, drawn), torch.float32)
    assert terms.loss.isfinite().all()
    assert d_logps.isfinite().all()


@CASE
@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_sum_to_the_loss_and_names_are_kept(loss, backend):
    terms, d_logps = evaluate(loss, given_for(loss, random_batch()), backend=backend)
    shares, expected = oracle(loss, given_for(loss, random_batch()))
    assert_close(terms.loss, shares, rtol=1e-10)
    assert_close(d_logps, expected, rtol=1e-10, atol=1e-15)
    assert (tuple(terms.terms), tuple(terms.metrics)) == (loss.term_names, loss.metric_names)
    if terms.terms:
        assert_close(sum(terms.terms.values()), terms.loss, rtol=1e-12)
    plain, nothing = evaluate(loss, given_for(loss, random_batch()), backend=backend, wants_gradient=False)
    assert nothing is None
    assert_close(plain.loss, terms.loss, rtol=0)


@CASE
def test_a_chunk_of_the_batch_gets_its_share(loss):
    """What streaming relies on: some units, with the whole batch's counts, have the values they have among all."""
    if loss.needs_batch:
        pytest.skip("sees all units at once")
    batch = random_batch()
    whole, d_whole = evaluate(loss, given_for(loss, batch))
    pairs = len(batch.lengths) // 2
    sequences = [0, 2, pairs, pairs + 2] if loss.unit == "pair" else [1, 3]
    part, places = batch.select(sequences)
    units = dataclasses.replace(given_for(loss, part).units(loss.unit), batch=batch.counts)
    terms, d_part = (
        loss.evaluate(units, None, wants_gradient=True)
        if not isinstance(loss, L.Slime)
        else (L.Formula.evaluate(loss, units, None, wants_gradient=True))
    )
    index = {"pair": torch.tensor([0, 2]), "sequence": torch.tensor(sequences), "token": places}[loss.unit]
    assert_close(terms.loss, whole.loss[index], rtol=1e-12)
    assert_close(d_part, d_whole[places], rtol=1e-12)


@CASE
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_weights_multiply_units(loss, backend):
    batch = given_for(loss, random_batch())
    plain, _ = evaluate(loss, batch, backend=backend)
    weights = torch.linspace(0.0, 2.0, plain.loss.shape[0], dtype=torch.float64)
    weighted = batch.with_given(**batch.given, loss_weights=weights)
    loss.check_given(weighted.given)
    terms, d_logps = evaluate(loss, weighted, backend=backend)
    assert_close(terms.loss, plain.loss * weights, rtol=1e-12)
    for name, term in terms.terms.items():
        assert_close(term, plain.terms[name] * weights, rtol=1e-12)
    logps = batch.logps.clone().requires_grad_()
    shares = torch.stack(ORACLES[type(loss)](loss)(batch, logps))
    if not loss.needs_batch:
        (expected,) = torch.autograd.grad((shares * weights).sum(), logps)
        assert_close(d_logps, expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("loss", [L.DPO(), L.DPO(loss_type="ipo"), L.KTO()], ids=repr)
def test_references_may_be_sums_means_or_per_token(loss):
    batch = given_for(loss, random_batch())
    sums = torch.stack([x.sum() for x in batch.split(batch.given["ref_token_logps"])])
    lengths = torch.tensor(batch.lengths)
    others = {k: v for k, v in batch.given.items() if k != "ref_token_logps"}
    expected, d_expected = evaluate(loss, batch)
    for given_as in ({"ref_sum_logps": sums}, {"ref_mean_logps": sums / lengths}):
        loss.check_given(given_as | others)
        terms, d_logps = evaluate(loss, batch.with_given(**given_as, **others))
        assert_close(terms.loss, expected.loss, rtol=1e-12)
        assert_close(d_logps, d_expected, rtol=1e-12)


def test_rewards_are_logged():
    batch = random_batch()
    terms, _ = evaluate(L.DPO(beta=0.3), given_for(L.DPO(), batch))
    difference = batch.split(0.3 * (batch.logps - batch.given["ref_token_logps"]))
    rewards = torch.stack([x.sum() for x in difference])
    assert_close(terms.metrics["rewards/chosen"].sum(), rewards[:3].mean(), rtol=1e-12)
    assert_close(terms.metrics["rewards/rejected"].sum(), rewards[3:].mean(), rtol=1e-12)
    assert terms.metrics["rewards/accuracies"].sum().item() == pytest.approx(
        (rewards[:3] > rewards[3:]).double().mean()
    )


def test_kto_logs_rewards_by_kind():
    batch = given_for(L.KTO(), random_batch())
    metrics = {k: v.sum() for k, v in evaluate(L.KTO(), batch)[0].metrics.items()}
    difference = batch.split(0.1 * (batch.logps - batch.given["ref_token_logps"]))
    rewards, good = torch.stack([x.sum() for x in difference]), batch.given["desirable"]
    share = metrics["share/desirable"]
    assert share.item() == pytest.approx(good.double().mean().item())
    assert_close(metrics["rewards/desirable"] / share, rewards[good].mean(), rtol=1e-12)
    assert_close(metrics["rewards/undesirable"] / (1 - share), rewards[~good].mean(), rtol=1e-12)
    assert metrics["kl"].item() == pytest.approx(0.4)


@pytest.mark.parametrize("kind", [True, False])
def test_kto_with_one_kind_only(kind):
    batch = given_for(L.KTO(), random_batch())
    batch.given["desirable"] = torch.full((6,), kind)
    terms, d_logps = evaluate(L.KTO(), batch)
    shares, expected = oracle(L.KTO(), batch)
    assert_close(terms.loss, shares, rtol=1e-12)
    assert_close(d_logps, expected, rtol=1e-12)
    assert not terms.terms["undesirable" if kind else "desirable"].any()


def test_kto_baseline_of_mismatched_responses():
    policy, ref = torch.tensor([-3.0, -5.0], requires_grad=True), torch.tensor([-4.0, -5.5])
    baseline = L.KTO.mismatched_baseline(policy, ref)
    assert (baseline.item(), baseline.requires_grad) == (0.75, False)
    assert L.KTO.mismatched_baseline(ref, policy).item() == 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_policy_gradient_metrics(level):
    loss = L.PolicyGradient(level=level, epsilon_low=0.1, epsilon_high=0.15, beta=0.1)
    batch = given_for(loss, random_batch(seed=8))
    metrics = {k: v.sum() for k, v in evaluate(loss, batch)[0].metrics.items()}
    log_ratios = batch.logps - batch.given["old_logps"]
    if level == "sequence":
        log_ratios = torch.stack([x.mean() for x in batch.split(log_ratios)])
    ratios, advantages = log_ratios.exp(), batch.given["advantages"]
    low, high = (ratios < 0.9) & (advantages < 0), (ratios > 1.15) & (advantages > 0)
    assert low.any()
    assert high.any()
    assert_close(metrics["clip_ratio/low"], low.double().mean(), rtol=1e-12)
    assert_close(metrics["clip_ratio/high"], high.double().mean(), rtol=1e-12)
    assert_close(metrics["ratio"], ratios.mean(), rtol=1e-12)
    x = batch.given["ref_token_logps"] - batch.logps
    assert_close(metrics["kl"], (x.exp() - x - 1).mean(), rtol=1e-10)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_without_old_log_probs_the_ratio_is_one(level):
    loss = L.PolicyGradient(level=level)
    batch = given_for(loss, random_batch())
    del batch.given["old_logps"]
    loss.check_given(batch.given)
    _, d_logps = evaluate(loss, batch)
    spread = random_batch().given["advantages"].repeat_interleave(torch.tensor(batch.lengths))
    assert_close(d_logps, -spread / len(batch.logps), rtol=1e-12)


def test_simpo_by_the_ratio_of_its_authors():
    assert L.SimPO.from_ratio(2.5, 0.2) == L.SimPO(beta=2.5, gamma=0.5)


@pytest.mark.parametrize("loss", CASES[:3], ids=differing_fields)
@pytest.mark.parametrize("backend", BACKENDS)
def test_slimes_kernel_is_its_formula(loss, backend):
    batch = random_batch()
    batch = batch.with_given(loss_weights=torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64))
    native, d_native = evaluate(loss, batch, backend=backend)
    plain, d_plain = L.Formula.evaluate(loss, batch.units("pair"), None, wants_gradient=True)
    assert_close(native.loss, plain.loss, rtol=1e-12)
    assert_close(d_native, d_plain, rtol=1e-12, atol=1e-16)
    for name, term in plain.terms.items():
        assert_close(native.terms[name], term, rtol=1e-12, label=name)


def test_the_oracle_takes_a_python_number_in_float64():
    """0.1 by way of float32 would be 1e-9 off."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator).double() for shape in ((4, 3, 8), (16, 8)))
    labels = torch.randint(0, 16, (4, 3), generator=generator)
    known = {"ref_sum_logps": torch.full((4,), -8.0), "desirable": torch.tensor([True, False, False, True])}
    exact = torch.tensor(0.1, dtype=torch.float64)
    number, tensor = (
        reference.preference_loss(hidden, weight, labels, loss=L.KTO(), kl_baseline=baseline, **known).loss
        for baseline in (0.1, exact)
    )
    torch.testing.assert_close(number, tensor, rtol=1e-14, atol=0)
