"""What a loss in a model's head is held against: the same loss from the model's own logits, in float64."""

from __future__ import annotations

from typing import Any

import torch

from slime_fused import reference
from slime_fused.losses import Formula, Slime
from slime_fused.model.calls import FusedLoss, run_in_head
from slime_fused.model.transform import transform_of

VOCABULARY = 64
LOSS: Formula = Slime()


def text_batch(sequences: int = 4, length: int = 9, prompt: int = 4) -> dict[str, torch.Tensor]:
    """Random tokens; the last of the rejected rows is padded at the end."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (sequences, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :prompt] = -100
    mask[-1, -2:], labels[-1, -2:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients_of(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fused_loss(model: torch.nn.Module, batch: dict[str, Any], run: Any = run_in_head) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    transform = transform_of(model)
    call = FusedLoss(batch["labels"], None, LOSS, transform, "auto", "auto")
    return run(model, inputs, call)["loss"]


def loss_of_logits(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """By `slime_fused.reference`, from the model's own answer, which may begin with virtual tokens."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    logits = model(**inputs).logits[:, -batch["labels"].shape[1] : -1]
    logps = torch.log_softmax(logits.double(), -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return reference.preference_terms(logps, targets, LOSS, {}).loss


def assert_as_own_logits(
    model: torch.nn.Module, batch: dict[str, Any], rtol: float = 1e-9
) -> dict[str, torch.Tensor]:
    """Values and gradients of every trained parameter, of a model in float64; returns the gradients."""
    loss = fused_loss(model, batch)
    grads = gradients_of(model, loss)
    expected_loss = loss_of_logits(model, batch)
    expected = gradients_of(model, expected_loss)
    torch.testing.assert_close(loss.detach().double(), expected_loss.detach(), rtol=rtol, atol=0)
    assert grads.keys() == expected.keys()
    assert grads
    for name, grad in grads.items():
        floor = rtol * float(expected[name].abs().max())
        torch.testing.assert_close(grad, expected[name], rtol=rtol, atol=floor, msg=lambda m, n=name: f"{n}: {m}")
    return grads
