"""Where losses of units meet the ends of a dtype, and functions that do not behave."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import slime_fused as sf
from slime_fused import reference
from tests.support import make_batch


def norms(function, gap: float, dtype: torch.dtype) -> list[float]:
    """Of dX and dW, of ORPO's odds of one pair whose rejected token has a logit ``gap`` above all others."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 8, generator=generator, dtype=torch.float64).mul_(0.1)
    weight[3] = 0
    weight[3, 0] = 1
    hidden = torch.zeros(2, 1, 8, dtype=torch.float64)
    hidden[0, 0, 1], hidden[1, 0, 0] = 1, gap
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    loss = sf.losses.ORPO(nll_weight=0)
    function(hidden, weight, torch.tensor([[1], [3]]), loss=loss).loss.backward()
    return [hidden.grad.norm().item(), weight.grad.norm().item()]


@pytest.mark.parametrize("gap", [12.0, 17.0, 19.0, 20.0, 22.0, 26.0])
def test_odds_of_a_certain_token_in_float32(gap):
    """float32 rounds its log-prob to 0, where the odds are infinite: the gradient must stay of the truth's size."""
    got, truth = norms(sf.preference_loss, gap, torch.float32), norms(reference.preference_loss, gap, torch.float64)
    for ours, true in zip(got, truth, strict=True):
        assert ours <= 1.5 * true


def test_kl_beyond_the_exponential_has_no_derivative():
    """float32: above log ratios of 74 the estimate is constant; its linear part alone would have the wrong sign."""
    hidden, weight = torch.zeros(1, 1, 4, requires_grad=True), torch.zeros(3, 4)
    with torch.no_grad():
        weight[0, 0], hidden[0, 0, 0] = -90.0, 1.0
    weight.requires_grad_()
    loss = sf.losses.PolicyGradient(beta=0.1)
    given = {"advantages": torch.zeros(1), "ref_token_logps": torch.full((1, 1), -1.0)}
    sf.token_policy_loss(hidden, weight, torch.zeros(1, 1, dtype=torch.long), loss=loss, **given).loss.backward()
    assert weight.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_a_functions_dtype_is_not_the_losss(dtype):
    batch = make_batch(dtype=torch.float32)
    out = batch.call(
        sf.preference_loss, loss=lambda pairs: (pairs.rejected_mean_logps - pairs.chosen_mean_logps).to(dtype)
    )
    assert out.loss.dtype == torch.float32
    expected = batch.call(
        sf.preference_loss, loss=lambda pairs: pairs.rejected_mean_logps - pairs.chosen_mean_logps
    )
    torch.testing.assert_close(out.loss, expected.loss, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0)


def test_a_function_that_changes_log_probs_in_place():
    """With a gradient autograd refuses it; without one it changes its own copy."""
    batch = make_batch()

    def careless(pairs):
        pairs.logps.mul_(0)
        return pairs.rejected_mean_logps

    with torch.no_grad():
        out = batch.call(sf.preference_loss, loss=careless)
    assert out.loss == 0
    torch.testing.assert_close(
        out.mean_logps, batch.call(sf.sequence_logprobs, reduction="mean"), rtol=1e-12, atol=0
    )
    with pytest.raises(RuntimeError, match="leaf Variable"):
        batch.leaves().call(sf.preference_loss, loss=careless)


def test_a_soft_cap_that_the_temperature_takes_beyond_the_dtype():
    batch = make_batch(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"temperature: expected a number by which a soft cap of 1e\+30 can be"):
        batch.call(sf.linear_logprobs, logit_softcap=1e30, temperature=1e-30, logit_scale=1e-30)


def test_hyperparameters_that_leave_float32():
    with pytest.raises(ValueError, match="alpha: expected 0, or at least 1e-09 either way, got 1e-40"):
        sf.losses.AlphaPO(alpha=1e-40)


def test_a_policy_among_preferences_is_led_to_its_function():
    with pytest.raises(ValueError, match=r"loss: expected a loss of preferences, .*: call token_policy_loss"):
        make_batch().call(sf.preference_loss, loss=sf.losses.PolicyGradient())


def test_numbers_of_numpy():
    batch = make_batch()
    sequences = batch.labels.shape[0]
    given = {
        "loss": sf.losses.KTO(),
        "ref_sum_logps": torch.full((sequences,), -9.0),
        "desirable": torch.arange(sequences) % 2 == 0,
    }
    losses = [batch.call(sf.preference_loss, kl_baseline=number, **given).loss for number in (0.5, np.float32(0.5))]
    assert losses[0] == losses[1]


def test_references_made_in_inference_mode():
    batch = make_batch()
    with torch.inference_mode():
        sums, tokens = batch.call(sf.sequence_logprobs), batch.call(sf.linear_logprobs)
    given = {"advantages": sums, "old_logps": tokens, "ref_token_logps": tokens}
    for level in ("token", "sequence"):
        loss = sf.losses.PolicyGradient(beta=0.1, level=level)
        batch.leaves().call(sf.token_policy_loss, loss=loss, **given).loss.backward()
    own = batch.leaves()
    own.call(
        sf.preference_loss,
        loss=lambda pairs: pairs.chosen_mean_logps * pairs.ref_chosen_sum_logps,
        ref_sum_logps=sums,
    ).loss.backward()
    assert own.hidden.grad.isfinite().all()


def test_integers_given_for_an_own_loss_stay_integers():
    seen = []

    def loss(pairs):
        seen.append(pairs.given["ids"].clone())
        return pairs.rejected_mean_logps

    batch = make_batch(dtype=torch.float32)
    ids = torch.arange(batch.labels.shape[0] // 2) + 16777217
    batch.call(sf.preference_loss, loss=loss, extra={"ids": ids})
    torch.testing.assert_close(torch.cat(seen), ids, rtol=0, atol=0)


def test_references_that_nobody_gave():
    with pytest.raises(ValueError, match="ref_sum_logps: expected a reference model's log-probs"):
        make_batch().call(sf.preference_loss, loss=lambda pairs: pairs.ref_chosen_sum_logps)


def test_per_token_results_can_be_masked_in_place():
    batch = make_batch()
    mask = batch.labels % 2 == 0
    grads = []
    for in_place in (False, True):
        leaves = batch.leaves()
        told = leaves.call(sf.linear_cross_entropy, reduction="none", return_stats=("entropy",))
        losses, entropy = told.losses, told.entropy
        if in_place:
            losses *= mask
            entropy.mul_(mask)
        else:
            losses, entropy = losses * mask, entropy * mask
        (losses.sum() + entropy.sum()).backward()
        grads.append(leaves.hidden.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=0)


def test_sizes_that_a_graph_keeps_symbolic():
    torch._dynamo.reset()
    batch = make_batch((4, 3, 5, 2), dtype=torch.float32)
    loss, references = sf.losses.DPO(), torch.full((4,), -9.0)
    hidden, labels = batch.hidden.clone().requires_grad_(), batch.labels.clone()
    for tensor in (hidden, labels):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)

    def step(hidden, weight, labels, references):
        return sf.preference_loss(hidden, weight, labels, loss=loss, ref_sum_logps=references).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = compiled(hidden, batch.weight, labels, references)
    torch.testing.assert_close(got, step(hidden, batch.weight, labels, references), rtol=1e-6, atol=0)
