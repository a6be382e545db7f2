"""Batches with more in them than tokens and a mask: images, token types, positions, padding on the left."""

from __future__ import annotations

import pytest
import torch
import transformers

from slime_fused.model.check import HeadMismatchError, check_head
from slime_fused.model.head import attach_head
from slime_fused.model.transform import LogitTransform, find_logit_transform
from tests.model.head_cases import VOCABULARY, assert_as_own_logits, text_batch
from tests.tiny_models import SIZES, tiny_llama

IMAGE = 60
TEXT = {
    "vocab_size": VOCABULARY,
    **SIZES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.3,
}


def gemma3() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8},
        vision_config={**VISION, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    model = transformers.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.get_parameter("model.multi_modal_projector.mm_input_projection_weight"), std=0.3)
    return model, {"pixel_values": images, "token_type_ids": "image tokens"}


def llava() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    return transformers.LlavaForConditionalGeneration(config), {"pixel_values": images}


def qwen2_vl() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = transformers.Qwen2VLConfig(
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "initializer_range": 0.3,
        },
        image_token_id=IMAGE,
        vision_start_token_id=61,
        vision_end_token_id=62,
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    patches = torch.randn(4 * 16, 3 * 2 * 4 * 4, dtype=torch.float64)  # 2 x 2 of 4 x 4 are a token
    grid = torch.tensor([[1, 4, 4]] * 4)
    return model, {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": "image tokens"}


@pytest.mark.parametrize("make", [gemma3, llava, qwen2_vl])
def test_images_reach_the_decoder(make):
    torch.manual_seed(0)
    model, extra = make()
    model = model.double().eval()
    attach_head(model)
    batch = text_batch(length=12, prompt=7)
    batch["input_ids"][:, 0] = 61
    batch["input_ids"][:, 1:5] = IMAGE
    batch["input_ids"][:, 5] = 62
    batch["labels"] = torch.where(batch["labels"] >= 60, 5, batch["labels"])
    batch["input_ids"][:, 7:] = batch["input_ids"][:, 7:].clamp(max=59)
    are_images = (batch["input_ids"] == IMAGE).long()
    for name, value in extra.items():
        batch[name] = are_images if isinstance(value, str) else value
    grads = assert_as_own_logits(model, batch, rtol=1e-5)
    seen = [name for name, grad in grads.items() if "vision" in name or "visual" in name]
    assert any(float(grads[name].abs().max()) > 0 for name in seen), grads.keys()
    assert check_head(model, batch, find_logit_transform(model.config), "auto", "auto") < 1e-4
    others = {**batch, "pixel_values": torch.randn_like(batch["pixel_values"])}
    assert check_head(model, others, find_logit_transform(model.config), "auto", "auto") < 1e-4


@pytest.fixture
def model():
    # Its eager attention gives no number for a token that sees none, in float64.
    model = tiny_llama(VOCABULARY, attn_implementation="sdpa").double()
    attach_head(model)
    return model


def test_left_padding_and_positions(model):
    batch = text_batch()
    batch["attention_mask"][:, :3], batch["labels"][:, :3] = 0, -100
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert_as_own_logits(model, batch)
    assert check_head(model, batch, LogitTransform(), "auto", "auto") < 1e-5
    with pytest.raises(HeadMismatchError):
        check_head(model, batch, LogitTransform(scale=0.9), "auto", "auto")


def test_what_is_passed_to_the_model(model):
    """Both ways see the same inputs: a check that left some out would compare another distribution."""
    seen = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    batch = {**text_batch(), "position_ids": torch.arange(9).expand(4, 9) * 2, "completion_mask": torch.ones(4, 9)}
    batch["labels"][0] = -100  # nothing to predict in the first sequence
    check_head(model, batch, LogitTransform(), "auto", "auto")
    assert len(seen) == 2
    for kwargs in seen:
        assert kwargs["input_ids"].shape == (1, 8)
        torch.testing.assert_close(kwargs["input_ids"][0], batch["input_ids"][1, :8])
        torch.testing.assert_close(kwargs["position_ids"][0], batch["position_ids"][1, :8])
        assert "completion_mask" not in kwargs


def test_a_batch_without_targets(model):
    batch = {**text_batch(), "labels": torch.full((4, 9), -100)}
    with pytest.raises(ValueError, match="a sequence with a token to predict"):
        check_head(model, batch, LogitTransform(), "auto", "auto")
