"""The head hook on every kind of head: same loss and gradients as the model's own logits, or a clear refusal."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from slime_fused.trainer import HeadMismatchError, SlimeTrainer
from tests.tiny_models import SIZES, make_pairs, slime_by_hand, tiny_llama

SMALL = {**SIZES, "attn_implementation": "eager"}


def build(architecture: str, vocab_size: int, **overrides: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(vocab_size=vocab_size, **{**SMALL, **overrides})
    return getattr(transformers, f"{architecture}ForCausalLM")(config)


def trained_gradients(model, batch, args, tokenizer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and parameter gradients through the trainer's own path, head check included."""
    trainer = SlimeTrainer(model, args, train_dataset=make_pairs(2), processing_class=tokenizer)
    trainer.model.train()
    model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def expected_gradients(model, batch, args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = slime_by_hand(model, batch, args.loss_config())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, batch, args, tokenizer) -> dict[str, torch.Tensor]:
    loss, grads = trained_gradients(model, batch, args, tokenizer)
    expected_loss, expected = expected_gradients(model, batch, args)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=2e-5, atol=1e-6)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        floor = 1e-5 * float(expected[name].abs().max()) + 1e-7
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=floor, msg=lambda m, n=name: f"{n}: {m}")
    return grads


@pytest.fixture
def batch(tokenizer, make_args):
    """Three pairs of different lengths."""
    trainer = SlimeTrainer(
        tiny_llama(len(tokenizer)), make_args(), train_dataset=make_pairs(3), processing_class=tokenizer
    )
    return trainer.data_collator([trainer.train_dataset[i] for i in range(3)])


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_loss_and_gradients_of_a_plain_head(model, batch, make_args, tokenizer, reduction):
    grads = assert_same(model, batch, make_args(stabilizer_reduction=reduction), tokenizer)
    assert float(grads["lm_head.weight"].abs().max()) > 0


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_the_naive_way_gives_the_same(model, batch, make_args, tokenizer, reduction):
    assert_same(model, batch, make_args(loss_impl="naive", stabilizer_reduction=reduction), tokenizer)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        # Caps and scales strong enough that leaving them out changes the loss by far more than the tolerance.
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Phi", {}),
        ("Gemma3", {"head_dim": 8, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8}),
    ],
)
def test_what_models_do_to_their_logits(architecture, overrides, batch, make_args, tokenizer):
    name = f"{architecture}Text" if architecture == "Gemma3" else architecture
    if architecture == "Gemma3":
        torch.manual_seed(0)
        model = transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(vocab_size=len(tokenizer), **SMALL, **overrides)
        )
    else:
        model = build(name, len(tokenizer), **overrides)
    if architecture == "Phi":
        torch.nn.init.normal_(model.lm_head.bias)
    grads = assert_same(model, batch, make_args(), tokenizer)
    assert architecture != "Phi" or "lm_head.bias" in grads


def test_a_tied_head_sums_both_gradients(batch, make_args, tokenizer):
    assert_same(tiny_llama(len(tokenizer), tie_word_embeddings=True), batch, make_args(), tokenizer)


def test_a_frozen_head_gets_no_gradient(model, batch, make_args, tokenizer):
    model.lm_head.weight.requires_grad_(False)
    grads = assert_same(model, batch, make_args(), tokenizer)
    assert "lm_head.weight" not in grads


def lora(**overrides: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **overrides})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("config", "trained"),
    [
        (lora(), "q_proj.lora_A"),
        (lora(target_modules=["q_proj", "lm_head"]), "lm_head.lora_B"),
        (lora(target_modules=["q_proj", "lm_head"], use_rslora=True, lora_dropout=0.3), "lm_head.lora_A"),
        (lora(modules_to_save=["lm_head"]), "lm_head.modules_to_save"),
        (lora(trainable_token_indices={"embed_tokens": [7, 9]}), "trainable_tokens_delta"),
    ],
    ids=["frozen head", "LoRA head", "rank-stabilised LoRA head", "modules_to_save", "trainable tokens"],
)
def test_adapters(config, trained, tied, batch, make_args, tokenizer):
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(len(tokenizer), tie_word_embeddings=tied), config)
    grads = assert_same(model, batch, make_args(), tokenizer)
    assert any(trained in name for name in grads)
    assert all("lora" in name or "modules_to_save" in name or "trainable_tokens" in name for name in grads)


