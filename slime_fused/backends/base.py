"""The contract of a backend: what the planner and the ops may ask of a set of kernels.

A backend turns tensors into launches. It allocates no result, chooses no plan, queries no device and never
falls back to another backend; all of that lives above it (`autograd`, `engine`). Every backend passes the same
grid of tests against `slime_fused.reference`.

Notation: ``M`` rows of logits, ``B`` columns of a block of them, ``V`` columns of the whole vocabulary, ``N``
tokens, ``S`` sequences, ``P`` pairs. ``acc`` is the accumulation dtype: float64 for float64 logits, float32 for
everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, log-probabilities and loss terms for logits of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class HeadTransform:
    """What turns a raw product ``h W^T`` into the logit of the softmax.

    ``y = scale * (raw + bias)``; ``z = y / temperature`` if ``softcap`` is None, else
    ``softcap * tanh(y / softcap) / temperature``. ``temperature`` is finite and above 0.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def slope_bound(self) -> float:
        """The largest |dz/draw|; without a soft cap it is the same everywhere."""
        return abs(self.scale) / self.temperature


@dataclass(frozen=True)
class TokenLoss:
    """The loss of one token, of which a residual is the gradient with respect to the raw logits.

    ``loss = -(1 - eps) * logp_label + eps * (lse - mean_v z_v) + z_loss * lse**2`` with
    ``eps = label_smoothing``. With both zero it is ``-logp_label`` and the residual is
    ``softmax(z) - onehot(label)`` times the derivative of the head transform.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class SlimeWeights:
    """Hyperparameters of the SLIME loss and the two normalisers that depend on the whole batch.

    ``pair_weight`` is 1 / (pairs of the batch). ``token_weight`` is 0 where the stabilizer is a mean over each
    response ("sequence"), else 1 / (rejected tokens of the batch) ("token").
    """

    lambda_w: float
    lambda_l: float
    lambda_d: float
    delta: float
    margin_hard: float
    margin_soft: float
    kappa: float
    power: float
    pair_weight: float
    token_weight: float


@dataclass(frozen=True)
class LogitsBlock:
    """Raw logits, before bias and transform, of some rows and some columns of a vocabulary.

    A label at or above the vocabulary's size is an error: a ValueError on the CPU, a device assertion on a GPU.
    """

    logits: Tensor
    """(M, B), any supported dtype, ``stride(1) == 1``, any row stride >= B."""
    labels: Tensor
    """(M,) int64, indices in the whole vocabulary. A negative label marks an ignored row."""
    bias: Tensor | None
    """(B,) in the dtype of the logits."""
    transform: HeadTransform
    col_offset: int = 0
    """Index in the vocabulary of the first column."""
    vocab_size: int | None = None
    """V, of the whole vocabulary; None: these columns are all of it."""

    @property
    def whole_vocab_size(self) -> int:
        """V."""
        return self.logits.shape[1] if self.vocab_size is None else self.vocab_size


@dataclass(frozen=True)
class LinearBlock:
    """As `LogitsBlock`, for products that are not formed yet: ``hidden @ weight^T`` with all columns there are."""

    hidden: Tensor
    """(M, D), contiguous columns."""
    weight: Tensor
    """(V, D) in the dtype of ``hidden``, contiguous columns."""
    labels: Tensor
    """(M,) int64, as in `LogitsBlock`."""
    bias: Tensor | None
    """(V,) in the dtype of the logits."""
    transform: HeadTransform
    logits_dtype: torch.dtype | None = None
    """To which products are rounded, as those that are stored: float32, or None for that of ``hidden``."""


@dataclass(frozen=True)
class RowStats:
    """What a residual needs of whole rows: (M,) each, in acc dtype. Of ignored rows 0, 1 and 0.

    The log-sum-exp is never one number: rounded, it would cost each probability of the row |lse| roundings (with
    logits of 1e4, 1e-3).
    """

    row_max: Tensor
    """max_v z_v"""
    row_sum: Tensor
    """sum_v exp(z_v - row_max)"""
    logp: Tensor
    """(z_label - row_max) - log row_sum"""


@dataclass(frozen=True)
class TokenStats(RowStats):
    """And the loss of each row."""

    loss: Tensor
    """(M,) `TokenLoss`; 0 for an ignored row."""


def losses_of(stats: RowStats) -> Tensor | None:
    """Where `Backend.softmax_residual` writes losses, where these statistics have room for them."""
    return stats.loss if isinstance(stats, TokenStats) else None


@dataclass(frozen=True)
class Moments:
    """What makes the entropy, sum p^2 and whether the label is the likeliest token: (M,) each, in acc dtype.

    ::

        entropy    = log(row_sum) - centred_sum / row_sum
        sum_v p_v^2 = square_sum / row_sum^2
        is_top1    = label_logit >= row_max and label_logit > max_before        (the first of equal maxima wins)
    """

    centred_sum: Tensor
    """sum_v exp(z_v - row_max) (z_v - row_max); a logit of -inf counts 0."""
    square_sum: Tensor
    """sum_v exp(2 (z_v - row_max))"""
    max_before: Tensor
    """The largest z of the columns before the label's, -inf where there is none or the label is negative."""


