"""Losses as values: equality, copies, names; functions of one's own; what bad input gets."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from slime_fused import losses as L
from slime_fused.engine.units import Loss
from slime_fused.losses.registry import loss_of
from tests.losses.batches import Batch, evaluate, given_for, random_batch
from tests.losses.formulas import CASES, ORACLES


@pytest.mark.parametrize("loss", CASES, ids=repr)
def test_a_loss_is_a_value(loss):
    assert isinstance(loss, Loss)
    twin = type(loss)(**{f.name: getattr(loss, f.name) for f in fields(loss)})
    for other in (twin, copy.copy(loss), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss_of(loss.key)):
        assert type(other) is type(loss)
        assert (other, other.key, hash(other)) == (loss, loss.key, hash(loss))
    assert sum(loss == other for other in CASES) == 1
    assert len({other.key for other in CASES}) == len(CASES)


def test_every_shipped_loss_has_an_oracle():
    shipped = {c for c in vars(L).values() if isinstance(c, type) and issubclass(c, L.Formula)}
    assert shipped - {L.Formula, L.Own} == set(ORACLES) == {type(loss) for loss in CASES}


def test_another_process_finds_a_loss_by_its_name():
    loss = L.DPO(beta=0.25, loss_type="robust", label_smoothing=0.1, ld_alpha=0.5)
    code = f"from slime_fused.losses.registry import loss_of; print(repr(loss_of({loss.key!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(loss)


@pytest.mark.parametrize(
    "key",
    [
        "DPO",
        "os.system('true')",
        "slime_fused.losses.dpo.DPO(0.1)",
        "slime_fused.losses.dpo.DPO(beta=__import__('os').getpid())",
        "slime_fused.losses.dpo.DPO(**{'beta': 0.1})",
        "slime_fused.losses.dpo.torch(beta=1)",
        "slime_fused.losses.nothing.DPO(beta=0.1)",
        "slime_fused.losses.dpo.DPO(beta=",
        "tests.Own#999999",
    ],
)
def test_other_names_are_refused(key):
    with pytest.raises(ValueError, match="loss: expected the key of a loss"):
        loss_of(key)


def test_slime_of_a_configuration():
    config = L.SlimeLossConfig(kappa=3.0, stabilizer_reduction="token")
    loss = L.Slime.of(config)
    assert loss == L.Slime(kappa=3.0, stabilizer_reduction="token")
    assert L.Slime.of(loss) is loss
    assert L.as_loss(config) == loss
    with pytest.raises(ValueError, match="kappa: expected a number > 0, got 0"):
        L.Slime(kappa=0)


NUMBERS = [(type(loss), f.name) for loss in {type(c): c for c in CASES}.values() for f in fields(loss)]
NUMBERS = [(cls, name) for cls, name in NUMBERS if isinstance(getattr(cls, name, None), float)]


@pytest.mark.parametrize(("cls", "name"), NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.1", True])
def test_hyperparameters_are_finite_numbers(cls, name, value):
    error = ValueError if isinstance(value, float) else TypeError
    with pytest.raises(error, match=f"^{name}: expected a "):
        cls(**{name: value})


@pytest.mark.parametrize(("cls", "name"), NUMBERS)
def test_numpy_numbers_become_pythons(cls, name):
    value = getattr(cls, name)
    loss = cls(**{name: np.float64(value)})
    assert type(getattr(loss, name)) is float
    assert loss.key == cls().key


@pytest.mark.parametrize(
    ("cls", "arguments", "error", "message"),
    [
        (L.DPO, {"beta": 0}, ValueError, "beta: expected a number > 0, got 0"),
        (L.DPO, {"label_smoothing": 0.5}, ValueError, "label_smoothing: expected a number >= 0 and < 0.5, got 0.5"),
        (L.DPO, {"loss_type": "exo"}, ValueError, "loss_type: expected one of"),
        (L.DPO, {"loss_type": "ipo", "label_smoothing": 0.1}, ValueError, "label_smoothing: expected 0 for 'ipo'"),
        (L.DPO, {"loss_type": "hinge", "dpop": 1.0}, ValueError, "dpop: expected 0 for 'hinge'"),
        (L.DPO, {"ld_alpha": 1.5}, ValueError, "ld_alpha: expected a number >= 0 and <= 1, got 1.5"),
        (L.DPO, {"length_normalised": 1}, TypeError, "length_normalised: expected True or False, got 1"),
        (L.DPO, {"nll_weight": -1}, ValueError, "nll_weight: expected a number >= 0, got -1"),
        (L.DPO, {"nll_reduction": "mean"}, ValueError, "nll_reduction: expected one of"),
        (L.SimPO, {"gamma": -0.1}, ValueError, "gamma: expected a number >= 0, got -0.1"),
        (L.SimPO, {"loss_type": "hinge", "label_smoothing": 0.1}, ValueError, "label_smoothing: expected 0"),
        (L.CPO, {"loss_type": "ipo", "label_smoothing": 0.1}, ValueError, "label_smoothing: expected 0 for 'ipo'"),
        (L.ORPO, {"beta": -1}, ValueError, "beta: expected a number >= 0, got -1"),
        (L.KTO, {"baseline": "mean"}, ValueError, "baseline: expected one of"),
        (L.KTO, {"desirable_weight": -1}, ValueError, "desirable_weight: expected a number >= 0, got -1"),
        (L.PolicyGradient, {"delta": 1.1}, ValueError, "delta: expected a number > 1.2, got 1.1"),
        (L.PolicyGradient, {"level": "pair"}, ValueError, "level: expected one of"),
        (L.PolicyGradient, {"normalisation": "constant"}, TypeError, "max_length: expected a number, got None"),
        (L.PolicyGradient, {"max_length": 5}, ValueError, "max_length: expected None for 'token', got 5"),
        (L.Own, {"function": 3}, TypeError, "function: expected a function of log-probs, got 3"),
        (L.Own, {"function": len, "unit": "batch"}, ValueError, "unit: expected one of"),
        (L.Own, {"function": len, "needs": "x"}, TypeError, "needs: expected a tuple of names, got 'x'"),
        (L.as_loss, {"loss": "dpo"}, TypeError, "loss: expected a loss of slime_fused.losses or a function"),
        (L.as_loss, {"loss": L.DPO}, TypeError, "loss: expected a loss of slime_fused.losses or a function"),
    ],
)
def test_bad_hyperparameters(cls, arguments, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        cls(**arguments)


@pytest.mark.parametrize(
    ("loss", "given", "message"),
    [
        (L.DPO(), (), "ref_sum_logps: DPO expected the reference model's log-probs"),
        (L.DPO(ld_alpha=0.5), ("ref_sum_logps",), "ref_token_logps: DPO expected it, got none"),
        (L.DPO(ld_alpha=0.5), ("ref_token_logps", "desirable"), "desirable: DPO has no use for it"),
        (L.DPO(), ("ref_sum_logps", "ref_mean_logps"), "ref_mean_logps: expected the reference's log-probs once"),
        (L.SimPO(), ("ref_sum_logps",), "ref_sum_logps: SimPO has no use for it"),
        (L.Slime(), ("ref_sum_logps",), "ref_sum_logps: Slime has no use for it"),
        (L.KTO(), ("ref_sum_logps", "desirable"), "kl_baseline: KTO expected it, got none"),
        (L.KTO(), ("ref_sum_logps", "kl_baseline"), "desirable: KTO expected it, got none"),
        (L.KTO(baseline="batch"), ("ref_sum_logps", "desirable", "kl_baseline"), "kl_baseline: KTO has no use"),
        (L.PolicyGradient(), (), "advantages: PolicyGradient expected it, got none"),
        (L.PolicyGradient(beta=0.1), ("advantages",), "ref_token_logps: PolicyGradient expected it, got none"),
        (L.Own(lambda pairs: pairs, needs=("scores",)), ("others",), "scores: <lambda> expected it, got none"),
    ],
)
def test_missing_and_useless_arguments(loss, given, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        loss.check_given(dict.fromkeys(given, torch.zeros(())))


def hinge_on_means(pairs):
    margins = pairs.chosen_mean_logps - pairs.rejected_mean_logps
    return torch.relu(1 - margins) - 0.1 * pairs.chosen_mean_logps


def test_a_plain_function_is_a_loss():
    loss = L.as_loss(hinge_on_means)
    assert L.as_loss(hinge_on_means) is loss
    assert (loss.unit, loss.name, loss.needs_batch) == ("pair", "hinge_on_means", False)
    batch = random_batch().with_given()
    terms, d_logps = evaluate(loss, batch)
    same = L.CPO(beta=1.0, loss_type="hinge", nll_weight=0.1, nll_reduction="sequence")
    one_token_each = Batch((1, 1, 1, 1), batch.logps[:4])  # where sums are means
    ours, d_ours = evaluate(loss, one_token_each)
    theirs, d_theirs = evaluate(same, one_token_each)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(d_ours, d_theirs, rtol=1e-12, atol=0)
    assert terms.loss.shape == (3,)
    assert d_logps.shape == batch.logps.shape


def test_a_function_may_name_terms_and_use_what_is_given():
    def by_score(sequences):
        reward = sequences.given["scores"] * sequences.mean_logps
        return L.UnitTerms(-reward, {"reward": -reward}, {"length": sequences.lengths})

    loss = L.Own(by_score, unit="sequence", needs=("scores",), term_names=["reward"], metric_names=("length",))
    scores = torch.linspace(-1, 1, 6, dtype=torch.float64)
    batch = random_batch().with_given(scores=scores)
    loss.check_given(batch.given)
    terms, d_logps = evaluate(loss, batch)
    lengths = torch.tensor(batch.lengths)
    torch.testing.assert_close(d_logps, (-scores / lengths / 6).repeat_interleave(lengths))
    assert terms.metrics["length"].sum().item() == pytest.approx(lengths.double().mean().item())


def test_functions_of_ones_own_are_found_while_they_live():
    loss = L.Own(hinge_on_means)
    assert loss_of(loss.key) is loss
    for twin in (copy.copy(loss), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin == loss
        assert loss_of(twin.key) is twin
    assert loss != L.Own(hinge_on_means, needs_batch=True)
    key = L.Own(lambda pairs: pairs.chosen_sum_logps).key
    gc.collect()
    with pytest.raises(ValueError, match="one that lives in this process"):
        loss_of(key)


def test_a_function_carries_its_loss_and_both_go_together():
    def fleeting(pairs):
        return pairs.chosen_sum_logps

    key = L.as_loss(fleeting).key
    gc.collect()
    assert loss_of(key).function is fleeting
    del fleeting
    gc.collect()
    with pytest.raises(ValueError, match="one that lives in this process"):
        loss_of(key)


@dataclass(frozen=True)
class Likelihood(L.Formula):
    """A subclass outside of the package."""

    weight: float = 1.0

    def values(self, units):
        return L.UnitTerms(-self.weight * units.chosen_mean_logps)


def test_a_formula_from_elsewhere_is_found_by_its_key():
    loss = Likelihood(0.5)
    assert loss_of(loss.key) is loss
    assert pickle.loads(pickle.dumps(loss)) == loss
    terms, _ = evaluate(loss, random_batch().with_given())
    assert terms.loss.shape == (3,)


BAD_FUNCTIONS = {
    "a scalar": (lambda p: p.chosen_sum_logps.sum(), ValueError, r"expected values of shape \(3,\).*got \(\)"),
    "too many": (lambda p: p.sum_logps, ValueError, r"expected values of shape \(3,\).*pair 0 to 2, got \(6,\)"),
    "a number": (lambda p: 1.0, TypeError, "expected a Tensor or a UnitTerms, got float"),
    "a number inside": (lambda p: L.PairTerms(1.0), ValueError, r"expected values of shape \(3,\).*got float"),
    "detached": (lambda p: p.chosen_sum_logps.detach(), ValueError, "expected values that depend on the log-probs"),
    "of others": (
        lambda p: torch.ones(3, dtype=torch.float64, requires_grad=True) * 2,
        ValueError,
        "expected values that depend on the log-probs",
    ),
    "unnamed terms": (
        lambda p: L.PairTerms(p.chosen_sum_logps, {"x": p.chosen_sum_logps}),
        ValueError,
        r"expected the terms \(\), got \('x',\)",
    ),
    "NaN": (
        lambda p: p.chosen_sum_logps * torch.tensor([1.0, torch.nan, 1.0], dtype=torch.float64),
        ValueError,
        "expected numbers for finite log-probs, got NaN at pair 1",
    ),
    "a NaN derivative": (
        lambda p: torch.where(
            torch.tensor([True, True, False]), p.chosen_sum_logps, (p.chosen_sum_logps * 0).sqrt()
        ),
        ValueError,
        "expected numbers for finite log-probs, got NaN at pair 0",
    ),
}


@pytest.mark.parametrize("name", BAD_FUNCTIONS)
def test_bad_functions_are_named(name):
    function, error, message = BAD_FUNCTIONS[name]
    with pytest.raises(error, match=f"^loss: <lambda> {message}"):
        evaluate(L.Own(function), random_batch().with_given())


def test_errors_count_units_from_the_batchs_first():
    units = replace(random_batch().with_given().units("pair"), first_unit=40)
    with pytest.raises(ValueError, match="got NaN at pair 41"):
        L.Own(BAD_FUNCTIONS["NaN"][0]).evaluate(units, None, wants_gradient=True)


def test_nan_that_was_given_is_reported():
    batch = given_for(L.DPO(), random_batch())
    batch.given["ref_token_logps"][-1] = torch.nan
    with pytest.raises(ValueError, match=r"DPO .* got NaN at pair 2; what was given .*: ref_token_logps"):
        evaluate(L.DPO(), batch)


@pytest.mark.parametrize("loss", CASES, ids=repr)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_log_probs_that_are_not_finite_pass_through(loss, value):
    """As in PyTorch: no error, and NaN or infinity in the loss where the log-probs have it."""
    batch = given_for(loss, random_batch())
    batch.logps[0] = value
    terms, _ = evaluate(loss, batch)
    if value != value:
        assert not terms.loss.sum().isfinite()


def test_no_unit_at_all():
    empty = Batch((), torch.zeros(0, dtype=torch.float64))
    for loss in CASES:
        if loss.unit == "pair" and not isinstance(loss, L.Slime):
            units = replace(given_for(loss, empty).units("pair"), batch=random_batch().counts, given={})
            if loss.needs:
                units = replace(units, given={"ref_token_logps": units.logps})
            terms, d_logps = loss.evaluate(units, None, wants_gradient=True)
            assert terms.loss.shape == d_logps.shape == (0,)
