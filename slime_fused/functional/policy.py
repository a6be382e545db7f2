"""The losses of reinforcement learning on tokens: clipped policy gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slime_fused.engine.layout import TokenLayout
from slime_fused.engine.units import Loss
from slime_fused.functional.arguments import linear_request, statistic_names
from slime_fused.functional.given import GivenChecks, run_loss, token_statistics
from slime_fused.losses import PolicyGradient, as_loss
from slime_fused.output import PolicyOutput, named_numbers

if TYPE_CHECKING:  # a torch without distributed support has no such class
    from torch.distributed import ProcessGroup


def token_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | TokenLayout,
    *,
    advantages: Tensor,
    old_logps: Tensor | None = None,
    ref_token_logps: Tensor | None = None,
    loss: Loss | None = None,
    loss_weights: Tensor | None = None,
    extra: Mapping[str, Tensor] | None = None,
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
    cp_group: ProcessGroup | None = None,
    dp_group: ProcessGroup | None = None,
    return_stats: Sequence[str] | None = None,
) -> PolicyOutput:
    """A policy-gradient loss of a linear head (GRPO, DAPO, GSPO, ...), without materialised logits.

    The other arguments, and errors, as `slime_loss`, but for any number of sequences. What is given for the loss
    carries no gradient.

    Args:
        hidden: (S, T, D), or (N, D) with ``cu_seqlens``.
        weight: (V, D).
        labels: (S, T) or (N,), or their `token_layout`.
        advantages: (S,), or in the shape of the labels (which it is taken for where a loss of tokens could have
            either).
        old_logps: in the shape of the labels: the log-probs under the policy that sampled, as `linear_logprobs`
            gives them. None: this policy sampled, and every ratio is 1.
        ref_token_logps: in the shape of the labels: a reference model's log-probs, where the loss has a KL term.
        loss: None takes ``PolicyGradient()``.
        loss_weights: one for each of the loss's units: multiplies its share of the loss.
        extra: what your own loss needs besides, by name: scalars, (S,) or the shape of the labels each.
        return_stats: names among "entropy", "mean_logit", "is_top1", "sum_sq_probs" and "lse" for ``stats``: what
            trainers log, from the same visit of the logits and without another product.

    Returns:
        `PolicyOutput`; call ``.loss.backward()``.

    Raises:
        As `preference_loss`.
    """
    value: Loss = PolicyGradient() if loss is None else as_loss(loss)
    if value.unit == "pair":
        raise ValueError(f"loss: expected one of tokens or sequences, got one of pairs: {loss!r}")
    asked = ("logps", *statistic_names(return_stats))
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
        cp_group=cp_group,
        dp_group=dp_group,
    )
    check = GivenChecks(request, hidden)
    is_of_sequences = isinstance(value, PolicyGradient) and value.level == "sequence"
    check_advantages = check.per_sequence if is_of_sequences else check.per_sequence_or_token
    given = {"advantages": check_advantages("advantages", advantages)}
    if old_logps is not None:
        given["old_logps"] = check.per_token("old_logps", old_logps)
    if ref_token_logps is not None:
        given["ref_token_logps"] = check.per_token("ref_token_logps", ref_token_logps)
    if loss_weights is not None:
        given["loss_weights"] = check.per_unit("loss_weights", loss_weights, value)
    given.update(check.extras(extra, value))
    total, numbers, means, tokens = run_loss(hidden, weight, bias, request, value, given, asked)
    stats = None if return_stats is None else token_statistics(tokens, asked)
    return PolicyOutput(total, *named_numbers(value, numbers), means, tokens[0], stats)
