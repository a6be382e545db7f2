"""What losses of units return. Only ``loss`` carries a gradient; all are float32 (float64 for float64 inputs)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from slime_fused.engine.units import Loss


@dataclass(frozen=True)
class SlimeOutput:
    """The SLIME loss and what one wants to log beside it. Scalars are 0-dimensional tensors."""

    loss: Tensor
    """The scalar to call ``backward()`` on."""
    anchor: Tensor
    """Scalar, detached. ``anchor + margin_loss + stabilizer == loss``."""
    margin_loss: Tensor
    """Scalar, detached."""
    stabilizer: Tensor
    """Scalar, detached."""
    chosen_logps: Tensor
    """(P,), detached: mean log-prob of each chosen response."""
    rejected_logps: Tensor
    """(P,), detached: mean log-prob of each rejected response."""

    @classmethod
    def of(cls, loss: Tensor, numbers: Tensor, mean_logps: Tensor) -> SlimeOutput:
        """From the loss, its three terms (3,) and the mean log-probs (2P,) of the responses."""
        pairs = mean_logps.shape[0] // 2
        return cls(loss, numbers[0], numbers[1], numbers[2], mean_logps[:pairs], mean_logps[pairs:])

    @property
    def margins(self) -> Tensor:
        """(P,): chosen minus rejected mean log-prob."""
        return self.chosen_logps - self.rejected_logps

    @property
    def accuracy(self) -> Tensor:
        """Scalar: share of pairs whose margin is above 0."""
        return (self.margins > 0).to(self.margins.dtype).mean()


@dataclass(frozen=True)
class PreferenceOutput:
    """A loss of pairs, or of single responses, and what one wants to log beside it."""

    loss: Tensor
    """The scalar to call ``backward()`` on."""
    terms: Mapping[str, Tensor]
    """Scalars, detached: the loss's named parts, which sum to it. Empty where it names none."""
    metrics: Mapping[str, Tensor]
    """Scalars, detached: other means over the batch that the loss reports, such as DPO's rewards."""
    mean_logps: Tensor
    """(S,), detached: mean log-prob of each response."""
    is_paired: bool
    """Whether the responses are P chosen ones and the P rejected ones of the same pairs."""
    stats: TokenStatistics | None = None
    """Of each token, detached, its log-prob too: where ``return_stats`` asked for it."""

    @property
    def chosen_logps(self) -> Tensor:
        """(P,): mean log-prob of each chosen response."""
        return self._side(slice(0, self._pairs))

    @property
    def rejected_logps(self) -> Tensor:
        """(P,): mean log-prob of each rejected response."""
        return self._side(slice(self._pairs, None))

    @property
    def margins(self) -> Tensor:
        """(P,): chosen minus rejected mean log-prob."""
        return self.chosen_logps - self.rejected_logps

    @property
    def accuracy(self) -> Tensor:
        """Scalar: share of pairs whose margin is above 0."""
        return (self.margins > 0).to(self.margins.dtype).mean()

    @property
    def _pairs(self) -> int:
        return self.mean_logps.shape[0] // 2

    def _side(self, responses: slice) -> Tensor:
        if not self.is_paired:
            raise ValueError("chosen_logps: expected a loss of pairs, got one of single responses: see mean_logps")
        return self.mean_logps[responses]


@dataclass(frozen=True)
class PolicyOutput:
    """A policy-gradient loss and what one wants to log beside it."""

    loss: Tensor
    """The scalar to call ``backward()`` on."""
    terms: Mapping[str, Tensor]
    """Scalars, detached: the loss's named parts, which sum to it. Empty where it names none."""
    metrics: Mapping[str, Tensor]
    """Scalars, detached: other means over the batch that the loss reports, such as the share of clipped tokens."""
    mean_logps: Tensor
    """(S,), detached: mean log-prob of each response."""
    logps: Tensor
    """In the shape of the labels, detached: log-prob of each token, 0 where its label is ignored. A next step's
    ``old_logps``."""
    stats: TokenStatistics | None = None
    """Of each token, detached, its log-prob too: where ``return_stats`` asked for it."""


@dataclass(frozen=True)
class TokenStatistics:
    """Per-token results in the shape of the labels, 0 where the label is ignored; None where not asked for.

    z are the logits after scale, soft cap and temperature, p their softmax. Log-probs, losses and the entropy carry
    gradients, but not where they come beside a loss of pairs, sequences or tokens.
    """

    logps: Tensor | None = None
    """Of `linear_logprobs`: the label's log-prob."""
    losses: Tensor | None = None
    """Of `linear_cross_entropy`."""
    entropy: Tensor | None = None
    """-sum_v p_v log p_v, in nats."""
    mean_logit: Tensor | None = None
    """mean_v z_v"""
    is_top1: Tensor | None = None
    """bool: whether the label is the likeliest token (of equals the first), False where it is ignored."""
    sum_sq_probs: Tensor | None = None
    """sum_v p_v^2; TRL and WPO take its logarithm."""
    lse: Tensor | None = None
    """log sum_v exp z_v"""


def named_numbers(loss: Loss, numbers: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(terms, metrics) by name, from (K,) numbers in the loss's order."""
    values = numbers.unbind()
    count = len(loss.term_names)
    terms = dict(zip(loss.term_names, values[:count], strict=True))
    return terms, dict(zip(loss.metric_names, values[count:], strict=True))
