"""The losses against TRL's own trainers: values and gradients, on the same log-probs.

Seen with TRL 1.16.0 (and its experimental CPO and ORPO trainers), transformers 5.23.0 and PyTorch 2.13.0. TRL's
methods run unchanged, on trainers without the rest of what a trainer has, and on models that return given numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

pytest.importorskip("trl", reason="needs TRL: pip install 'slime-fused[trl]'")

from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from slime_fused import losses as L
from tests.losses.batches import evaluate, given_for, random_batch

CHOSEN, OTHER = 0, 1
"""The two tokens of the models' vocabulary: that of every response, and the one that takes the rest."""


class Model(torch.nn.Module):
    """A model whose sequences are one prompt token and a response, the log-probs of which are ``logps`` (n,)."""

    is_gradient_checkpointing = False

    def __init__(self, batch, logps):
        super().__init__()
        self.padded = pad_sequence(batch.split(logps), batch_first=True)  # (s, t)

    def forward(self, *_args, **_options):
        zeros = torch.zeros_like(self.padded).detach()
        certain = torch.log1p(-torch.exp(self.padded).clamp(max=0.999999))
        logits = torch.nn.functional.pad(torch.stack([self.padded, certain], -1), (0, 0, 0, 1))  # (s, t + 1, 2)
        return SimpleNamespace(
            log_probs=self.padded, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), logits=logits,
            label_mask=self.padded != 0,
        )  # fmt: skip


