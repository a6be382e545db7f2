"""What was trained at either end of a model is what plain `transformers` loads again, saved by PEFT or merged."""

from __future__ import annotations

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from slime_fused.trainer.merging import adapts_embeddings, merge_adapter
from tests.tiny_models import tiny_llama

VOCABULARY = 64

KINDS = {
    "LoRA": {"target_modules": ["q_proj"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved ends": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "LoRA head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA ends": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7]}},
    "trained tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 7]}},
}


if Version(peft.__version__) >= Version("0.19"):  # 0.18 has the option and takes it for some layers
    for kind in ("saved embeddings", "LoRA embeddings"):
        KINDS[f"{kind}, tied"] = {**KINDS[kind], "ensure_weight_tying": True}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_merged(kind, tied, tmp_path):
    ids = torch.arange(2, 14).reshape(2, 6)
    base = tmp_path / "base"
    tiny_llama(VOCABULARY, tie_word_embeddings=tied).save_pretrained(base)
    load = AutoModelForCausalLM.from_pretrained
    torch.manual_seed(1)
    model = get_peft_model(load(base), LoraConfig(r=4, init_lora_weights=False, **KINDS[kind]))
    with torch.no_grad():
        plain = load(base)(ids).logits
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        trained = model(ids).logits
    is_tied = tied and ("tied" in kind or kind in ("LoRA", "trained tokens"))
    assert float((trained - plain).abs().max()) > 0.1
    model.save_pretrained(tmp_path / "adapter")

    with torch.no_grad():
        loaded = PeftModel.from_pretrained(load(base), tmp_path / "adapter")(ids).logits
        torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-4)
        merged = merge_adapter(load(base), tmp_path / "adapter", adapts_embeddings(model))
        torch.testing.assert_close(merged(ids).logits, trained, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        again = load(tmp_path / "merged")
        torch.testing.assert_close(again(ids).logits, trained, rtol=1e-4, atol=1e-4)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == is_tied
    assert again.config.tie_word_embeddings == is_tied