def test_rounding_of_mixed_precision_is_no_mismatch(make_args, tokenizer, monkeypatch):
    # Before transformers 5 the setting goes through the environment, and would stay there.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    # Beside LoRA the model rounds two products to bfloat16 and their sum once more: log-probs differ by 0.5 here.
    model = tiny_llama(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    model = get_peft_model(model, lora(target_modules=["lm_head"]))
    trainer = SlimeTrainer(model, make_args(bf16=True), train_dataset=make_pairs(8), processing_class=tokenizer)
    assert trainer.train().training_loss > 0


def test_a_disabled_adapter_leaves_the_base_head(batch, make_args, tokenizer):
    model = get_peft_model(tiny_llama(len(tokenizer)), lora(target_modules=["lm_head"]))
    args = make_args()
    with_adapter = assert_same(model, batch, args, tokenizer)
    trainer = SlimeTrainer(model, args, train_dataset=make_pairs(2), processing_class=tokenizer)
    with model.disable_adapter(), torch.no_grad():
        loss = trainer.compute_loss(model, batch)
        torch.testing.assert_close(
            loss.double(), slime_by_hand(model, batch, args.loss_config()), rtol=2e-5, atol=0
        )
    assert with_adapter


def test_dora_on_the_head_is_refused(make_args, tokenizer):
    model = get_peft_model(tiny_llama(len(tokenizer)), lora(target_modules=["lm_head"], use_dora=True))
    with pytest.raises(ValueError, match=r"output head carries the LoRA variant \['DoraLinearVariant'\]"):
        SlimeTrainer(model, make_args(), train_dataset=make_pairs(2), processing_class=tokenizer)


def test_lora_dropout_on_the_head_is_refused(batch, make_args, tokenizer):
    model = get_peft_model(tiny_llama(len(tokenizer)), lora(target_modules=["lm_head"], lora_dropout=0.5))
    args = make_args(disable_dropout=False)
    trainer = SlimeTrainer(model, args, train_dataset=make_pairs(2), processing_class=tokenizer)
    model.train()
    with pytest.raises(ValueError, match=r"lora_dropout=0.5 on the output head"):
        trainer.compute_loss(model, batch)


def test_a_model_that_changes_its_logits_unknown_to_us_is_refused(batch, make_args, tokenizer):
    class Sharpened(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 1.5
            return outputs

    model = Sharpened(tiny_llama(len(tokenizer)).config)
    trainer = SlimeTrainer(model, make_args(), train_dataset=make_pairs(4), processing_class=tokenizer)
    with pytest.raises(HeadMismatchError, match=r"log-probs .* of Sharpened differ .* loss_impl='naive'"):
        trainer.train()
    naive = SlimeTrainer(
        Sharpened(model.config),
        make_args(loss_impl="naive"),
        train_dataset=make_pairs(4),
        processing_class=tokenizer,
    )
    assert naive.train().training_loss > 0


def test_a_head_that_is_no_matrix_is_refused(make_args, tokenizer, model):
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"expected an output head that is a torch.nn.Linear, got Sequential"):
        SlimeTrainer(model, make_args(), train_dataset=make_pairs(2), processing_class=tokenizer)


def test_a_model_without_a_head_is_refused(make_args, tokenizer, model):
    with pytest.raises(TypeError, match=r"with an output head, got LlamaModel"):
        SlimeTrainer(model.model, make_args(), train_dataset=make_pairs(2), processing_class=tokenizer)


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe"])
def test_the_load_balancing_loss_of_experts_is_added(architecture, batch, make_args, tokenizer):
    extra = {"moe_intermediate_size": 16} if architecture == "Qwen3Moe" else {}
    model = build(
        architecture,
        len(tokenizer),
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        **{"num_local_experts" if architecture == "Mixtral" else "num_experts": 4},
        **extra,
    )
    args = make_args()
    loss, grads = trained_gradients(model, batch, args, tokenizer)
    model.zero_grad()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    expected = slime_by_hand(model, batch, args.loss_config()) + 0.5 * model(**inputs).aux_loss.double()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-5, atol=1e-6)
    gates = [(n, p.grad) for n, p in model.named_parameters() if n.endswith(("gate.weight", "router.weight"))]
    assert gates
    for name, grad in gates:
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()))


def test_the_model_still_generates_and_evaluates_as_before(model, batch, make_args, tokenizer):
    prompt = batch["input_ids"][:1, :3]
    before = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=1)
    logits = model(prompt).logits
    SlimeTrainer(model, make_args(), train_dataset=make_pairs(2), processing_class=tokenizer)
    torch.testing.assert_close(model(prompt).logits, logits, rtol=0, atol=0)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=1), before)