def trainer_of(cls, batch, **attributes):
    """TRL's trainer with what its loss reads."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x, sync_gradients=True, is_main_process=False, parallelism_config=None,
        autocast=lambda: torch.autocast("cpu", enabled=False),
    )  # fmt: skip
    trainer = object.__new__(cls)
    vars(trainer).update(
        model=Model(batch, batch.logps), accelerator=accelerator, aux_loss_enabled=False, use_weighting=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, average_tokens_across_devices=False),
        precompute_ref_logps=False, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        is_encoder_decoder=False, pad_token_id=OTHER, padding_value=OTHER, ld_alpha=None,
    )  # fmt: skip
    if "ref_token_logps" in batch.given:
        trainer.ref_model = Model(batch, batch.given["ref_token_logps"])
    vars(trainer).update(attributes)
    return trainer


def masks_of(batch):
    """(attention_mask, completion_mask), (s, t + 1): a prompt token, the response, padding."""
    response = pad_sequence([torch.ones(n, dtype=torch.long) for n in batch.lengths], batch_first=True)
    return (torch.nn.functional.pad(response, (1, 0), value=value) for value in (1, 0))


def assert_equal(loss, batch, value_of, *, rtol=1e-9):
    """``value_of(logps)`` is TRL's loss of these log-probs."""
    logps = batch.logps.clone().requires_grad_()
    value = value_of(logps)
    (expected,) = torch.autograd.grad(value, logps)
    terms, d_logps = evaluate(loss, batch)
    torch.testing.assert_close(terms.loss.sum(), value.detach().to(torch.float64), rtol=rtol, atol=0)
    torch.testing.assert_close(d_logps, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


NLL = {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}


@pytest.mark.parametrize(
    ("loss", "attributes"),
    [
        (L.DPO(beta=0.3), {"loss_types": ["sigmoid"]}),
        (L.DPO(beta=0.3, loss_type="hinge"), {"loss_types": ["hinge"]}),
        (L.DPO(beta=0.3, loss_type="ipo"), {"loss_types": ["ipo"]}),
        (L.DPO(beta=0.3, loss_type="robust", label_smoothing=0.2), {"loss_types": ["robust"]}),
        (L.DPO(beta=0.3, length_normalised=True), {"loss_types": ["sigmoid_norm"]}),
        (L.DPO(beta=0.3, ld_alpha=0.4), {"loss_types": ["sigmoid"]}),
        (L.DPO(beta=0.3, ld_alpha=0.4, length_normalised=True), {"loss_types": ["sigmoid_norm"]}),
        (L.DPO(beta=0.3, nll_weight=0.7, nll_reduction="token"), NLL),
    ],
    ids=repr,
)
def test_dpo(loss, attributes):
    batch = given_for(loss, random_batch())
    attention, completion = masks_of(batch)
    inputs = {"input_ids": torch.zeros_like(attention), "attention_mask": attention, "completion_mask": completion}
    settings = {
        "beta": loss.beta,
        "label_smoothing": loss.label_smoothing,
        "ld_alpha": loss.ld_alpha,
        "f_divergence_type": "reverse_kl",
        "loss_weights": [1.0],
    }
    trainer = trainer_of(DPOTrainer, batch, **settings | attributes)
    assert_equal(loss, batch, lambda logps: trainer._compute_loss(Model(batch, logps), inputs, False))
    metrics = {k: v[0] for k, v in trainer._metrics["train"].items()}
    if not loss.length_normalised and loss.loss_type != "ipo":  # TRL logs rewards of sums, whatever it compares
        terms, _ = evaluate(loss, batch)
        for name in loss.metric_names:
            assert terms.metrics[name].sum().item() == pytest.approx(metrics[name])


def concatenated(batch):
    """What the CPO and ORPO trainers read."""
    attention, completion = masks_of(batch)
    half = len(batch.lengths) // 2
    parts = {
        "input_ids": torch.zeros_like(attention),
        "attention_mask": attention,
        "labels": torch.where(completion.bool(), CHOSEN, -100),
    }
    sides = (("chosen", slice(0, half)), ("rejected", slice(half, None)))
    return {f"{side}_{name}": part[rows] for side, rows in sides for name, part in parts.items()}


@pytest.mark.parametrize(
    ("loss", "attributes"),
    [
        (L.CPO(beta=0.3), {"loss_type": "sigmoid"}),
        (L.CPO(beta=0.3, label_smoothing=0.1, nll_weight=0.5), {"loss_type": "sigmoid"}),
        (L.CPO(beta=0.3, loss_type="hinge"), {"loss_type": "hinge"}),
        (L.CPO(beta=0.3, loss_type="ipo", nll_weight=0.0), {"loss_type": "ipo"}),
        (L.SimPO(beta=2.5, gamma=0.4), {"loss_type": "simpo"}),
        (L.SimPO(beta=2.5, gamma=0.4, label_smoothing=0.1, nll_weight=0.5), {"loss_type": "simpo"}),
        (L.AlphaPO(beta=2.5, gamma=0.4, alpha=0.3), {"loss_type": "simpo"}),
        (L.AlphaPO(beta=2.5, gamma=0.4, alpha=-0.3, nll_weight=0.5), {"loss_type": "simpo"}),
    ],
    ids=repr,
)
def test_cpo_simpo_alphapo(loss, attributes):
    batch = given_for(loss, random_batch())
    settings = {
        "beta": loss.beta,
        "label_smoothing": loss.label_smoothing,
        "cpo_alpha": loss.nll_weight,
        "simpo_gamma": getattr(loss, "gamma", 0.0),
        "alpha": getattr(loss, "alpha", 0.0),
    }
    trainer = trainer_of(CPOTrainer, batch, **settings | attributes)

    def value_of(logps):
        value, metrics = trainer.get_batch_loss_metrics(Model(batch, logps), concatenated(batch))
        terms, _ = evaluate(loss, batch)
        for name in loss.metric_names:
            assert terms.metrics[name].sum().item() == pytest.approx(metrics[name])
        return value

    assert_equal(loss, batch, value_of)


def test_orpo():
    loss = L.ORPO(beta=0.3, nll_reduction="token")
    batch = given_for(loss, random_batch())
    trainer = trainer_of(ORPOTrainer, batch, beta=loss.beta)
    # Its odds are float32's.
    assert_equal(
        loss, batch, lambda x: trainer.get_batch_loss_metrics(Model(batch, x), concatenated(batch))[0], rtol=2e-6
    )


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("desirable", ["both", True, False])
@pytest.mark.parametrize("baseline_sign", [1, -1])
def test_kto(loss_type, desirable, baseline_sign):
    loss = L.KTO(
        beta=0.3, desirable_weight=1.3, undesirable_weight=0.7, baseline="given" if loss_type == "kto" else "zero"
    )
    batch = given_for(loss, random_batch())
    if desirable != "both":
        batch.given["desirable"] = torch.full((len(batch.lengths),), desirable)
    attention, completion = masks_of(batch)
    zeros = torch.zeros_like(attention)
    inputs = {
        "input_ids": zeros,
        "attention_mask": attention,
        "completion_mask": completion,
        "label": batch.given["desirable"],
        "KL_input_ids": zeros,
        "KL_attention_mask": attention,
        "KL_completion_mask": completion,
    }
    mismatched = random_batch(seed=5)
    kl_sums = [
        torch.stack([x.sum() for x in mismatched.split(y)])
        for y in (mismatched.logps, mismatched.given["old_logps"])
    ]
    kl_sums = kl_sums[::baseline_sign]
    if loss_type == "kto":
        batch.given["kl_baseline"] = L.KTO.mismatched_baseline(*kl_sums)
    trainer = trainer_of(
        KTOTrainer,
        batch,
        beta=loss.beta,
        desirable_weight=loss.desirable_weight,
        undesirable_weight=loss.undesirable_weight,
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
    )
    trainer._compute_kl_logps = lambda model, _: kl_sums[1] if model is trainer.ref_model else kl_sums[0]
    assert_equal(loss, batch, lambda logps: trainer._compute_loss(Model(batch, logps), inputs, False))
    if loss_type == "kto":
        terms, _ = evaluate(loss, batch)
        assert terms.metrics["kl"].sum().item() == pytest.approx(trainer._metrics["train"]["kl"][0])


def test_the_mismatched_baseline_is_seen_above_and_at_zero():
    """Both signs of `test_kto` matter."""
    batch = random_batch(seed=5)
    sums = [torch.stack([x.sum() for x in batch.split(y)]) for y in (batch.logps, batch.given["old_logps"])]
    assert sorted([L.KTO.mismatched_baseline(*sums) > 0, L.KTO.mismatched_baseline(*sums[::-1]) > 0]) == [
        False,
        True,
    ]


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("delta", [None, 1.4])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("loss_type", "normalisation"),
    [("grpo", "sequence"), ("bnpo", "token"), ("dapo", "token"), ("dr_grpo", "constant")],
)
@pytest.mark.parametrize("is_on_policy", [False, True])
def test_policy_gradient(loss_type, normalisation, level, delta, beta, is_on_policy):
    constant = {"max_length": 9} if normalisation == "constant" else {}
    loss = L.PolicyGradient(0.1, 0.15, delta, beta, level, normalisation, **constant)
    batch = given_for(loss, random_batch(seed=8))
    advantages = random_batch(seed=8).given["advantages"]
    _, completion = masks_of(batch)
    completion, zeros = completion[:, 1:], torch.zeros_like(completion[:, 1:])
    inputs = {
        "prompt_ids": zeros[:, :1],
        "prompt_mask": zeros[:, :1] + 1,
        "completion_ids": zeros,
        "completion_mask": completion,
        "advantages": advantages,
        "num_items_in_batch": completion.sum(),
    }
    if is_on_policy:
        del batch.given["old_logps"]
    else:
        inputs["old_per_token_logps"] = Model(batch, batch.given["old_logps"]).padded
    if beta:
        inputs["ref_per_token_logps"] = Model(batch, batch.given["ref_token_logps"]).padded
    trainer = trainer_of(
        GRPOTrainer,
        batch,
        beta=beta,
        epsilon_low=0.1,
        epsilon_high=0.15,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=9,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
    )
    assert_equal(loss, batch, lambda logps: trainer._compute_loss(Model(batch, logps), inputs))
    terms, _ = evaluate(loss, batch)
    metrics = {k: v[0] for k, v in trainer._metrics["train"].items()}
    for ours, theirs in (("clip_ratio/low", "clip_ratio/low_mean"), ("clip_ratio/high", "clip_ratio/high_mean")):
        assert terms.metrics[ours].sum().item() == pytest.approx(metrics[theirs])
    if beta:
        assert terms.metrics["kl"].sum().item() == pytest.approx(metrics["kl"])


@pytest.mark.parametrize("num_items", [None, 17])
def test_sft(num_items):
    batch = random_batch().with_given()
    assert sum(batch.lengths) == 17
    trainer = trainer_of(SFTTrainer, batch, compute_loss_func=None, label_smoother=None)
    trainer.args.loss_type = "nll"
    attention, _ = masks_of(batch)

    def value_of(logps):
        return trainer.compute_loss(
            Model(batch, logps), {"attention_mask": attention}, num_items_in_batch=num_items
        )

    assert_equal(L.SFT(), batch, value_of)


def test_the_models_log_probs_are_those_given():
    """Through logits, as the CPO and ORPO trainers read them."""
    batch = random_batch()
    outputs = Model(batch, batch.logps)()
    logps = torch.log_softmax(outputs.logits[:, :-1], -1)[..., CHOSEN]
    for row, expected in zip(logps, batch.split(batch.logps), strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=1e-12, atol=1e-15)
    assert math.isfinite(outputs.logits.sum())
