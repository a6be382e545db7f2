"""`BatchLoss` against plain PyTorch, under what surrounds the model in other people's trainers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from slime_fused import reference
from slime_fused.integrations.batches import BatchLoss, Labels, lora_dropout_kept, pair_metrics
from slime_fused.losses import CPO, DPO, ORPO, SimPO, Slime
from slime_fused.model.check import HeadMismatchError
from slime_fused.model.head import attach_head
from tests.tiny_models import tiny_llama


def padded_batch(side: str = "right") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs and labels of two pairs: prompts of two tokens, responses of 3, 1, 2 and 4."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in (5, 3, 4, 6)])
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.randint(1, 50, (4, 6), generator=generator) * mask
    labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) <= 2), -100)
    return {"input_ids": ids, "attention_mask": mask}, labels


def head_model(**overrides) -> nn.Module:
    model = tiny_llama(50, **overrides)
    attach_head(model)
    return model


def label_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(S, T - 1) of what the position before predicts; 0 where there is no label."""
    targets = labels[:, 1:]
    logps = (
        torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    )
    return logps.masked_fill(targets == -100, 0.0)


class DeepSpeedEngine(nn.Module):
    """As that one: a module around the model, whose own config is a dictionary."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.config = {"zero_optimization": {"stage": 2}}

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"


@pytest.mark.parametrize("wrap", [lambda model: model, DeepSpeedEngine], ids=["bare", "engine"])
def test_the_logit_transform_is_the_models_own(wrap):
    """Cohere's scale, as an entry of a Llama's config: the loss has it wherever the model is wrapped."""
    inputs, labels = padded_batch()
    model = head_model()
    model.config.logit_scale = 0.25
    outputs = BatchLoss.of(Slime()).policy(wrap(model), inputs, Labels(labels), None)
    logps = label_logps(0.25 * model(**inputs).logits, labels)
    want = reference.preference_terms(logps, labels[:, 1:], Slime(), {}).loss
    torch.testing.assert_close(outputs["loss"].double(), want, rtol=1e-5, atol=1e-6)


def test_the_reference_is_without_dropout_and_leaves_every_mode_as_it_was():
    inputs, labels = padded_batch()
    model = head_model(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    logps = BatchLoss.of(DPO()).reference(model, model, inputs, Labels(labels))
    assert [module.training for module in model.modules()] == modes
    model.eval()
    want = label_logps(model(**inputs).logits, labels)
    torch.testing.assert_close(
        logps[:, :-1].double().masked_fill(labels[:, 1:] == -100, 0.0), want, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cut", [1, 4], ids=["first response", "every response"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_head_is_checked_though_responses_are_cut_off(side, cut, packed):
    inputs, labels = padded_batch(side)
    labels[:cut] = -100
    own = Labels(labels)
    if packed:
        mask = inputs["attention_mask"].bool()
        bounds = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()
        own = Labels(labels[mask][None], bounds)
        positions = torch.cat([torch.arange(n) for n in mask.sum(1).tolist()])[None]
        inputs = {"input_ids": inputs["input_ids"][mask][None], "position_ids": positions}
    model = head_model()
    of = BatchLoss.of(Slime())
    of.check(model, {**inputs, "use_cache": False}, own)
    model.config.logit_scale = 0.25  # which this model does not apply
    with pytest.raises(HeadMismatchError):
        of.check(model, inputs, own)


def step(accumulation: int = 1, processes: int = 1) -> SimpleNamespace:
    return SimpleNamespace(gradient_accumulation_steps=accumulation, world_size=processes)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (Slime(stabilizer_reduction="token"), "stabilizer_reduction"),
        (CPO(), "nll_reduction"),
        (ORPO(nll_reduction="token"), "nll_reduction"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_means_over_tokens_are_refused_where_a_step_has_several_batches(loss, name):
    """The mean of two batches' token means is not the step's: 1 and 3 rejected tokens count the same."""
    of = BatchLoss.of(loss)
    of.check_step(step())
    with pytest.raises(ValueError, match=f"{name}: expected 'sequence', got 'token' with gradient_accum.*=2 and 1"):
        of.check_step(step(accumulation=2))
    with pytest.raises(ValueError, match=f"{name}: .*=1 and 8 process"):
        of.check_step(step(processes=8))


@pytest.mark.parametrize(
    "loss",
    [
        Slime(),
        CPO(nll_reduction="sequence"),
        SimPO(),
        CPO(nll_weight=0.0),
        Slime(stabilizer_reduction="token", lambda_l=0.0),
    ],
    ids=str,
)
def test_means_over_pairs_are_not(loss):
    BatchLoss.of(loss).check_step(step(accumulation=4, processes=8))


def test_a_policy_that_would_be_its_own_reference_is_refused():
    model = tiny_llama(50)
    of = BatchLoss.of(DPO())
    with pytest.raises(ValueError, match="ref_model: expected a model, since DPO needs a reference and LlamaForC"):
        of.check_reference(model, None)
    of.check_reference(model, model)
    BatchLoss.of(Slime()).check_reference(model, None)
    of.check_reference(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), None)


def test_lora_dropout_outlives_a_trainer_that_switches_dropout_off():
    model = get_peft_model(tiny_llama(50), LoraConfig(target_modules=["q_proj"], lora_dropout=0.05))
    other = model.dropout = nn.Dropout(0.2)
    rates = {id(module): module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    assert sorted(rates.values()) == [0.05, 0.05, 0.2]
    with lora_dropout_kept(model):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    assert other.p == 0.0
    kept = [module.p for module in model.modules() if isinstance(module, nn.Dropout) and module is not other]
    assert kept == [0.05, 0.05]


def test_terms_have_the_names_that_every_trainer_here_logs():
    inputs, labels = padded_batch()
    outputs = BatchLoss.of(Slime()).policy(head_model(), inputs, Labels(labels), None)
    metrics = pair_metrics(outputs, Labels(labels), Slime())
    parts = [float(metrics[f"slime/{name}"]) for name in ("anchor", "margin", "stabilizer")]
    assert sum(parts) == pytest.approx(float(outputs["loss"].detach()), rel=1e-5)
    assert "slime/margin_loss" not in metrics
