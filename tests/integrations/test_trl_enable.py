"""Losses of this package in TRL's DPOTrainer: each step's loss and gradients, and what is reported beside them."""

from __future__ import annotations

import pytest

import slime_fused as sf
from slime_fused.integrations.trl import enable_loss
from tests.integrations.trl_cases import LOSSES, Expected, make_trainer
from tests.tiny_models import tiny_llama


def reference_of(tokenizer):
    model = tiny_llama(len(tokenizer))
    return lambda inputs: model(**inputs).logits


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_the_steps_of_the_reference(name, tokenizer, tmp_path):
    loss = LOSSES[name]
    needs_reference = any(need.startswith("ref_") for need in loss.needs)
    trainer = make_trainer(tokenizer, tmp_path, ref_model="copy" if needs_reference else "none")
    enable_loss(trainer, loss)
    expected = Expected(trainer, loss, reference_of(tokenizer))
    trainer.train()
    expected.check()


def test_a_function_of_pairs_is_a_loss(tokenizer, tmp_path):
    def squared(pairs):
        return (pairs.chosen_mean_logps - pairs.rejected_mean_logps - 2.0) ** 2

    trainer = make_trainer(tokenizer, tmp_path)
    enable_loss(trainer, squared)
    expected = Expected(trainer, squared)
    trainer.train()
    expected.check()


# Means over pairs, over sequences, and over either side's tokens. KTO by batch is no such mean.
@pytest.mark.parametrize("name", ["simpo", "kto", "slime by token", "rpo by token"])
def test_accumulation_is_exact(name, tokenizer, tmp_path):
    """Five pairs in micro-batches of two, two and one: each pair counts the same, each token of a mean too."""
    loss = LOSSES[name]
    needs_reference = any(need.startswith("ref_") for need in loss.needs)
    trainer = make_trainer(
        tokenizer,
        tmp_path,
        ref_model="copy" if needs_reference else "none",
        pairs=5,
        gradient_accumulation_steps=3,
        max_steps=1,
    )
    enable_loss(trainer, loss)
    expected = Expected(trainer, loss, reference_of(tokenizer))
    trainer.train()
    expected.check(steps=1)


def test_dpo_is_that_of_trl(tokenizer, tmp_path):
    """Three steps and an evaluation in one batch, under every name that TRL reports, to the rounding of float32."""
    options = {"ref_model": "copy", "per_device_eval_batch_size": 5}
    plain, ours = (make_trainer(tokenizer, tmp_path, **options) for _ in range(2))
    enable_loss(ours, sf.losses.DPO(beta=0.1))
    for trainer in (plain, ours):
        trainer.train()
        trainer.evaluate()
    rows = [[row for row in t.state.log_history if "train_loss" not in row] for t in (plain, ours)]
    assert len(rows[0]) == 4
    for step, (expected, found) in enumerate(zip(*rows, strict=True)):
        assert set(expected) <= set(found)
        for name, value in expected.items():
            if not name.endswith(("_time", "_runtime", "_per_second")):
                floor = 1.1e-4 if name == "loss" else 2e-5  # transformers before 5 rounds it to four places
                assert found[name] == pytest.approx(value, rel=2e-4, abs=floor), (step, name)
