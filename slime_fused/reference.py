"""The oracle: every public function in plain PyTorch, with the same signature.

It materialises all logits and leaves the gradients to autograd, so it is also the naive baseline of every
benchmark. It shares no code with the fused path, but for the formulas of `slime_fused.losses` (whose tests have
formulas of their own): it checks little, drops no row and knows no plan. ``backend``, ``workspace`` and the process
groups are accepted and ignored. Any floating dtype; the tests' truth is float64.

``logits_dtype`` is that of the product, whose operands are upcast to it.

``upcast=False`` computes the log-softmax in the dtype of the logits, as the authors' trainer does under mixed
precision; otherwise every reduction runs in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slime_fused.engine.units import BatchCounts, Pairs, Sequences, Tokens, UnitTerms, is_given_per_token
from slime_fused.losses import Formula, Own, PolicyGradient, SlimeLossConfig
from slime_fused.output import PolicyOutput, PreferenceOutput, SlimeOutput, TokenStatistics


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    temperature: float,
    logits_dtype: torch.dtype | None,
    upcast: bool,
) -> Tensor:
    logits = _linear(hidden, weight, bias, logits_dtype)
    if upcast and logits.dtype != torch.float64:
        logits = logits.float()
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return logits if temperature == 1.0 else logits / temperature


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None) -> Tensor:
    if logits_dtype is None:
        return F.linear(hidden, weight, bias)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    with torch.autocast(device, enabled=False):
        wide_bias = None if bias is None else bias.to(logits_dtype)
        return F.linear(hidden.to(logits_dtype), weight.to(logits_dtype), wide_bias)


def _shift(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    if cu_seqlens is None:
        return F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    bounds = cu_seqlens.tolist()
    pieces = [labels[a:b] for a, b in pairwise(bounds)]
    return torch.cat([F.pad(p[1:], (0, 1), value=ignore_index) if len(p) else p for p in pieces])


def _labels_of_sequences(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(mask of labelled tokens, cu_seqlens (S + 1,) int32 of those tokens alone)."""
    mask = labels != ignore_index
    if cu_seqlens is None:
        counts = mask.sum(-1).reshape(-1)
    else:
        bounds = cu_seqlens.tolist()
        counts = torch.stack([mask[a:b].sum() for a, b in pairwise(bounds)])
    return mask, F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    upcast: bool = True,
    return_stats: Sequence[str] | None = None,
    **_ignored: Any,
) -> Any:
    """See `slime_fused.linear_logprobs`."""
    if shift:
        labels = _shift(labels, cu_seqlens, ignore_index)
    logits = _logits(hidden, weight, bias, logit_scale, logit_softcap, temperature, logits_dtype, upcast)
    mask = labels != ignore_index
    index = labels.masked_fill(~mask, 0).long()
    log_softmax = torch.log_softmax(logits, dim=-1)
    logps = _of_labelled(log_softmax.gather(-1, index.unsqueeze(-1)).squeeze(-1), mask)
    if return_stats is None:
        return logps
    told = _statistics(logits, index)
    return TokenStatistics(logps, None, **{name: _of_labelled(told[name], mask) for name in return_stats})


def _of_labelled(values: Tensor, mask: Tensor) -> Tensor:
    """0, or False, where the label is ignored; float32 at least."""
    if values.dtype not in (torch.float64, torch.bool):
        values = values.float()
    # torch.where, not a product: an ignored row may hold an infinite log-prob.
    return torch.where(mask, values, torch.zeros_like(values))


def _statistics(logits: Tensor, index: Tensor) -> dict[str, Tensor]:
    """What `slime_fused.TokenStatistics` holds, of all rows; only the entropy carries a gradient."""
    log_softmax = torch.log_softmax(logits, dim=-1)
    probs = log_softmax.exp()
    with torch.no_grad():
        told = {
            "mean_logit": logits.mean(-1),
            "is_top1": logits.argmax(-1) == index,
            "sum_sq_probs": probs.square().sum(-1),
            "lse": logits.logsumexp(-1),
        }
    # p log p is 0 where p is, and so is its derivative.
    return {**told, "entropy": -(probs * log_softmax.masked_fill(probs == 0, 0)).sum(-1)}


def sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reduction: Literal["sum", "mean"] = "sum",
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """See `slime_fused.sequence_logprobs`."""
    logps = linear_logprobs(
        hidden, weight, labels, cu_seqlens=cu_seqlens, shift=shift, ignore_index=ignore_index, **options
    )
    if shift:
        labels = _shift(labels, cu_seqlens, ignore_index)
    mask, bounds = _labels_of_sequences(labels, cu_seqlens, ignore_index)
    pieces = torch.split(logps[mask], (bounds[1:] - bounds[:-1]).tolist())
    return torch.stack([p.sum() if reduction == "sum" else p.sum() / max(len(p), 1) for p in pieces])


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    upcast: bool = True,
    return_stats: Sequence[str] | None = None,
    **_ignored: Any,
) -> Any:
    """See `slime_fused.linear_cross_entropy`."""
    if shift:
        labels = _shift(labels, cu_seqlens, ignore_index)
    logits = _logits(hidden, weight, bias, logit_scale, logit_softcap, temperature, logits_dtype, upcast)
    losses = cross_entropy(
        logits,
        labels,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
    )
    if return_stats is None:
        return losses
    mask = labels != ignore_index
    told = _statistics(logits, labels.masked_fill(~mask, 0).long())
    return TokenStatistics(None, losses, **{name: _of_labelled(told[name], mask) for name in return_stats})


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **_ignored: Any,
) -> Tensor:
    """See `slime_fused.cross_entropy`."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    flat = labels.reshape(-1).long()
    rows = logits.reshape(-1, logits.shape[-1])
    loss = F.cross_entropy(rows, flat, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        loss = loss + torch.where(flat != ignore_index, z_loss * torch.logsumexp(rows, 1) ** 2, 0.0)
    if reduction == "none":
        return loss.reshape(labels.shape)
    return loss.sum() / (flat != ignore_index).sum() if reduction == "mean" else loss.sum()


def slime_terms(
    logp: Tensor, cu_seqlens: Tensor, config: SlimeLossConfig | None = None, **_ignored: Any
) -> SlimeOutput:
    """See `slime_fused.slime_terms`; arXiv 2602.02383, eq. 5 to 10."""
    c = config or SlimeLossConfig()
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    responses = torch.split(logp, lengths)
    num_pairs = len(responses) // 2
    chosen = torch.stack([r.mean() for r in responses[:num_pairs]])
    rejected = torch.stack([r.mean() for r in responses[num_pairs:]])
    margins = chosen - rejected
    anchor = -c.lambda_w * chosen.mean()
    hinge = torch.relu(c.margin_hard - margins)
    margin_loss = (c.lambda_d * hinge * torch.sigmoid(-c.kappa * (margins - c.margin_soft))).mean()
    penalties = [F.softplus(-r - c.delta, threshold=40.0) ** c.power for r in responses[num_pairs:]]
    if c.stabilizer_reduction == "sequence":
        stabilizer = c.lambda_l * torch.stack([p.mean() for p in penalties]).mean()
    else:
        stabilizer = c.lambda_l * torch.cat(penalties).mean()
    return SlimeOutput(
        loss=anchor + margin_loss + stabilizer,
        anchor=anchor.detach(),
        margin_loss=margin_loss.detach(),
        stabilizer=stabilizer.detach(),
        chosen_logps=chosen.detach(),
        rejected_logps=rejected.detach(),
    )


def slime_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    config: SlimeLossConfig | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    **options: Any,
) -> SlimeOutput:
    """See `slime_fused.slime_loss`."""
    logps = linear_logprobs(
        hidden, weight, labels, cu_seqlens=cu_seqlens, shift=shift, ignore_index=ignore_index, **options
    )
    if shift:
        labels = _shift(labels, cu_seqlens, ignore_index)
    mask, bounds = _labels_of_sequences(labels, cu_seqlens, ignore_index)
    return slime_terms(logps[mask], bounds, config)


def preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    loss: Any,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    ref_chosen_sum_logps: Tensor | None = None,
    ref_rejected_sum_logps: Tensor | None = None,
    ref_chosen_mean_logps: Tensor | None = None,
    ref_rejected_mean_logps: Tensor | None = None,
    extra: Mapping[str, Tensor] | None = None,
    return_stats: Sequence[str] | None = None,
    **options: Any,
) -> PreferenceOutput:
    """See `slime_fused.preference_loss`."""
    given = {name: options.pop(name) for name in _GIVEN if options.get(name) is not None} | dict(extra or {})
    if ref_chosen_sum_logps is not None and ref_rejected_sum_logps is not None:
        given["ref_sum_logps"] = torch.cat([ref_chosen_sum_logps, ref_rejected_sum_logps])
    if ref_chosen_mean_logps is not None and ref_rejected_mean_logps is not None:
        given["ref_mean_logps"] = torch.cat([ref_chosen_mean_logps, ref_rejected_mean_logps])
    options |= {"cu_seqlens": cu_seqlens, "ignore_index": ignore_index}
    logps, stats = _logprobs_and_stats(return_stats, hidden, weight, labels, shift=shift, **options)
    labels = _shift(labels, cu_seqlens, ignore_index) if shift else labels
    value: Formula = loss if isinstance(loss, Formula) else Own(loss)
    return replace(preference_terms(logps, labels, value, given, cu_seqlens, ignore_index), stats=stats)


def preference_terms(
    logps: Tensor,
    labels: Tensor,
    loss: Formula,
    given: Mapping[str, Any],
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> PreferenceOutput:
    """What `preference_loss` makes of log-probs in the labels' shape; ``given`` by the names that losses use."""
    terms, means = _loss_of_units(loss, logps, labels, cu_seqlens, ignore_index, given)
    return PreferenceOutput(*_means(terms), means, loss.unit == "pair")


