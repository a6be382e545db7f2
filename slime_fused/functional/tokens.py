"""Per-token and per-sequence log-probs of a linear head, and its cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from slime_fused.autograd import operators, token_losses, token_operators
from slime_fused.autograd.tensors import is_traced
from slime_fused.backends.base import TokenLoss
from slime_fused.engine.calls import LinearRequest
from slime_fused.engine.layout import TokenLayout
from slime_fused.functional import checks
from slime_fused.functional.arguments import LinearOptions, label_counts, linear_request, statistic_names
from slime_fused.output import TokenStatistics

if TYPE_CHECKING:  # a torch without distributed support has no such class
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

Reduction = Literal["mean", "sum", "none"]
_REDUCTIONS = ("mean", "sum", "none")


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | TokenLayout,
    *,
    return_stats: None = None,
    **options: Unpack[LinearOptions],
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | TokenLayout,
    *,
    return_stats: Sequence[str],
    **options: Unpack[LinearOptions],
) -> TokenStatistics: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | TokenLayout,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    workspace: int | str = "auto",
    tp_group: ProcessGroup | None = None,
    return_stats: Sequence[str] | None = None,
) -> Tensor | TokenStatistics:
    """Log-probability of every label, differentiable for any upstream gradient.

    Arguments as `slime_loss`, but for any number of sequences; ``hidden`` (..., D) with ``labels`` (...).

    Args:
        hidden: (..., D).
        weight: (V, D).
        labels: (...), or their `token_layout`.
        return_stats: names among "entropy", "mean_logit", "is_top1", "sum_sq_probs" and "lse": see
            `TokenStatistics`. They come from the visit of the logits that forms the log-probs, without another
            product. The entropy carries a gradient; for it nothing is formed in forward but statistics, which costs
            a product more where backward forms the logits again and the head is frozen, or the logits are float32
            beside 16-bit operands (`explain_plan`).

    Returns:
        Log-probs in the shape of ``labels``, float32 (float64 for float64), 0 where the label is ignored. With
        ``return_stats`` a `TokenStatistics` that has them as ``logps``.

    Raises:
        As `slime_loss`; TypeError or ValueError for an unknown statistic.
    """
    statistics = statistic_names(return_stats)
    hidden, weight, bias, request = linear_request(
        hidden,
        weight,
        labels,
        bias=bias,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        logits_dtype=logits_dtype,
        backend=backend,
        workspace=workspace,
        tp_group=tp_group,
    )
    losses, told = _token_loss(hidden, weight, bias, request, TokenLoss(), statistics)
    return -losses if return_stats is None else TokenStatistics(logps=-losses, **told)


def sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | TokenLayout,
    *,
    reduction: Literal["sum", "mean"] = "sum",
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    workspace: int | str = "auto",
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Log-probability of every sequence: the sum, or the mean, over its labelled tokens. Differentiable.

    Arguments as `slime_loss`, but for any number S of sequences.

    Returns:
        (S,), float32 (float64 for float64); 0 for a sequence without labels. The order of summation is fixed.

    Raises:
        As `slime_loss`; ValueError for an unknown reduction.
    """
    checks.check_choice("reduction", reduction, ("sum", "mean"))
    hidden, weight, bias, request = linear_request(
        hidden,
        weight,
        labels,
        bias=bias,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        logits_dtype=logits_dtype,
        backend=backend,
        workspace=workspace,
        tp_group=tp_group,
    )
    rows = request.rows
    logps = -_token_loss(hidden, weight, bias, request, TokenLoss())[0]
    if rows.cu_seqlens is None:
        # From the labels, not torch.arange: where they are fake tensors, so must these be.
        index = rows.labels.new_ones(rows.num_sequences + 1, dtype=torch.int64).cumsum(0) - 1
        bounds = (index * rows.labels.shape[-1]).to(torch.int32)
    else:
        bounds = rows.cu_seqlens
    sums: Tensor = token_operators.segment_sum_op(logps.reshape(-1), bounds, False, backend)
    return sums if reduction == "sum" else sums / label_counts(rows).clamp(min=1)


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | TokenLayout,
    *,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_stats: None = None,
    **options: Unpack[LinearOptions],
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | TokenLayout,
    *,
    reduction: Literal["none"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_stats: Sequence[str],
    **options: Unpack[LinearOptions],
) -> TokenStatistics: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | TokenLayout,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    workspace: int | str = "auto",
    tp_group: ProcessGroup | None = None,
    return_stats: Sequence[str] | None = None,
) -> Tensor | TokenStatistics:
    """Cross-entropy of a linear head: `torch.nn.functional.cross_entropy` of ``hidden @ weight.T``, fused.

    Arguments as `slime_loss`, and:

    Args:
        reduction: "mean" over labelled tokens, "sum", or "none".
        label_smoothing: eps in [0, 1], as in `torch.nn.functional.cross_entropy`.
        z_loss: weight of the square of the log-sum-exp, added per token.
        return_stats: as in `linear_logprobs`, for reduction "none".

    Returns:
        A scalar, or for "none" the shape of ``labels`` with 0 where the label is ignored; float32 (float64 for
        float64). With ``return_stats`` a `TokenStatistics` that has the losses as ``losses``.

    Raises:
        As `slime_loss`; ValueError for "mean" where all labels are ignored (the sum of none is 0).
    """
    statistics = statistic_names(return_stats)
    checks.check_choice("reduction", reduction, _REDUCTIONS)
    checks.check_token_loss(label_smoothing, z_loss)
    token_loss = TokenLoss(float(label_smoothing), float(z_loss))
    if return_stats is not None and reduction != "none":
        raise ValueError(f'return_stats: expected none unless reduction is "none", got {return_stats!r}')
    hidden, weight, bias, request = linear_request(
        hidden,
        weight,
        labels,
        bias=bias,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        logits_dtype=logits_dtype,
        backend=backend,
        workspace=workspace,
        tp_group=tp_group,
    )
    if reduction == "none":
        losses, told = _token_loss(hidden, weight, bias, request, token_loss, statistics)
        # A copy: autograd lets nobody mask in place what is one of several outputs and a view.
        losses = losses.clone()
        return losses if return_stats is None else TokenStatistics(losses=losses, **told)
    mean = reduction == "mean"
    rows = request.rows
    if is_traced(hidden, weight, rows.labels):
        numbers = (mean, token_loss.label_smoothing, token_loss.z_loss, *operators.flat_request(request))
        loss: Tensor = operators.cross_entropy_op(hidden, weight, bias, rows.labels, rows.cu_seqlens, *numbers)[0]
        return loss
    return token_losses.CrossEntropyFunction.apply(hidden, weight, bias, request, mean, token_loss)


def _token_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    request: LinearRequest,
    token_loss: TokenLoss,
    statistics: tuple[str, ...] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """(losses, statistics by name) in the shape of the labels, 0 where they are ignored."""
    rows = request.rows
    if not is_traced(hidden, weight, rows.labels):
        loss, *told = token_losses.TokenLossFunction.apply(hidden, weight, bias, request, token_loss, statistics)
        return loss, dict(zip(statistics, told, strict=True))
    names = " ".join(statistics)
    numbers = (token_loss.label_smoothing, token_loss.z_loss, names, *operators.flat_request(request))
    loss, entropy, known, _ = operators.token_loss_op(hidden, weight, bias, rows.labels, rows.cu_seqlens, *numbers)
    by_name = {
        name: entropy if name == "entropy" else token_losses.statistic(name, known).view(rows.labels.shape)
        for name in statistics
    }
    return loss, by_name
