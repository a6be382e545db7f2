"""The public losses of a linear head: check the arguments, pick the defaults, call the operator."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from slime_fused.autograd import functions, library, token_library
from slime_fused.autograd.functions import SlimeParameters
from slime_fused.autograd.tensors import is_traced
from slime_fused.backends.base import TokenLoss
from slime_fused.engine.calls import Wants
from slime_fused.engine.layout import IGNORED, TokenLayout, check_pairs
from slime_fused.functional import checks
from slime_fused.functional.arguments import config_numbers, config_or_default, label_counts, prepare_arguments
from slime_fused.losses.config import SlimeLossConfig
from slime_fused.output import SlimeOutput

if TYPE_CHECKING:  # a torch without distributed support has no such class
    from torch.distributed import ProcessGroup

Reduction = Literal["mean", "sum", "none"]
_REDUCTIONS = ("mean", "sum", "none")


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
    config = config_or_default(config)
    hidden, weight, labels, bias, cu_seqlens, options = prepare_arguments(
        hidden,
        weight,
        labels,
        bias,
        cu_seqlens,
        shift,
        ignore_index,
        logit_scale,
        logit_softcap,
        logits_dtype,
        backend,
        workspace,
        tp_group,
        cp_group,
        dp_group,
    )
    if cu_seqlens is None and hidden.dim() != 3:
        raise ValueError(f"hidden: expected (S, T, D), or (N, D) with cu_seqlens, got shape {tuple(hidden.shape)}")
    if cp_group is None:  # else once the others have told what they hold
        check_pairs(labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    parameters = SlimeParameters(config_numbers(config), config.stabilizer_reduction)
    wants = Wants.of(hidden, weight, bias)
    if is_traced(hidden, weight, labels):
        outputs = library.slime_loss_op(
            hidden,
            weight,
            bias,
            labels,
            cu_seqlens,
            list(parameters.numbers),
            parameters.reduction,
            *library.flat_options(options, wants),
        )[:6]
    else:
        outputs = functions.SlimeLossFunction.apply(
            hidden, weight, bias, labels, cu_seqlens, parameters, options, wants
        )
    return SlimeOutput(*outputs)


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
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    workspace: int | str = "auto",
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Log-probability of every label, differentiable for any upstream gradient.

    Arguments as `slime_loss`, but for any number of sequences; ``hidden`` (..., D) with ``labels`` (...).

    Returns:
        Log-probs in the shape of ``labels``, float32 (float64 for float64), 0 where the label is ignored.

    Raises:
        As `slime_loss`.
    """
    return -_token_loss(
        hidden,
        weight,
        labels,
        bias,
        cu_seqlens,
        TokenLoss(),
        shift,
        ignore_index,
        logit_scale,
        logit_softcap,
        logits_dtype,
        backend,
        workspace,
        tp_group,
    )


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
    logps = linear_logprobs(
        hidden,
        weight,
        labels,
        bias=bias,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        logits_dtype=logits_dtype,
        backend=backend,
        workspace=workspace,
        tp_group=tp_group,
    )
    if isinstance(labels, TokenLayout):
        cu_seqlens, shift, ignore_index = labels.cu_seqlens, False, IGNORED
        labels = labels.labels
    if cu_seqlens is None:
        sequences = math.prod(labels.shape[:-1])
        # From the labels, not torch.arange: where they are fake tensors, so must these be.
        index = labels.new_ones(sequences + 1, dtype=torch.int64).cumsum(0) - 1
        bounds = (index * labels.shape[-1]).to(torch.int32)
    else:
        bounds = cu_seqlens.to(torch.int32)
    sums = token_library.segment_sum_op(logps.reshape(-1), bounds, False, backend)
    if reduction == "sum":
        return sums
    counts = label_counts(labels, cu_seqlens, shift, ignore_index)
    return sums / counts.clamp(min=1)


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
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    workspace: int | str = "auto",
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Cross-entropy of a linear head: `torch.nn.functional.cross_entropy` of ``hidden @ weight.T``, fused.

    Arguments as `slime_loss`, and:

    Args:
        reduction: "mean" over labelled tokens, "sum", or "none".
        label_smoothing: eps in [0, 1], as in `torch.nn.functional.cross_entropy`.
        z_loss: weight of the square of the log-sum-exp, added per token.

    Returns:
        A scalar, or for "none" the shape of ``labels`` with 0 where the label is ignored; float32 (float64 for
        float64).

    Raises:
        As `slime_loss`; ValueError for "mean" where all labels are ignored (the sum of none is 0).
    """
    checks.check_choice("reduction", reduction, _REDUCTIONS)
    checks.check_token_loss(label_smoothing, z_loss)
    token_loss = TokenLoss(float(label_smoothing), float(z_loss))
    if reduction == "none":
        return _token_loss(
            hidden,
            weight,
            labels,
            bias,
            cu_seqlens,
            token_loss,
            shift,
            ignore_index,
            logit_scale,
            logit_softcap,
            logits_dtype,
            backend,
            workspace,
            tp_group,
        )
    hidden, weight, labels, bias, cu_seqlens, options = prepare_arguments(
        hidden,
        weight,
        labels,
        bias,
        cu_seqlens,
        shift,
        ignore_index,
        logit_scale,
        logit_softcap,
        logits_dtype,
        backend,
        workspace,
        tp_group,
    )
    wants = Wants.of(hidden, weight, bias)
    mean = reduction == "mean"
    if is_traced(hidden, weight, labels):
        loss: Tensor = library.cross_entropy_op(
            hidden,
            weight,
            bias,
            labels,
            cu_seqlens,
            mean,
            token_loss.label_smoothing,
            token_loss.z_loss,
            *library.flat_options(options, wants),
        )[0]
        return loss
    return functions.CrossEntropyFunction.apply(
        hidden, weight, bias, labels, cu_seqlens, mean, token_loss, options, wants
    )


def _token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | TokenLayout,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    token_loss: TokenLoss,
    *head_options: Any,
) -> Tensor:
    hidden, weight, labels, bias, cu_seqlens, options = prepare_arguments(
        hidden, weight, labels, bias, cu_seqlens, *head_options
    )
    wants = Wants.of(hidden, weight, bias)
    if is_traced(hidden, weight, labels):
        loss: Tensor = library.token_loss_op(
            hidden,
            weight,
            bias,
            labels,
            cu_seqlens,
            token_loss.label_smoothing,
            token_loss.z_loss,
            *library.flat_options(options, wants),
        )[0]
        return loss
    return functions.TokenLossFunction.apply(hidden, weight, bias, labels, cu_seqlens, token_loss, options, wants)
