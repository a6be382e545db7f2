"""Every kind of head that PEFT makes, under TRL: steps as the reference's, and no copy of an adapter left."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import slime_fused as sf
from slime_fused.integrations.trl import enable_loss, enable_slime
from tests.integrations.trl_cases import Expected, make_trainer, trained_parameters
from tests.tiny_models import tiny_llama

SLIME = sf.SlimeLossConfig()

HEADS = {
    "frozen": ({}, {"target_modules": ["q_proj", "v_proj"]}),
    "modules_to_save": ({}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied": ({"tie_word_embeddings": True}, {"target_modules": ["q_proj", "v_proj"]}),
    "trainable tokens": ({}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 17, 40]}),
    "trainable tokens, tied": (
        {"tie_word_embeddings": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 17, 40]},
    ),
}


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})


def wrapped(tokenizer, **options):
    """A tiny model with an adapter that does something."""
    model = get_peft_model(tiny_llama(len(tokenizer)), lora(**{"target_modules": ["q_proj", "v_proj"], **options}))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("kind", HEADS)
def test_steps_of_every_kind_of_head(kind, tokenizer, tmp_path):
    overrides, adapter = HEADS[kind]
    model = tiny_llama(len(tokenizer), **overrides)
    trainer = make_trainer(
        tokenizer, tmp_path, model, ref_model=None, learning_rate=1e-2, extra={"peft_config": lora(**adapter)}
    )
    enable_slime(trainer)
    expected = Expected(trainer, SLIME)
    trainer.train()
    expected.check()
    trains_more = any("lm_head" in name or "token_adapter" in name for name in trained_parameters(trainer.model))
    assert trains_more == (kind not in ("frozen", "tied"))


def test_a_tied_head_without_an_adapter(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, tiny_llama(len(tokenizer), tie_word_embeddings=True))
    enable_slime(trainer)
    expected = Expected(trainer, SLIME)
    trainer.train()
    expected.check()


def late_adapter(tokenizer, folder, **options):
    """TRL 1.15 and newer refuse LoRA on the head when they are constructed; so it is put on afterwards."""
    trainer = make_trainer(tokenizer, folder, learning_rate=1e-2)
    adapter = lora(target_modules=["q_proj", "lm_head"], **options)
    trainer.model = trainer.model_wrapped = get_peft_model(trainer.model, adapter)
    return trainer


def test_lora_on_the_head(tokenizer, tmp_path):
    trainer = late_adapter(tokenizer, tmp_path)
    enable_slime(trainer)
    expected = Expected(trainer, SLIME)
    trainer.train()
    expected.check()
    assert any("lm_head.lora_A" in name for name in expected.steps[0][2])


def test_dora_on_the_head_is_refused(tokenizer, tmp_path):
    trainer = late_adapter(tokenizer, tmp_path, use_dora=True)
    with pytest.raises(ValueError, match=r"peft_config: the output head carries the LoRA variant .*Dora"):
        enable_slime(trainer)


@pytest.mark.parametrize("saved", [[], ["lm_head"]])
def test_no_copy_of_a_wrapped_models_adapter_is_left(saved, tokenizer, tmp_path):
    """TRL copies the adapter of a model that comes wrapped, a saved head included."""
    model = wrapped(tokenizer, modules_to_save=saved or None)
    shapes = {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()}
    trainer = make_trainer(tokenizer, tmp_path, model, ref_model=None, learning_rate=1e-2)
    assert any(".ref." in name for name, _ in model.named_parameters())
    enable_slime(trainer)
    assert {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()} == shapes
    assert list(model.peft_config) == ["default"]
    expected = Expected(trainer, SLIME)
    trainer.train()
    expected.check()
    assert {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()} == shapes
    with pytest.raises(ValueError, match="an earlier enable_slime or enable_loss dropped it"):
        enable_loss(make_untrained(trainer), sf.losses.DPO())


def make_untrained(trainer):
    """As it was before its steps: what it says of them is not what is asked here."""
    trainer.state.global_step = 0
    return trainer


@pytest.mark.parametrize("cached", [False, True])
def test_the_reference_of_a_fresh_adapter_is_the_model_without_it(cached, tokenizer, tmp_path):
    plain = tiny_llama(len(tokenizer))
    trainer = make_trainer(
        tokenizer,
        tmp_path,
        ref_model=None,
        learning_rate=1e-2,
        extra={"peft_config": lora(target_modules=["q_proj"], modules_to_save=["lm_head"])},
    )
    loss = sf.losses.DPO(beta=0.5)
    enable_loss(trainer, loss, cache_reference=cached)
    expected = Expected(trainer, loss, lambda inputs: plain(**inputs).logits)
    trainer.train()
    expected.check()
    assert "eval_loss" in trainer.evaluate()


@pytest.mark.parametrize("cached", [False, True])
def test_the_reference_of_a_wrapped_model_is_its_first_adapter(cached, tokenizer, tmp_path):
    model, first = wrapped(tokenizer), wrapped(tokenizer)
    trainer = make_trainer(tokenizer, tmp_path, model, ref_model=None, learning_rate=1e-2)
    loss = sf.losses.DPO(beta=0.5)
    enable_loss(trainer, loss, cache_reference=cached)
    assert ("ref" in model.peft_config) == (not cached)
    expected = Expected(trainer, loss, lambda inputs: first(**inputs).logits)
    trainer.train()
    expected.check()
    assert "eval_loss" in trainer.evaluate()
