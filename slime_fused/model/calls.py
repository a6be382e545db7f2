"""What runs inside a model's head, a loss or log-probs; and the loss from the model's own logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import slime_fused
from slime_fused import reference
from slime_fused.losses import Formula
from slime_fused.model.head import HeadCall, attach_head
from slime_fused.model.sharding import split_head
from slime_fused.model.transform import LogitTransform
from slime_fused.output import PreferenceOutput


class OverLabels:
    """What `HeadCall`s over the labels of a batch share: a function of this package on the head's arguments."""

    labels: Tensor
    layout: slime_fused.TokenLayout | None
    transform: LogitTransform
    backend: str
    workspace: int | str

    def run(
        self,
        function: Callable[..., Any],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        **options: Any,
    ) -> Any:
        """``function``, such as `slime_fused.linear_logprobs`, with its ``options``; the rest as in `HeadCall`."""
        weight, bias, tp_group = split_head(weight, bias)
        return function(
            at_labels(hidden, self.labels),
            weight,
            self.labels if self.layout is None else self.layout.to(hidden.device),
            bias=bias,
            shift=self.layout is None,
            logit_scale=self.transform.scale,
            logit_softcap=self.transform.softcap,
            backend=self.backend,
            workspace=self.workspace,
            tp_group=tp_group,
            **options,
        )


@dataclass(frozen=True)
class FusedLoss(OverLabels):
    """A `HeadCall` that computes a loss of preferences without materialising the logits."""

    labels: Tensor
    """(S, T): -100 on prompt and padding; position t of the hidden states predicts ``labels[:, t + 1]``. Or (N,) of
    packed sequences, which the model takes as one row: the layout, which is then needed, holds their boundaries."""
    layout: slime_fused.TokenLayout | None
    """That of the labels, where the collator has made it."""
    loss: Formula
    transform: LogitTransform
    backend: str
    workspace: int | str
    given: Mapping[str, Any] = field(default_factory=dict)
    """What the loss needs besides: arguments of `slime_fused.preference_loss`, such as ``ref_sum_logps``."""
    stats: tuple[str, ...] | None = None
    """Statistics to return per token, see ``return_stats`` there."""

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """See `HeadCall` and `as_dict`."""
        options = {"loss": self.loss, **self.given, "return_stats": self.stats}
        return as_dict(self.run(slime_fused.preference_loss, hidden, weight, bias, **options))


@dataclass(frozen=True)
class FusedLogps(OverLabels):
    """A `HeadCall` that gives log-probs of the labels, summed as the policy's are in `FusedLoss`.

    While reference and policy are the same model, their difference is 0 to the bit.
    """

    labels: Tensor
    """(S, T) or (N,), see `FusedLoss`."""
    layout: slime_fused.TokenLayout | None
    transform: LogitTransform
    backend: str
    workspace: int | str
    reduction: Literal["none", "sum", "mean"] = "none"
    """Over the labels of each sequence."""

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """``logps``: in the shape of the labels, 0 where nothing is predicted, or of each sequence, (S,)."""
        head = (hidden, weight, bias)
        if self.reduction == "none":
            return {"logps": self.run(slime_fused.linear_logprobs, *head)}
        return {"logps": self.run(slime_fused.sequence_logprobs, *head, reduction=self.reduction)}


@dataclass(frozen=True)
class FusedLogProbs:
    """A `HeadCall` that gives the log-probs of chosen tokens at chosen positions, for comparison."""

    positions: Tensor
    """(K,) positions, counted from the end of the sequence (negative)."""
    tokens: Tensor
    """(K, C): the tokens to look up at each position."""
    transform: LogitTransform
    backend: str
    workspace: int | str
    row: int = 0
    """The sequence looked at."""

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """``logps`` (K, C)."""
        rows = hidden[self.row, self.positions].unsqueeze(1)  # (K, 1, D)
        layout = slime_fused.token_layout(self.tokens)  # not shifted
        call = FusedLogps(self.tokens, layout, self.transform, self.backend, self.workspace)
        return call(rows.expand(-1, self.tokens.shape[1], -1).contiguous(), weight, bias)


def run_in_head(model: nn.Module, inputs: Mapping[str, Any], call: HeadCall) -> dict[str, Tensor]:
    """``model(**inputs, head_call=call)``, with the numbers of ``call`` to the bit, whatever wraps the model.

    The model is attached again first if something has replaced its forward, see `attach_head`.
    """
    attach_head(model)
    exact: dict[str, Tensor] = {}

    def head_call(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        result = call(hidden, weight, bias)
        exact.update({name: value.detach() for name, value in result.items()})
        return result

    outputs = model(**inputs, head_call=head_call)
    if "loss" not in exact:
        return {**outputs, **exact}
    # FSDP2 with mixed precision rounds whatever leaves a module to 16 bits: 13.67 becomes 13.6875, and of a
    # margin of 0.01 nothing is left. Only the gradient has to come that way.
    loss = outputs["loss"].to(exact["loss"].dtype)
    return {**outputs, **exact, "loss": loss + (exact["loss"] - loss).detach()}


def at_labels(hidden: Tensor, labels: Tensor) -> Tensor:
    """``hidden`` (S, T', D) at the positions of ``labels`` (S, T) or (N,): (S, T, D) or (N, D).

    Virtual prompt tokens of an adapter precede them.
    """
    hidden = hidden[:, -labels.shape[-1] :]
    return hidden[0] if labels.dim() == 1 else hidden


def naive_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs, labels that they are of), (S, T - 1) each, from materialised ``logits`` (S, T', V).

    0 where nothing is predicted. In float32, as careful trainers do; the copy of the logits is part of what this
    way costs.
    """
    targets = labels[:, 1:]
    logps = torch.log_softmax(logits[:, -labels.shape[1] : -1].float(), dim=-1)
    logps = logps.gather(-1, targets.masked_fill(targets == -100, 0).unsqueeze(-1)).squeeze(-1)
    return logps.masked_fill(targets == -100, 0.0), targets


def naive_loss(
    logits: Tensor, labels: Tensor, loss: Formula, given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The loss from materialised ``logits`` (S, T, V), by autograd: what training without this package does."""
    logps, targets = naive_logps(logits, labels)
    return as_dict(reference.preference_terms(logps, targets, loss, given or {}))


def as_dict(output: PreferenceOutput) -> dict[str, Tensor]:
    """``loss``, ``mean_logps``, ``terms/*``, ``metrics/*`` and ``stats/*``: tensors by name.

    Sharding hooks look into dictionaries but not into dataclasses.
    """
    tensors = {"loss": output.loss, "mean_logps": output.mean_logps}
    tensors |= {f"terms/{name}": value for name, value in output.terms.items()}
    tensors |= {f"metrics/{name}": value for name, value in output.metrics.items()}
    told: dict[str, Any] = {} if output.stats is None else vars(output.stats)
    return tensors | {f"stats/{name}": value for name, value in told.items() if value is not None}
