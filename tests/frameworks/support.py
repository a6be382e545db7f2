"""What the tests of frameworks share: every step of a training is held against plain PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer

from slime_fused import reference
from tests.tiny_models import make_pairs, make_tokenizer, tiny_llama


def save_model(folder: Path, **overrides: object) -> Path:
    """A tiny Llama and its tokenizer, as a framework wants to load them."""
    tokenizer = make_tokenizer()
    tiny_llama(len(tokenizer), **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_pairs(path: Path, count: int, rename: Callable[[dict[str, str]], object] = dict) -> Path:
    """Pairs as JSON lines, each as ``rename`` wants it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(rename(pair)) + "\n" for pair in make_pairs(count)))
    return path


def token_logps(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """(S, T - 1) log-probs of the labels from the model's own logits, in float64."""
    logits = model(**inputs).logits[:, :-1].double()
    targets = labels[:, 1:].clamp(min=0)
    return torch.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def plain_loss(model: nn.Module, batch: dict[str, Tensor], loss, reference_model=None) -> Tensor:
    """The loss of the batch by `slime_fused.reference`, from materialised logits.

    ``reference_model`` is a context manager that gives the model to compare with, where the loss needs one.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    given = {}
    if reference_model is not None:
        with torch.no_grad(), reference_model as other:
            given["ref_token_logps"] = token_logps(other, inputs, labels)
    return reference.preference_terms(token_logps(model, inputs, labels), labels[:, 1:], loss, given).loss


def watch_steps(monkeypatch, expected: Callable[[Trainer, dict[str, Tensor]], Tensor]) -> list[float]:
    """Hold every step's loss and gradients against ``expected(trainer, batch)``; the list gets the losses."""
    plain_step = Trainer.training_step
    losses: list[float] = []

    def training_step(self, model, inputs, *args, **kwargs):
        batch = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        model.zero_grad()
        loss = plain_step(self, model, inputs, *args, **kwargs)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients
        for parameter in model.parameters():
            parameter.grad = None
        want = expected(self, batch)
        want.backward()
        torch.testing.assert_close(loss.double(), want.detach(), rtol=2e-5, atol=1e-6)
        wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == wanted.keys()
        # Rounding is relative to the largest gradient of a tensor.
        for name, gradient in gradients.items():
            floor = 2e-5 * float(wanted[name].abs().max()) + 1e-7
            torch.testing.assert_close(
                gradient, wanted[name], rtol=1e-3, atol=floor, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3
        for name, parameter in model.named_parameters():
            parameter.grad = gradients.get(name)
        losses.append(float(loss))
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return losses


def watch_dropout(monkeypatch) -> list[set[float]]:
    """The list gets the rates of the model's dropout that acts, one set per step."""
    plain_step = Trainer.training_step
    seen: list[set[float]] = []

    def training_step(self, model, inputs, *args, **kwargs):
        loss = plain_step(self, model, inputs, *args, **kwargs)
        seen.append({layer.p for layer in model.modules() if isinstance(layer, nn.Dropout) and layer.training})
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return seen
