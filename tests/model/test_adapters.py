"""Adapters that come, change or go after the loss was attached to the head, and PEFT's other methods."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftMixedModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)

from slime_fused.model.head import attach_head
from slime_fused.trainer import SlimeTrainer
from tests.model.head_cases import VOCABULARY, assert_as_own_logits, fused_loss, loss_of_logits, text_batch
from tests.tiny_models import make_pairs, require_transformers_adapters, tiny_llama

ON_HEAD = {
    "LoRA": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    "saved copy": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "trainable tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 7]}),
}
TRAINED = {
    "LoRA": "lm_head.lora_B",
    "saved copy": "lm_head.modules_to_save",
    "trainable tokens": "lm_head.token_ad",
}


def tiny_model(**overrides: object) -> torch.nn.Module:
    return tiny_llama(VOCABULARY, **overrides).double()


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Adapters start as no change at all, which would hide that they are left out."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def batch():
    return text_batch()


@pytest.mark.parametrize("kind", ON_HEAD)
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter of the model", "add_adapter of PEFT"])
def test_an_adapter_put_on_after_the_head_was_attached(kind, way, batch):
    model = tiny_model()
    attach_head(model)
    assert "lm_head.weight" in assert_as_own_logits(model, batch)
    if way == "get_peft_model":
        model = get_peft_model(model, ON_HEAD[kind])
    elif way == "add_adapter of the model":
        require_transformers_adapters()
        model.add_adapter(ON_HEAD[kind], "later")
    else:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"]))
        assert_as_own_logits(model, batch)
        model.add_adapter("later", ON_HEAD[kind])
        model.set_adapter("later")
    grads = assert_as_own_logits(shaken(model.double()), batch)
    assert any(TRAINED[kind] in name for name in grads), grads.keys()


def test_an_adapter_put_on_after_the_trainer_was_built(model, make_args, tokenizer):
    trainer = SlimeTrainer(model, make_args(), train_dataset=make_pairs(8), processing_class=tokenizer)
    trainer.model = trainer.model_wrapped = get_peft_model(model, ON_HEAD["LoRA"])
    before = {name: p.detach().clone() for name, p in model.lm_head.named_parameters()}
    assert trainer.train().training_loss > 0
    for name, parameter in model.lm_head.named_parameters():
        assert torch.equal(parameter, before[name]) == (name == "base_layer.weight"), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_loaded_adapter_with_the_head(tmp_path, tied, batch):
    saved = get_peft_model(tiny_model(tie_word_embeddings=tied), ON_HEAD["saved copy"])
    shaken(saved).save_pretrained(tmp_path)
    model = get_peft_model(tiny_model(tie_word_embeddings=tied), LoraConfig(r=2, target_modules=["v_proj"]))
    attach_head(model)
    model.load_adapter(str(tmp_path), "loaded", is_trainable=True)
    model.set_adapter("loaded")
    grads = assert_as_own_logits(model, batch)
    assert any("lm_head.modules_to_save.loaded" in name for name in grads)
    torch.testing.assert_close(fused_loss(model, batch), fused_loss(saved, batch), rtol=1e-12, atol=0)


def test_several_adapters_one_none_and_merged(batch):
    model = get_peft_model(tiny_model(), ON_HEAD["LoRA"])
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"], init_lora_weights=False))
    attach_head(model.double())
    losses = []
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        grads = assert_as_own_logits(model, batch)
        assert {name.split(".")[-2] for name in grads} == ({active} if isinstance(active, str) else set(active))
        losses.append(float(fused_loss(model, batch)))
    with model.disable_adapter():
        losses.append(float(fused_loss(model, batch)))
        assert losses[-1] == pytest.approx(float(loss_of_logits(model, batch)), rel=1e-9)
    assert len({round(loss, 6) for loss in losses}) == 4
    model.base_model.merge_adapter()
    assert float(fused_loss(model, batch)) == pytest.approx(losses[2], rel=1e-9)
    with model.disable_adapter():  # PEFT takes the merged matrices out again
        assert float(fused_loss(model, batch)) == pytest.approx(losses[3], rel=1e-9)
        assert float(loss_of_logits(model, batch)) == pytest.approx(losses[3], rel=1e-9)


def test_saved_copies_and_retrained_tokens_that_are_switched_off(batch):
    for kind in ("saved copy", "trainable tokens"):
        model = shaken(get_peft_model(tiny_model(), ON_HEAD[kind]))
        attach_head(model)
        with model.disable_adapter():
            plain = float(fused_loss(model, batch))
            assert plain == pytest.approx(float(loss_of_logits(model, batch)), rel=1e-9)
        assert float(fused_loss(model, batch)) != pytest.approx(plain, rel=1e-6)


def test_a_bias_of_the_head_beside_adapters(batch):
    """PEFT adds it for LoRA and leaves it out for trainable tokens: so do we."""
    for kind in ON_HEAD:
        model = tiny_model()
        model.lm_head = torch.nn.Linear(32, VOCABULARY, bias=True).double()
        assert_as_own_logits(shaken(get_peft_model(model, ON_HEAD[kind])), batch)


def test_a_copy_of_a_model_runs_its_own_head(batch):
    model = tiny_model()
    attach_head(model)
    twin = copy.deepcopy(model)
    shaken(twin)
    grads = assert_as_own_logits(twin, batch)
    assert "lm_head.weight" in grads
    assert all(p.grad is None for p in model.parameters())
    assert float(fused_loss(twin, batch)) != pytest.approx(float(fused_loss(model, batch)), rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
        TrainableTokensConfig(token_indices=[3, 7], target_modules=["embed_tokens"]),
        TrainableTokensConfig(token_indices=[3, 7], target_modules=["lm_head"]),
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(r=4, target_modules=["q_proj"]),
        OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
        LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    ],
    ids=lambda c: f"{c.peft_type.value} {getattr(c, 'target_modules', '')}",
)
def test_other_methods_beside_the_head(config, tied, batch):
    model = get_peft_model(tiny_model(tie_word_embeddings=tied), config).double().eval()
    assert_as_own_logits(shaken(model), batch)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (LoHaConfig(r=4, target_modules=["lm_head"]), "loha"),
        (LoKrConfig(r=4, target_modules=["lm_head"]), "lokr"),
        (IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "ia3"),
        (OFTConfig(oft_block_size=4, target_modules=["lm_head"]), "oft"),
        (VeraConfig(r=4, target_modules=["lm_head"]), "vera"),
        (AdaLoraConfig(r=4, target_modules=["lm_head"], total_step=10), "adalora"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_methods_on_the_head_are_refused_by_name(config, method, batch):
    with pytest.raises(ValueError, match=rf"an adapter of the kind {method} .*modules_to_save=\['lm_head'\]"):
        attach_head(get_peft_model(tiny_model(), config))
    model = tiny_model()
    attach_head(model)
    with pytest.raises(ValueError, match=f"an adapter of the kind {method}"):
        fused_loss(get_peft_model(model, config), batch)


def test_adapters_of_several_methods(batch):
    model = PeftMixedModel(tiny_model(), ON_HEAD["LoRA"])
    model.add_adapter("loha", LoHaConfig(r=4, target_modules=["v_proj"]))
    model.set_adapter(["default", "loha"])
    assert_as_own_logits(shaken(model.double()), batch)


def test_lora_on_a_parameter_of_the_head_is_refused():
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=[], target_parameters=["lm_head.weight"]))
    with pytest.raises(ValueError, match=r"an adapter of the kind lora \(ParamWrapper\)"):
        attach_head(model)


class PackedTensor(torch.Tensor):
    """A quantiser's tensor that claims the dtype it stands for, as torchao's do."""


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        (torch.zeros(VOCABULARY * 16, 1, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(VOCABULARY, 32, dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.zeros(VOCABULARY, 32).as_subclass(PackedTensor), "PackedTensor"),
    ],
    ids=["four bits", "eight bits", "a tensor class"],
)
def test_a_quantised_head_is_refused(weight, named):
    model = tiny_llama(VOCABULARY)
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=rf"{named} \(quantised\).*llm_int8_skip_modules"):
        attach_head(model)
