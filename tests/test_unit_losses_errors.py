"""Bad input of losses of units: messages name the loss or the argument, the unit, and what came; and edge cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import slime_fused as sf
from slime_fused import reference
from slime_fused.losses import DPO, KTO, SFT, Own, Pairs, PolicyGradient, SimPO
from tests.support import IGNORE, make_batch, outputs_of, pack, run
from tests.unit_loss_cases import CASES, options_of, own_batch, own_pairs, own_tokens, plan_of

BATCH = make_batch()
TEN = torch.full((6,), -10.0)
YES = torch.ones(6, dtype=torch.bool)
KTO_GIVEN = {"loss": KTO(), "ref_sum_logps": TEN, "desirable": YES, "kl_baseline": 1.5}


def nan_in_pair_1(pairs: Pairs) -> Tensor:
    values = pairs.chosen_mean_logps
    return values.masked_fill(torch.arange(pairs.count) + pairs.first_unit == 1, float("nan"))


def nan_derivative(pairs: Pairs) -> Tensor:
    return (pairs.chosen_mean_logps - pairs.chosen_mean_logps.detach()).abs().sqrt()


def detached(pairs: Pairs) -> Tensor:
    return pairs.chosen_mean_logps.detach()


def too_many(pairs: Pairs) -> Tensor:
    return pairs.logps


def scalar(pairs: Pairs) -> Tensor:
    return pairs.chosen_mean_logps.mean()


def nothing(pairs: Pairs) -> None:
    return None


BAD = {
    "class": ({"loss": DPO}, TypeError, "loss: expected a loss of slime_fused.losses .* got <class"),
    "string": ({"loss": "dpo"}, TypeError, "loss: expected a loss .* got 'dpo'"),
    "no_references": ({"loss": DPO()}, ValueError, "ref_sum_logps: DPO expected the reference"),
    "one_side": (
        {"loss": DPO(), "ref_chosen_sum_logps": TEN[:3]},
        ValueError,
        "ref_rejected_sum_logps: expected it together with ref_chosen_sum_logps, got none",
    ),
    "other_side": (
        {"loss": DPO(), "ref_rejected_mean_logps": TEN[:3]},
        ValueError,
        "ref_chosen_mean_logps: expected it together with ref_rejected_mean_logps, got none",
    ),
    "sides_and_all": (
        {"loss": DPO(), "ref_rejected_sum_logps": TEN[:3], "ref_sum_logps": TEN},
        ValueError,
        "ref_sum_logps: expected either it or ref_chosen_sum_logps and ref_rejected_sum_logps, got both",
    ),
    "two_units": (
        {"loss": DPO(), "ref_sum_logps": TEN, "ref_mean_logps": TEN},
        ValueError,
        "ref_mean_logps: expected the reference's log-probs once, got ref_sum_logps too",
    ),
    "length": ({"loss": DPO(), "ref_sum_logps": TEN[:3]}, ValueError, r"ref_sum_logps: .*\(6,\).* got \(3,\)"),
    "length_of_a_side": (
        {"loss": DPO(), "ref_chosen_sum_logps": TEN[:3], "ref_rejected_sum_logps": TEN[:4]},
        ValueError,
        r"ref_rejected_sum_logps: expected shape \(3,\) \(one number per pair\), got \(4,\)",
    ),
    "token_references": (
        {"loss": DPO(), "ref_token_logps": torch.zeros(6, 8)},
        ValueError,
        r"ref_token_logps: expected shape \(6, 9\) \(the shape of labels\), got \(6, 8\)",
    ),
    "device": (
        {"loss": DPO(), "ref_sum_logps": TEN.to("meta")},
        ValueError,
        "ref_sum_logps: expected on cpu like hidden, got meta",
    ),
    "complex": ({"loss": DPO(), "ref_sum_logps": TEN + 0j}, TypeError, "ref_sum_logps: expected real numbers"),
    "list": (
        {"loss": DPO(), "ref_sum_logps": [0.0] * 6},
        TypeError,
        "ref_sum_logps: expected a .*Tensor, got list",
    ),
    "no_use": ({"loss": SimPO(), "ref_sum_logps": TEN}, ValueError, "ref_sum_logps: SimPO has no use for it"),
    "no_flags": ({**KTO_GIVEN, "desirable": None}, ValueError, "desirable: KTO expected it, got none"),
    "integer_flags": ({**KTO_GIVEN, "desirable": YES.long()}, TypeError, "desirable: expected a bool tensor"),
    "no_baseline": ({**KTO_GIVEN, "kl_baseline": None}, ValueError, "kl_baseline: KTO expected it, got none"),
    "baseline_per_sequence": ({**KTO_GIVEN, "kl_baseline": TEN}, ValueError, r"kl_baseline: .* \(\) \(a number\)"),
    "baseline_text": (
        {**KTO_GIVEN, "kl_baseline": "1"},
        TypeError,
        "kl_baseline: expected a .*Tensor, got str",
    ),
    "baseline_nan": (
        {**KTO_GIVEN, "kl_baseline": float("nan")},
        ValueError,
        "loss: KTO expected numbers .* got NaN at sequence 0; .*kl_baseline",
    ),
    "reference_nan": (
        {"loss": DPO(), "ref_sum_logps": TEN.masked_fill(torch.arange(6) == 5, float("nan"))},
        ValueError,
        "loss: DPO expected numbers for finite log-probs, got NaN at pair 2; .*ref_sum_logps",
    ),
    "weights": (
        {"loss": SimPO(), "loss_weights": TEN},
        ValueError,
        r"loss_weights: expected shape \(3,\) \(one number per pair\), got \(6,\)",
    ),
    "extra_collides": (
        {"loss": own_batch, "extra": {"loss_weights": TEN[:3]}},
        ValueError,
        "extra: expected names of its own .* got 'loss_weights'",
    ),
    "extra_is_an_argument": (
        {"loss": own_batch, "extra": {"ref_sum_logps": TEN}},
        ValueError,
        "extra: expected names of its own .* got 'ref_sum_logps'",
    ),
    "extra_name": ({"loss": own_batch, "extra": {"a b": TEN}}, ValueError, "extra: expected names .* got 'a b'"),
    "extra_list": ({"loss": own_batch, "extra": [TEN]}, TypeError, "extra: expected a mapping .* got list"),
    "extra_shape": (
        {"loss": own_batch, "extra": {"a": TEN[:4]}},
        ValueError,
        r"extra\['a'\]: expected shape \(\) or \(6,\) or \(6, 9\) or \(3,\)",
    ),
    "extra_of_a_shipped_loss": ({"loss": SimPO(), "extra": {"a": TEN}}, ValueError, "a: SimPO has no use for it"),
    "needs": ({"loss": Own(own_pairs, needs=("offset",))}, ValueError, "offset: own_pairs expected it, got none"),
    "own_shape": (
        {"loss": too_many},
        ValueError,
        r"loss: too_many expected values of shape \(1,\), one for each pair 0 to 0, got \(",
    ),
    "own_scalar": ({"loss": scalar}, ValueError, r"loss: scalar expected values of shape \(1,\), .* got \(\)"),
    "own_none": ({"loss": nothing}, TypeError, "loss: nothing expected a Tensor or a UnitTerms, got NoneType"),
    "own_detached": ({"loss": detached}, ValueError, "loss: detached expected values that depend on the log-probs"),
    "own_nan": ({"loss": nan_in_pair_1}, ValueError, "loss: nan_in_pair_1 .* got NaN at pair 1"),
    "own_nan_derivative": ({"loss": nan_derivative}, ValueError, "loss: nan_derivative .* got NaN at pair 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, error, message = BAD[case]
    leaves = BATCH.leaves()
    workspace, plan = plan_of("several", leaves, SimPO())
    assert len(plan.chunks) > 1
    with pytest.raises(error, match=message):
        leaves.call(sf.preference_loss, workspace=workspace, **options)


ADVANTAGES = torch.linspace(-1, 1, 6)
BAD_POLICY = {
    "class": ({"loss": PolicyGradient}, TypeError, "loss: expected a loss"),
    "pairs": ({"loss": SimPO()}, ValueError, "loss: expected one of tokens or sequences, got one of pairs: SimPO"),
    "function": ({"loss": own_tokens}, ValueError, "loss: expected one of tokens or sequences"),
    "length": ({"advantages": ADVANTAGES[:5]}, ValueError, r"advantages: expected shape \(6,\) or \(6, 9\)"),
    "none": ({"advantages": None}, TypeError, "advantages: expected a torch.Tensor, got NoneType"),
    "per_token": (
        {"advantages": torch.ones(6, 9), "loss": PolicyGradient(level="sequence")},
        ValueError,
        r"advantages: expected shape \(6,\) \(one number per sequence\), got \(6, 9\)",
    ),
    "old": ({"old_logps": TEN}, ValueError, r"old_logps: expected shape \(6, 9\)"),
    "no_reference": ({"loss": PolicyGradient(beta=0.1)}, ValueError, "ref_token_logps: PolicyGradient expected it"),
    "no_use": ({"ref_token_logps": torch.zeros(6, 9)}, ValueError, "ref_token_logps: PolicyGradient has no use"),
    "other_loss": ({"loss": SFT()}, ValueError, "advantages: SFT has no use for it"),
}


@pytest.mark.parametrize("case", BAD_POLICY)
def test_bad_input_of_policy_losses(case):
    options, error, message = BAD_POLICY[case]
    with pytest.raises(error, match=message):
        BATCH.leaves().call(sf.token_policy_loss, **{"advantages": ADVANTAGES, **options})


def test_sequences_that_a_loss_cannot_take():
    empty = replace(BATCH, labels=BATCH.labels.index_fill(0, torch.tensor([4]), IGNORE))
    with pytest.raises(ValueError, match=r"got none in row 4 \(the rejected response of pair 1\)"):
        empty.call(sf.preference_loss, loss=SimPO())
    odd = replace(BATCH, hidden=BATCH.hidden[:5], labels=BATCH.labels[:5])
    with pytest.raises(ValueError, match="labels: expected an even number of sequences"):
        odd.call(sf.preference_loss, loss=SimPO())
    flat = replace(BATCH, hidden=BATCH.hidden[0], labels=BATCH.labels[0])
    with pytest.raises(ValueError, match=r"hidden: expected \(S, T, D\), or \(N, D\) with cu_seqlens"):
        flat.call(sf.preference_loss, loss=SFT())
    unlabelled = replace(BATCH, labels=torch.full_like(BATCH.labels, IGNORE))
    for case in (CASES["sft"], CASES["kto_batch"], CASES["grpo"], CASES["gspo"]):
        with pytest.raises(ValueError, match="labels: expected at least one label"):
            unlabelled.leaves().call(case.fused, **options_of(case, unlabelled))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.value.unit != "pair"])
def test_sequences_without_a_label_count_and_add_no_nan(name):
    """One in front, one within, one behind: each may be a chunk of no rows."""
    batch = make_batch((0, 4, 0, 5, 2, 0))
    case = CASES[name]
    options = options_of(case, batch)
    truth = run(case.plain, batch, **options)
    for workspace in (800, 2000, "1GiB"):
        got = run(case.fused, batch, workspace=workspace, **options)
        for kind, values in (("outputs", truth.outputs), ("grads", truth.grads)):
            for key, value in values.items():
                torch.testing.assert_close(getattr(got, kind)[key], value, rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.parametrize("workspace", [400, "1GiB"])
def test_as_many_sequences_as_tokens(workspace):
    """(S,) is the shape of packed labels, too: names tell what is meant, against the same batch padded."""
    bounds, labels = torch.tensor([0, 0, 3, 3, 4], dtype=torch.int32), torch.tensor([1, 2, 3, 4])
    hidden = make_batch(seed=3).hidden[0, :4]
    padded, padded_labels = torch.zeros(4, 3, 5, dtype=torch.float64), torch.full((4, 3), IGNORE)
    for s in range(4):
        count = int(bounds[s + 1] - bounds[s])
        padded[s, :count], padded_labels[s, :count] = (
            hidden[bounds[s] : bounds[s + 1]],
            labels[bounds[s] : bounds[s + 1]],
        )
    numbers = torch.tensor([-7.0, -9.0, 1.0, -2.0])
    flags = torch.tensor([True, False, True, True])
    kto = {"loss": KTO(baseline="batch"), "ref_sum_logps": numbers, "desirable": flags, "loss_weights": -numbers}
    gspo = {"loss": PolicyGradient(level="sequence"), "advantages": numbers}
    for name, options in (("preference_loss", kto), ("token_policy_loss", gspo)):
        expected = outputs_of(getattr(reference, name)(padded, BATCH.weight, padded_labels, **options))
        for module in (sf, reference):
            got = getattr(module, name)(
                hidden, BATCH.weight, labels, cu_seqlens=bounds, workspace=workspace, **options
            )
            for key, value in outputs_of(got).items():
                if key != "logps":
                    torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12)
    by_token = {"loss": SFT(), "loss_weights": -numbers}
    got, truth = (
        f(hidden, BATCH.weight, labels, cu_seqlens=bounds, **by_token).loss
        for f in (sf.preference_loss, reference.preference_loss)
    )
    logps = sf.linear_logprobs(hidden, BATCH.weight, labels)
    torch.testing.assert_close(got, (logps * numbers).mean(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(truth, got, rtol=1e-12, atol=1e-12)


def test_numbers_for_ignored_tokens_are_never_read():
    """Callers leave there what they like."""
    batch = pack(BATCH)
    references = torch.where(batch.labels == IGNORE, float("nan"), -2.0)
    out = batch.leaves().call(sf.preference_loss, loss=DPO(), ref_token_logps=references)
    assert torch.isfinite(out.loss)


def test_what_an_output_of_single_responses_lacks():
    out = BATCH.call(sf.preference_loss, loss=SFT())
    with pytest.raises(ValueError, match="chosen_logps: expected a loss of pairs"):
        _ = out.margins
    assert out.mean_logps.shape == (6,)