@dataclass(frozen=True)
class VocabStats:
    """Statistics of (M,) rows over the columns of a block, or of several: in acc dtype.

    Rows with a negative label get them too: who ignores such rows overwrites what is derived from them.
    """

    row_max: Tensor
    """max_v z_v"""
    row_sum: Tensor
    """sum_v exp(z_v - row_max), 0 where every z is -inf."""
    label_logit: Tensor
    """The label's z, with the bits that it has in ``row_max``; 0 where the label lies outside the columns."""
    logit_sum: Tensor | None = None
    """sum_v z_v; None: not wanted."""
    moments: Moments | None = None
    """None: not wanted."""


@dataclass(frozen=True)
class RowFactors:
    """What the residual of a row is multiplied by, and what is added to it: (M,) each, in acc dtype.

    With both of the last two, ``entropy_scale * d(entropy)/dz_v``, times the derivative of the transform, is added
    (not multiplied by ``scale``): ``d(entropy)/dz_v = -p_v (log p_v + entropy)``, 0 where p_v is 0.
    """

    scale: Tensor | None = None
    """None: 1."""
    entropy: Tensor | None = None
    entropy_scale: Tensor | None = None


NO_FACTORS = RowFactors()


@dataclass(frozen=True)
class SlimePairs:
    """(P,) tensors in acc dtype: mean log-probs, and each pair's share of the three terms."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    anchor: Tensor
    margin_loss: Tensor
    stabilizer: Tensor


class Backend(Protocol):
    """The kernels every backend provides. Tensors share one device; all writes go to arguments.

    Rules that hold for every function:

    * ``out`` of a residual: (M, B) in the dtype of the logits, or bfloat16 or float16 where these are float32. It
      may be the logits themselves. Rows of ignored labels are 0; everything is rounded once.
    * The same inputs give the same bits, whatever the number of threads or blocks.
    * ``M == 0``, ``S == 0`` and empty segments are legal and write nothing or zeros.
    """

    name: str

    def available(self) -> tuple[bool, str]:
        """Whether this backend can run here; if not, why and how to get it."""

    def supports(self, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        """Whether it takes tensors of this device and dtype; if not, what it takes."""

    def softmax_residual(self, block: LogitsBlock, out: Tensor, token_loss: TokenLoss, stats: RowStats) -> None:
        """Write d(token loss)/d(raw logits) to ``out``, and ``stats``: with the losses where it is `TokenStats`.

        ``block`` holds the whole vocabulary. The label's entry comes from expm1(logp), so that it does not cancel.
        """

    def logits_stats(self, block: LogitsBlock, stats: VocabStats, *, merge: bool = False) -> None:
        """Write the statistics of ``block``. With ``merge`` they hold those of other columns, and are updated."""

    def residual_from_stats(
        self,
        block: LogitsBlock,
        out: Tensor,
        token_loss: TokenLoss,
        stats: RowStats,
        factors: RowFactors = NO_FACTORS,
    ) -> None:
        """As `softmax_residual`, from statistics of whole rows, which are read, and with ``factors``."""

    def segment_sum(self, values: Tensor, cu_seqlens: Tensor, out: Tensor, *, mean: bool) -> None:
        """``out`` (S,) = sum (or mean) of ``values`` (N,) over [cu_seqlens[s], cu_seqlens[s + 1]), acc dtype."""

    def segment_sum_backward(self, d_out: Tensor, cu_seqlens: Tensor, d_values: Tensor, *, mean: bool) -> None:
        """``d_values`` (N,) = ``d_out`` of its segment (divided by the segment's length for a mean)."""

    def slime_terms(
        self, logp: Tensor, cu_seqlens: Tensor, weights: SlimeWeights, out: SlimePairs, d_logp: Tensor | None
    ) -> None:
        """The three SLIME terms of P pairs, and g = d(sum of all terms)/d(logp).

        ``logp`` (N,) acc; ``cu_seqlens`` (2P + 1,) int32: segments 0..P-1 are chosen, P..2P-1 rejected. Writes
        ``out``: mean log-probs of both responses and each pair's share of the three terms, weights and
        normalisers included, so that their sums over pairs are the terms; and ``d_logp`` (N,) unless None.
        """

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """``tensor *= factor`` in place (any shape, contiguous); ``factor`` is one acc-dtype number on the device.

        Costs nothing where the factor is exactly 1, and never waits for the device.
        """


@runtime_checkable
class LinearStatsBackend(Protocol):
    """What a backend may offer beyond `Backend`: the head's product with its statistics, logits never stored.

    The planner's "fused" plan needs it; nothing else does.
    """

    def linear_stats_row_bytes(self, weight: Tensor, *, with_moments: bool = False) -> int:
        """The most scratch that `linear_stats` takes for each row, or 0 where it cannot take this ``weight``."""

    def linear_stats(self, block: LinearBlock, stats: VocabStats) -> None:
        """As `Backend.logits_stats` of the products of ``block``.

        They are accumulated in acc dtype and rounded once: the statistics belong to the logits that backward forms
        again.
        """
