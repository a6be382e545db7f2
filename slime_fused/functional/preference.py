"""The losses of pairs and of single responses: SLIME, and any other value of `slime_fused.losses`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slime_fused.engine.layout import TokenLayout
from slime_fused.engine.units import Loss, Pairs, UnitTerms
from slime_fused.functional.arguments import linear_request, statistic_names
from slime_fused.functional.given import GivenChecks, run_loss, token_statistics
from slime_fused.losses import PolicyGradient, Slime, SlimeLossConfig, as_loss
from slime_fused.output import PreferenceOutput, SlimeOutput, named_numbers

if TYPE_CHECKING:  # a torch without distributed support has no such class
    from torch.distributed import ProcessGroup


def slime_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | TokenLayout,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: SlimeLossConfig | None = None,
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
) -> SlimeOutput:
    """The SLIME preference loss (arXiv 2602.02383) of a linear head, without materialised logits.

    Args:
        hidden: (S, T, D) hidden states of S = 2P sequences, rows 0..P-1 the chosen and P..2P-1 the rejected
            responses of the same pairs; or (N, D), packed, with ``cu_seqlens``. float32, bfloat16, float16; float64
            on the CPU.
        weight: (V, D) head weight, in the dtype of ``hidden`` (under autocast both are cast to its dtype).
        labels: (S, T) or (N,) int64 token ids; ``ignore_index`` marks prompt and padding, which cost nothing. Or
            their `token_layout`, which saves waiting for the device.
        bias: (V,) or None; added before scale and soft cap.
        cu_seqlens: (S + 1,) int32 boundaries of packed sequences, from 0 to N.
        config: the loss's hyperparameters; None takes the paper's.
        shift: position t predicts ``labels[t + 1]`` of the same sequence (labels as the model's input ids).
        ignore_index: the label of tokens that take no part.
        logit_scale: multiplies the logits (Cohere; Granite divides).
        logit_softcap: c, for logits c * tanh(logits / c) after the scale (Gemma 2).
        temperature: divides the logits after the soft cap.
        logits_dtype: float32 for logits that are not rounded to the 16 bits of ``hidden`` and ``weight`` (all else
            stays as it is); None for their dtype. `explain_plan` says what it costs.
        backend: "auto", "cuda", "triton", "cpu" or "torch".
        workspace: "auto", bytes, or a string such as "512MiB": the most that logits-shaped buffers may take. Where
            chunks of that size would need a float32 copy of a 16-bit dW, the logits may have the room of both: if
            all fit there, one chunk is both leaner and faster. Results do not depend on it beyond rounding.
        tp_group: processes that hold the head's rows together, in order of rank: ``weight`` and ``bias`` are this
            process's rows, all else is the same on each. Each gets the whole gradient of ``hidden``.
        cp_group: processes that hold the tokens together: each gives its tokens of all S sequences (none of some,
            if need be) and gets the whole loss, and the gradients of its own tokens: add those of the head up over
            the group. ``shift`` the labels before they are split.
        dp_group: processes that hold other pairs of the batch. The loss is normalised so that its mean over the
            group, and that of the gradients, are the whole batch's, however unequal the parts.

    Returns:
        `SlimeOutput`; call ``.loss.backward()``. Gradients reach hidden, weight and bias, each only if it
        requires one.

    Raises:
        TypeError, ValueError: before any kernel runs, naming the argument, what was expected and what came. A
            label out of range is an asynchronous device assertion on a GPU.
        RuntimeError: in backward, for a second derivative.
    """
    value = Slime.of(config)
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
    loss, numbers, mean_logps, _ = run_loss(hidden, weight, bias, request, value, {})
    return SlimeOutput.of(loss, numbers, mean_logps)


def preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | TokenLayout,
    *,
    loss: Loss | Callable[[Pairs], Tensor | UnitTerms],
    ref_chosen_sum_logps: Tensor | None = None,
    ref_rejected_sum_logps: Tensor | None = None,
    ref_chosen_mean_logps: Tensor | None = None,
    ref_rejected_mean_logps: Tensor | None = None,
    ref_sum_logps: Tensor | None = None,
    ref_mean_logps: Tensor | None = None,
    ref_token_logps: Tensor | None = None,
    desirable: Tensor | None = None,
    kl_baseline: Tensor | float | None = None,
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
) -> PreferenceOutput:
    """Any loss of log-probs of a linear head, without materialised logits: DPO, SimPO, KTO, ..., or your own.

    The other arguments, and errors, as `slime_loss`; the sequences are pairs in its order where the loss is one of
    pairs, any number of responses otherwise. What is given for the loss carries no gradient.

    Args:
        hidden: (S, T, D), or (N, D) with ``cu_seqlens``.
        weight: (V, D).
        labels: (S, T) or (N,), or their `token_layout`.
        loss: a value of `slime_fused.losses`, or a function of `Pairs` that returns the loss of each, (P,): their
            mean over the batch is the loss. (`torch.compile` breaks its graph where it meets a function that was
            never used, or made an `Own`, outside: an error with ``fullgraph=True``.)
        ref_chosen_sum_logps: (P,) a reference model's log-prob of each chosen response, summed over its tokens.
        ref_rejected_sum_logps: (P,) of each rejected response.
        ref_chosen_mean_logps: (P,) instead: the mean over the tokens of each chosen response.
        ref_rejected_mean_logps: (P,) of each rejected response.
        ref_sum_logps: (S,) instead, for any sequences: sums.
        ref_mean_logps: (S,) means.
        ref_token_logps: instead, in the shape of the labels: of each token, as `linear_logprobs` gives them.
        desirable: (S,) bool, for KTO: which responses are desirable.
        kl_baseline: a number, for KTO: see there.
        loss_weights: (P,) for a loss of pairs, (S,) for one of sequences, the shape of the labels for one of
            tokens: multiplies each one's share of the loss.
        extra: what your own loss needs besides, by name: scalars, (P,), (S,) or the shape of the labels each.
        return_stats: names among "entropy", "mean_logit", "is_top1", "sum_sq_probs" and "lse" for ``stats``: what
            trainers log, from the same visit of the logits and without another product.

    Returns:
        `PreferenceOutput`; call ``.loss.backward()``.

    Raises:
        TypeError, ValueError: as `slime_loss`; and naming the loss: what it needs and did not get, or got in
            another shape; values that are not one per unit, carry no gradient, or are NaN for finite log-probs.
    """
    value = as_loss(loss)
    if isinstance(value, PolicyGradient):
        raise ValueError(f"loss: expected a loss of preferences, got {value!r}: call token_policy_loss")
    asked = () if return_stats is None else ("logps", *statistic_names(return_stats))
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
    given: dict[str, Tensor] = {}
    sides = (
        ("sum", ref_chosen_sum_logps, ref_rejected_sum_logps, ref_sum_logps),
        ("mean", ref_chosen_mean_logps, ref_rejected_mean_logps, ref_mean_logps),
    )
    for kind, chosen, rejected, both in sides:
        reference = check.references(kind, chosen, rejected, both)
        if reference is not None:
            given[f"ref_{kind}_logps"] = reference
    if ref_token_logps is not None:
        given["ref_token_logps"] = check.per_token("ref_token_logps", ref_token_logps)
    if desirable is not None:
        given["desirable"] = check.flags("desirable", desirable)
    if kl_baseline is not None:
        given["kl_baseline"] = check.scalar("kl_baseline", kl_baseline)
    if loss_weights is not None:
        given["loss_weights"] = check.per_unit("loss_weights", loss_weights, value)
    given.update(check.extras(extra, value))
    total, numbers, mean_logps, tokens = run_loss(hidden, weight, bias, request, value, given, asked)
    stats = token_statistics(tokens, asked) if asked else None
    return PreferenceOutput(total, *named_numbers(value, numbers), mean_logps, value.unit == "pair", stats)
