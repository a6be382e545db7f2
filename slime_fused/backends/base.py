"""The contract of a backend: what the planner and the ops may ask of a set of kernels.

A backend turns tensors into launches. It allocates no result, chooses no plan, queries no device and never
falls back to another backend; all of that lives above it (`autograd`, `engine`). Every backend passes the same
grid of tests against `slime_fused.reference`.

Notation: ``M`` rows of logits, ``V`` columns, ``N`` tokens, ``S`` sequences, ``P`` pairs. ``acc`` is the
accumulation dtype: float64 for float64 logits, float32 for everything else.
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

    ``y = scale * (raw + bias)``; ``z = y`` if ``softcap`` is None, else ``softcap * tanh(y / softcap)``.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


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


class Backend(Protocol):
    """The kernels every backend provides. Tensors share one device; all writes go to arguments.

    Rules that hold for every function:

    * ``logits``: (M, V), any supported dtype, ``stride(1) == 1``, any row stride >= V.
    * ``labels``: (M,) int64, vocabulary indices. A negative label marks an ignored row: its residual row is 0,
      and its ``row_max``, ``logp`` and ``loss`` are 0, its ``row_sum`` 1. A label at or above the vocabulary's
      size is an error: a ValueError on the CPU, a device assertion on a GPU.
    * ``bias``: (V,) in the dtype of the logits, or None.
    * ``out`` of a residual: the dtype of the logits, or bfloat16 or float16 where these are float32.
    * The same inputs give the same bits, whatever the number of threads or blocks.
    * ``M == 0``, ``S == 0`` and empty segments are legal and write nothing or zeros.
    """

    name: str

    def available(self) -> tuple[bool, str]:
        """Whether this backend can run here; if not, why and how to get it."""

    def supports(self, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        """Whether it takes tensors of this device and dtype; if not, what it takes."""

    def softmax_residual(
        self,
        logits: Tensor,
        out: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadTransform,
        token_loss: TokenLoss,
        *,
        row_max: Tensor,
        row_sum: Tensor,
        logp: Tensor,
        loss: Tensor | None,
    ) -> None:
        """Write d(token loss)/d(raw logits) to ``out`` (M, V), which may be ``logits`` itself; rounded once.

        Also writes ``row_max`` (M,) = max_v z_v, ``row_sum`` (M,) = sum_v exp(z_v - row_max), ``logp`` (M,) =
        (z_label - row_max) - log row_sum and, where asked for, ``loss`` (M,), all in acc dtype. The log-sum-exp
        is never one number: rounded, it would cost each probability of the row |lse| roundings (with logits of
        1e4, 1e-3). The label's entry comes from expm1(logp), so that it does not cancel.
        """

    def logits_stats(
        self,
        logits: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadTransform,
        *,
        col_offset: int,
        row_max: Tensor,
        row_sum: Tensor,
        label_logit: Tensor,
        logit_sum: Tensor | None,
        merge: bool,
    ) -> None:
        """Statistics of z over the columns [col_offset, col_offset + V) of the vocabulary.

        ``row_max`` (M,) = max_v z_v, ``row_sum`` (M,) = sum_v exp(z_v - row_max), ``label_logit`` (M,) = the
        label's z, 0 where the label lies outside these columns, ``logit_sum`` (M,) = sum_v z_v. With
        ``merge`` the arguments hold the statistics of earlier columns and are updated. Rows with a negative label
        get statistics too (label_logit 0): a caller that ignores them overwrites what it derives.
        """

    def residual_from_stats(
        self,
        logits: Tensor,
        out: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadTransform,
        token_loss: TokenLoss,
        *,
        col_offset: int,
        vocab_size: int,
        row_max: Tensor,
        row_sum: Tensor,
        logp: Tensor,
        row_scale: Tensor | None,
    ) -> None:
        """As ``softmax_residual``, from statistics (M,) of whole rows, times ``row_scale`` (M,) if given."""

    def segment_sum(self, values: Tensor, cu_seqlens: Tensor, out: Tensor, *, mean: bool) -> None:
        """``out`` (S,) = sum (or mean) of ``values`` (N,) over [cu_seqlens[s], cu_seqlens[s + 1]), acc dtype."""

    def segment_sum_backward(self, d_out: Tensor, cu_seqlens: Tensor, d_values: Tensor, *, mean: bool) -> None:
        """``d_values`` (N,) = ``d_out`` of its segment (divided by the segment's length for a mean)."""

    def slime_terms(
        self,
        logp: Tensor,
        cu_seqlens: Tensor,
        weights: SlimeWeights,
        *,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        anchor: Tensor,
        margin_loss: Tensor,
        stabilizer: Tensor,
        d_logp: Tensor | None,
    ) -> None:
        """The three SLIME terms of P pairs, and g = d(sum of all terms)/d(logp).

        ``logp`` (N,) acc; ``cu_seqlens`` (2P + 1,) int32: segments 0..P-1 are chosen, P..2P-1 rejected. Writes
        (P,) acc: mean log-probs of both responses and each pair's share of the three terms, weights and
        normalisers included, so that their sums over pairs are the terms; ``d_logp`` (N,) unless None.
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

    def linear_stats_row_bytes(self, weight: Tensor) -> int:
        """The most scratch that `linear_stats` takes for each row, or 0 where it cannot take this ``weight``."""

    def linear_stats(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadTransform,
        *,
        col_offset: int,
        row_max: Tensor,
        row_sum: Tensor,
        label_logit: Tensor,
        logit_sum: Tensor | None,
        logits_dtype: torch.dtype | None = None,
    ) -> None:
        """As `Backend.logits_stats` of ``hidden`` (M, D) @ ``weight`` (V, D)^T, for whole rows (no ``merge``).

        ``hidden`` and ``weight`` share a dtype and have contiguous columns. Products are accumulated in acc dtype
        and rounded once to ``logits_dtype`` (None: theirs; or float32), as those that are stored: the statistics
        belong to the logits that backward forms again. ``bias`` has that dtype too.
        """
