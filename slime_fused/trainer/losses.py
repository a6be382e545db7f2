"""The two ways to a batch's SLIME loss: fused inside the head, or from the model's own logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import slime_fused
from slime_fused import reference
from slime_fused.losses import SlimeLossConfig
from slime_fused.output import SlimeOutput
from slime_fused.trainer.transform import LogitTransform


@dataclass(frozen=True)
class FusedLoss:
    """A `HeadCall` that computes the SLIME loss without materialising the logits."""

    labels: Tensor
    """(2P, T): -100 on prompt and padding; position t of the hidden states predicts ``labels[:, t + 1]``."""
    layout: slime_fused.TokenLayout | None
    """That of the labels, where the collator has made it."""
    config: SlimeLossConfig
    transform: LogitTransform
    backend: str
    workspace: int | str

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """See `HeadCall`. Virtual prompt tokens of an adapter precede the labels' positions and are cut off."""
        output = slime_fused.slime_loss(
            hidden[:, -self.labels.shape[1] :],
            weight,
            self.labels if self.layout is None else self.layout.to(hidden.device),
            bias=bias,
            config=self.config,
            shift=self.layout is None,
            logit_scale=self.transform.scale,
            logit_softcap=self.transform.softcap,
            backend=self.backend,
            workspace=self.workspace,
        )
        return as_dict(output)


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

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """``logps`` (K, C) for the first sequence of ``hidden``."""
        rows = hidden[0, self.positions]  # (K, D)
        num_tokens = self.tokens.shape[1]
        logps = slime_fused.linear_logprobs(
            rows.unsqueeze(1).expand(-1, num_tokens, -1).contiguous(),
            weight,
            self.tokens,
            bias=bias,
            logit_scale=self.transform.scale,
            logit_softcap=self.transform.softcap,
            backend=self.backend,
            workspace=self.workspace,
        )
        return {"logps": logps}


def naive_loss(logits: Tensor, labels: Tensor, config: SlimeLossConfig) -> dict[str, Tensor]:
    """The loss from materialised ``logits`` (2P, T, V), by autograd: what training without this package does."""
    targets = labels[:, 1:]
    mask = targets != -100
    # Summed in float32, as careful trainers do; the copy of the logits is part of what this way costs.
    logps = torch.log_softmax(logits[:, -labels.shape[1] : -1].float(), dim=-1)
    logps = logps.gather(-1, targets.masked_fill(~mask, 0).unsqueeze(-1)).squeeze(-1)
    bounds = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return as_dict(reference.slime_terms(logps[mask], bounds, config))


def as_dict(output: SlimeOutput) -> dict[str, Tensor]:
    """The tensors of ``output`` by name; sharding hooks look into dictionaries but not into dataclasses."""
    names = ("loss", "anchor", "margin_loss", "stabilizer", "chosen_logps", "rejected_logps")
    tensors: dict[str, Any] = {name: getattr(output, name) for name in names}
    return tensors