def token_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    loss: Formula | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    extra: Mapping[str, Tensor] | None = None,
    return_stats: Sequence[str] | None = None,
    **options: Any,
) -> PolicyOutput:
    """See `slime_fused.token_policy_loss`."""
    given = {name: options.pop(name) for name in _GIVEN if options.get(name) is not None} | dict(extra or {})
    options |= {"cu_seqlens": cu_seqlens, "ignore_index": ignore_index}
    logps, stats = _logprobs_and_stats(return_stats, hidden, weight, labels, shift=shift, **options)
    labels = _shift(labels, cu_seqlens, ignore_index) if shift else labels
    value: Formula = PolicyGradient() if loss is None else loss
    terms, means = _loss_of_units(value, logps, labels, cu_seqlens, ignore_index, given)
    return PolicyOutput(*_means(terms), means, logps.detach(), stats)


def _logprobs_and_stats(
    return_stats: Sequence[str] | None, *head: Tensor, **options: Any
) -> tuple[Tensor, TokenStatistics | None]:
    """(log-probs, detached statistics)."""
    told = linear_logprobs(*head, return_stats=return_stats or (), **options)
    fixed = {name: None if x is None else x.detach() for name, x in vars(told).items()}
    return told.logps, None if return_stats is None else TokenStatistics(**fixed)


_GIVEN = (
    "ref_sum_logps",
    "ref_mean_logps",
    "ref_token_logps",
    "desirable",
    "kl_baseline",
    "loss_weights",
    "advantages",
    "old_logps",
)


def _loss_of_units(
    loss: Formula,
    logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    given: Mapping[str, Any],
) -> tuple[UnitTerms, Tensor]:
    """(the values of all units, (S,) mean log-probs), from log-probs in the shape of the labels."""
    mask, bounds = _labels_of_sequences(labels, cu_seqlens, ignore_index)
    own, lengths = logps[mask], (bounds[1:] - bounds[:-1]).tolist()
    index = torch.repeat_interleave(torch.arange(len(lengths), device=own.device), bounds.diff().long())
    half = sum(lengths[: len(lengths) // 2])
    batch = BatchCounts(len(lengths), own.shape[0], half)
    cut = {}
    for name, value in given.items():
        # A Python number would become float32 on the way to float64.
        dtype = value.dtype if isinstance(value, Tensor) and value.dtype == torch.bool else own.dtype
        values = torch.as_tensor(value, dtype=dtype, device=own.device)
        is_per_token = is_given_per_token(name, (*values.shape,), (*labels.shape,), len(lengths), loss.unit)
        cut[name] = values[mask] if is_per_token else values
        if loss.unit == "token" and not is_per_token and values.dim() > 0:
            cut[name] = values[index]
    means = torch.stack([piece.sum() / max(len(piece), 1) for piece in torch.split(own, lengths)]).detach()
    if loss.unit == "token":
        said = loss.values(Tokens(own, bounds.diff().to(own.dtype)[index], batch, cut))
    else:
        kind = Pairs if loss.unit == "pair" else Sequences
        said = loss.values(kind(own, tuple(lengths), bounds, batch, cut))
    weights = cut.get("loss_weights", torch.ones_like(said.loss))
    terms = {name: term * weights for name, term in said.terms.items()}
    return UnitTerms(said.loss * weights, terms, said.metrics), means


def _means(terms: UnitTerms) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """(loss, terms, metrics): the means over units, the last two detached."""
    parts, metrics = ({k: v.detach().mean() for k, v in of.items()} for of in (terms.terms, terms.metrics))
    return terms.loss.mean(), parts, metrics
