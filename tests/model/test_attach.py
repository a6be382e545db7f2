"""What is patched, wrapped or asked around the loss in the head: in either order, or refused by name."""

from __future__ import annotations

import functools
import inspect
import types

import pytest
import torch

from slime_fused.model.check import check_head
from slime_fused.model.head import attach_head
from slime_fused.model.reference import as_reference
from slime_fused.model.transform import LogitTransform
from slime_fused.trainer import SlimeTrainer
from tests.model.head_cases import VOCABULARY, assert_as_own_logits, text_batch
from tests.tiny_models import make_pairs, tiny_llama


def patch_as_liger_does(model: torch.nn.Module) -> None:
    """Replaces the forward on the instance; unknown options go on to the decoder, which takes and drops them."""

    def lce_forward(self, input_ids=None, attention_mask=None, labels=None, logits_to_keep=0, **kwargs):
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.lm_head(outputs[0][:, slice(-logits_to_keep, None) if logits_to_keep else slice(None)])
        return types.SimpleNamespace(logits=logits, loss=None)

    model.forward = types.MethodType(lce_forward, model)


def test_a_forward_that_was_replaced_before_or_after():
    batch = text_batch()
    for is_first in (True, False):
        model = tiny_llama(VOCABULARY).double()
        if is_first:
            attach_head(model)
        patch_as_liger_does(model)
        if not is_first:
            attach_head(model)
        assert "lm_head.weight" in assert_as_own_logits(model, batch)


def test_a_loss_that_a_replaced_forward_drops_is_missed():
    batch = text_batch()
    batch.pop("labels")
    model = tiny_llama(VOCABULARY)
    attach_head(model)
    with pytest.raises(ZeroDivisionError):  # after which the guard must be on as before
        model(**batch, head_call=lambda hidden, weight, bias: 1 / 0)
    patch_as_liger_does(model)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM was replaced after attach_head \(by tests.model"):
        model(**batch, head_call=lambda hidden, weight, bias: {"loss": hidden.sum()})
    assert model(**batch).logits.shape[-1] == VOCABULARY


@pytest.mark.parametrize("check", [True, False])
def test_the_trainer_when_its_model_is_patched_later(model, check, make_args, tokenizer):
    trainer = SlimeTrainer(
        model, make_args(check_head=check), train_dataset=make_pairs(8), processing_class=tokenizer
    )
    patch_as_liger_does(model)
    assert trainer.train().training_loss > 0


def test_a_wrapper_of_the_forward_stays_around_the_loss():
    """Autocast of accelerate is one: attached again outside of it, the loss would run in another dtype."""
    batch = text_batch()
    model = tiny_llama(VOCABULARY).double()
    attach_head(model)
    inner, calls = model.forward, []

    def wrapper(*args, **kwargs):
        calls.append("head_call" in kwargs)
        return inner(*args, **kwargs)

    wrapper.__wrapped__ = inner
    model.forward = wrapper
    assert_as_own_logits(model, batch)
    assert calls == [True, False]
    model.forward = functools.wraps(inner)(wrapper)
    assert_as_own_logits(model, batch)
    assert calls == [True, False] * 2


def test_the_signature_stays_as_it_was():
    model = tiny_llama(VOCABULARY)
    before = inspect.signature(model.forward), inspect.signature(model.lm_head.forward)
    attach_head(model)
    assert (inspect.signature(model.forward), inspect.signature(model.lm_head.forward)) == before


def test_attaching_twice_is_attaching_once():
    model = tiny_llama(VOCABULARY)
    attach_head(model)
    forwards = model.forward, model.lm_head.forward
    attach_head(model)
    assert (model.forward, model.lm_head.forward) == forwards
    assert len(model._forward_hooks) == 1


def test_a_model_without_a_loss_compiles_into_one_graph():
    model = tiny_llama(VOCABULARY)
    attach_head(model)

    def logits(ids):
        return model(input_ids=ids).logits

    assert torch._dynamo.explain(logits)(text_batch()["input_ids"]).graph_break_count == 0


def test_a_pass_that_only_looks_leaves_every_module_in_its_mode():
    """A frozen part that was put into evaluation stays there."""
    model = tiny_llama(VOCABULARY).train()
    attach_head(model)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    check_head(model, text_batch(), LogitTransform(), "auto", "auto")
    assert [module.training for module in model.modules()] == modes
    with as_reference(model, model):
        assert not model.training
    assert [module.training for module in model.modules()] == modes
