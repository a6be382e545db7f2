"""A batch of pairs in somebody else's trainer: its loss and reference log-probs, computed in the model's head.

What the integrations share that override how a trainer computes its loss. Rows are the P chosen responses and then
the P rejected ones; labels are -100 on prompt and padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import slime_fused
from slime_fused.losses import Formula, as_loss
from slime_fused.model.calls import FusedLogps, FusedLoss, run_in_head
from slime_fused.model.check import check_head
from slime_fused.model.head import attach_head
from slime_fused.model.options import check_options
from slime_fused.model.reference import as_reference
from slime_fused.model.terms import find_token_mean, logged_term
from slime_fused.model.transform import transform_of
from slime_fused.model.wrappers import unwrap_module

_GIVEN = ("ref_logps", "ref_token_logps")
"""What a loss may need: the trainer's batch and its reference model give no more."""


@dataclass(frozen=True)
class Labels:
    """(S, T) labels; or (1, N) of packed sequences, with their boundaries."""

    values: Tensor
    cu_seqlens: Tensor | None = None
    """(S + 1,) boundaries of packed sequences."""

    def layout(self) -> slime_fused.TokenLayout:
        """Of labels that the position before predicts."""
        if self.cu_seqlens is None:
            return slime_fused.token_layout(self.values, shift=True)
        return slime_fused.token_layout(self.flat, cu_seqlens=self.cu_seqlens, shift=True)

    @property
    def flat(self) -> Tensor:
        """(S, T), or (N,) where packed."""
        return self.values if self.cu_seqlens is None else self.values[0]

    def counts(self) -> Tensor:
        """(S,): how many labels of each sequence are predicted."""
        if self.cu_seqlens is None:
            return self._is_predicting().sum(1)
        total = torch.cat([self.cu_seqlens.new_zeros(1), self._is_predicting().cumsum(0)])
        return total[self.cu_seqlens.long()].diff()

    def halves(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Of (S, T) or (N,) numbers per position: those that predict labels, of chosen and rejected responses."""
        is_predicting = self._is_predicting()
        bounds = self.cu_seqlens
        border = self.values.shape[0] // 2 if bounds is None else int(bounds[bounds.shape[0] // 2])
        return numbers[:border][is_predicting[:border]], numbers[border:][is_predicting[border:]]

    def _is_predicting(self) -> Tensor:
        """(S, T) or (N,) bool: the position before each label."""
        is_predicting = torch.zeros_like(self.flat, dtype=torch.bool)
        is_predicting[..., :-1] = self.flat[..., 1:] != -100
        if self.cu_seqlens is not None:
            # The last position of a sequence would predict the first of the next.
            is_predicting[self.cu_seqlens[1:].long() - 1] = False
        return is_predicting


@dataclass(frozen=True)
class BatchLoss:
    """A loss of pairs, and where it is computed."""

    loss: Formula
    backend: str = "auto"
    workspace: int | str = "auto"

    @classmethod
    def of(cls, loss: Any, backend: str = "auto", workspace: int | str = "auto") -> BatchLoss:
        """Of a value of `slime_fused.losses`, or a function of pairs.

        Raises TypeError, ValueError for what is no loss of pairs, and for one that needs what no batch has.
        """
        value = cast(Formula, as_loss(loss))
        if value.unit != "pair":
            raise ValueError(f"loss: expected a loss of pairs, got one of single {value.unit}s: {value!r}")
        for need in value.needs:
            if need not in _GIVEN:
                raise ValueError(f"loss: {value.name} needs {need!r}, which no batch of this trainer holds")
        check_options(backend, workspace)
        return cls(value, backend, workspace)

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model's log-probs are needed."""
        return any(need.startswith("ref_") for need in self.loss.needs)

    def policy(
        self, model: nn.Module, inputs: Mapping[str, Any], labels: Labels, ref_logps: Tensor | None
    ) -> dict[str, Tensor]:
        """See `slime_fused.model.calls.as_dict`; ``loss``, and ``aux_loss`` where there is one, carry a gradient.

        ``inputs`` are the arguments of the model's forward, ``ref_logps`` what `reference` gave.
        """
        given: dict[str, Tensor] = {} if ref_logps is None else {"ref_token_logps": ref_logps}
        where = (transform_of(model), self.backend, self.workspace)
        call = FusedLoss(labels.flat, labels.layout(), self.loss, *where, given, stats=("mean_logit",))
        return run_in_head(model, inputs, call)

    def reference(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        inputs: Mapping[str, Any],
        labels: Labels,
        adapter: str | None = None,
    ) -> Tensor | None:
        """A reference's log-prob of each label, in the shape of `Labels.flat`; None where the loss needs none.

        That of ``ref_model``, or else of ``model`` without its adapter, or with that of the name ``adapter`` in its
        place. Without a gradient and without dropout.
        """
        if not self.needs_reference:
            return None
        reference = model if ref_model is None else ref_model
        adapted = unwrap_module(model) if ref_model is None else None
        call = FusedLogps(labels.flat, labels.layout(), transform_of(reference), self.backend, self.workspace)
        with as_reference(reference, adapted, adapter):
            return run_in_head(reference, inputs, call)["logps"]

    def check(self, model: nn.Module, inputs: Mapping[str, Any], labels: Labels) -> None:
        """See `check_head`; of packed sequences the first with a label to predict.

        Where every response was cut off, other tokens tell as much.
        """
        ids, values, counts = inputs["input_ids"], labels.values, labels.counts()
        mask = inputs.get("attention_mask")
        if not counts.any():
            values = ids if mask is None else ids.masked_fill(mask == 0, -100)
        batch = {name: value for name, value in inputs.items() if name != "use_cache"} | {"labels": values}
        if labels.cu_seqlens is not None:
            row = int((counts > 0).int().argmax())
            start, end = labels.cu_seqlens[row : row + 2].tolist()
            ids, values = ids[:, start:end], values[:, start:end]
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": values}
        check_head(model, batch, transform_of(model), self.backend, self.workspace)

    def check_reference(self, model: Any, ref_model: Any) -> None:
        """Refuse a loss with a reference where there is no ``ref_model`` and no adapter of PEFT to switch off.

        Raises ValueError: the policy would be its own reference.
        """
        if self.needs_reference and ref_model is None and not hasattr(model, "disable_adapter"):
            raise ValueError(
                f"ref_model: expected a model, since {self.loss.name} needs a reference and {type(model).__name__} "
                "has no adapter to switch off, got None: the policy would be its own reference"
            )

    def check_step(self, args: Any) -> None:
        """Refuse a mean over all tokens where ``args`` (`TrainingArguments`) cuts a step into several batches.

        These trainers take the mean over the batches, each of which would be a mean over its own tokens.
        Raises ValueError naming the hyperparameter.
        """
        mean = find_token_mean(self.loss)
        num_batches = args.gradient_accumulation_steps * args.world_size
        if mean is not None and getattr(self.loss, mean.weight) and num_batches > 1:
            raise ValueError(
                f"{mean.reduction}: expected 'sequence', got 'token' with gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps} and {args.world_size} process(es): every batch would have a "
                "token mean of its own, which is not that of the step; set it to 'sequence', or train with one "
                "batch per step"
            )


def attach(*models: nn.Module | None) -> None:
    """See `attach_head`; of those that are there."""
    for model in models:
        if model is not None:
            attach_head(model)


@contextmanager
def lora_dropout_kept(model: nn.Module) -> Iterator[None]:
    """Leaves LoRA's dropout as it was set, where a trainer's constructor switches all dropout off."""
    layers = [
        layer
        for name, layer in model.named_modules()
        if "lora_dropout" in name.split(".") and isinstance(layer, nn.Dropout)
    ]
    rates = [layer.p for layer in layers]
    yield
    for layer, rate in zip(layers, rates, strict=True):
        layer.p = rate


def pair_metrics(outputs: Mapping[str, Tensor], labels: Labels, loss: Formula) -> dict[str, Tensor]:
    """What to log of `BatchLoss.policy`: means over the batch, detached, under the names that TRL has for them.

    ``logps/*`` are sums over a response, ``mean_logps/*`` means over its tokens, which are also the rewards where
    the loss names none. ``logits/*`` are means over the vocabulary and the responses' tokens. The loss's parts
    stand under its own name: ``slime/anchor``.
    """
    chosen, rejected = outputs["mean_logps"].chunk(2)
    chosen_counts, rejected_counts = labels.counts().to(chosen).chunk(2)
    own = {name: outputs[f"metrics/{name}"] for name in loss.metric_names}
    metrics = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype).mean(),
        **own,
        "logps/chosen": (chosen * chosen_counts).mean(),
        "logps/rejected": (rejected * rejected_counts).mean(),
        "mean_logps/chosen": chosen.mean(),
        "mean_logps/rejected": rejected.mean(),
        **{logged_term(loss, name): outputs[f"terms/{name}"] for name in loss.term_names},
    }
    for side, logits in zip(("chosen", "rejected"), labels.halves(outputs["stats/mean_logit"]), strict=True):
        metrics[f"logits/{side}"] = logits.mean()
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if "aux_loss" in outputs:
        metrics["aux_loss"] = outputs["aux_loss"].detach()
    return metrics


def total_loss(outputs: Mapping[str, Tensor]) -> Tensor:
    """The loss, and that of a mixture's router beside it."""
    return outputs["loss"] + outputs["aux_loss"] if "aux_loss" in outputs else outputs["loss"]
