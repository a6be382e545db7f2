"""Who takes the training step: the same decoder and optimiser, and five ways from there to the SLIME loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import util

import torch
from torch import Tensor, nn

import slime_fused
from bench.contestants import full_logits_logps
from bench.peers import trl_logps
from bench.steps.cases import StepBatch
from bench.steps.model import Training
from slime_fused import reference
from slime_fused.backends import resolve_backend


@dataclass(frozen=True)
class Prepared:
    """A contestant on one model and batch."""

    loss: Callable[[], Tensor]
    ran: str = ""
    """Which of several ways it takes here."""
    copies: tuple[nn.Module, ...] = ()
    """Models that it holds beside the one that trains."""


@dataclass(frozen=True)
class StepContestant:
    """One way to the loss. ``prepare`` may raise: the exception's text becomes the row's reason."""

    name: str
    note: str
    prepare: Callable[[Training, StepBatch], Prepared]
    needs: tuple[str, ...] = ()
    """Top-level modules without which it cannot run."""
    compiles: bool = False
    """Whether its first step at a new size compiles code."""

    def unsupported(self) -> str | None:
        """None where it can run, else the reason why not."""
        missing = [module for module in self.needs if util.find_spec(module) is None]
        return f"not installed: {', '.join(missing)}" if missing else None


def _token_logps(logits: Tensor, batch: StepBatch) -> Tensor:
    """(M,) log-probs of the labels out of ``logits`` (2P, T, V), by a log-softmax of all of them in their dtype."""
    logps = torch.log_softmax(logits[:, :-1], dim=-1)
    targets = batch.labels[:, 1:].clamp_min(0)
    token_logps = logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return token_logps[batch.labels[:, 1:] >= 0].float()


def _slime(token_logps: Tensor, batch: StepBatch) -> Tensor:
    """The SLIME loss with the paper's defaults from the labels' log-probs (M,), through plain PyTorch."""
    return reference.slime_terms(token_logps, batch.cu_valid).loss


def _naive(training: Training, batch: StepBatch) -> Prepared:
    return Prepared(lambda: _slime(_token_logps(training.logits(batch.input_ids), batch), batch))


def _naive_with_reference(training: Training, batch: StepBatch) -> Prepared:
    """With LoRA the reference is the model without its adapter, else a frozen copy; what comes out is discarded."""
    model = training.model
    has_adapter = hasattr(model, "disable_adapter")
    frozen = model if has_adapter else copy.deepcopy(model).eval().requires_grad_(False)
    adapters_off = model.disable_adapter if has_adapter else nullcontext

    def loss() -> Tensor:
        with torch.no_grad(), adapters_off():
            _token_logps(frozen(input_ids=batch.input_ids, use_cache=False).logits, batch)
        return _slime(_token_logps(training.logits(batch.input_ids), batch), batch)

    if has_adapter:
        return Prepared(loss, "reference: adapter disabled")
    return Prepared(loss, "reference: frozen copy", (frozen,))


def _naive_compiled(training: Training, batch: StepBatch) -> Prepared:
    compiled = torch.compile(full_logits_logps)

    def loss() -> Tensor:
        hidden = training.hidden_states(batch.input_ids).flatten(0, 1)
        logps = compiled(hidden, training.head_weight, batch.targets)
        return _slime(logps.index_select(0, batch.rows), batch)

    return Prepared(loss)


def _trl_fused_head(training: Training, batch: StepBatch) -> Prepared:
    def loss() -> Tensor:
        hidden = training.hidden_states(batch.input_ids).flatten(0, 1)
        logps = trl_logps(hidden, training.head_weight, batch.targets)
        return _slime(logps.index_select(0, batch.rows), batch)

    return Prepared(loss)


def _slime_fused(training: Training, batch: StepBatch) -> Prepared:
    weight = training.head_weight

    def loss() -> Tensor:
        hidden = training.hidden_states(batch.input_ids)
        return slime_fused.slime_loss(hidden, weight, batch.labels, shift=True).loss

    # Values do not matter to the plan, only shape, dtype, device and which gradients are wanted.
    like = torch.empty(*batch.input_ids.shape, weight.shape[1], dtype=weight.dtype, device=weight.device)
    plan = slime_fused.explain_plan(like.requires_grad_(), weight, batch.labels, shift=True)
    backend = resolve_backend("auto", weight.device, weight.dtype).name
    return Prepared(loss, f'backend "{backend}", plan "{plan.kind}", {len(plan.chunks)} chunks')


STEP_CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        StepContestant("slime_fused", 'slime_loss(shift=True), workspace="auto"', _slime_fused),
        StepContestant(
            "naive",
            "the model's logits of every position, log_softmax in their dtype, as in the authors' trainer but "
            "without its reference pass; SLIME terms in PyTorch",
            _naive,
        ),
        StepContestant(
            "naive-reference",
            "the same with the reference model's forward pass whose result the authors' trainer discards",
            _naive_with_reference,
        ),
        StepContestant(
            "trl-fused-head",
            "ChunkedLogProbFunction as TRL's trainers call it; SLIME terms in PyTorch",
            _trl_fused_head,
            needs=("trl", "datasets"),
        ),
        StepContestant(
            "naive-compiled",
            "torch.compile of the head's product, the float32 log-softmax and the gather; decoder, SLIME terms "
            "and optimiser eager",
            _naive_compiled,
            compiles=True,
        ),
    )
}
