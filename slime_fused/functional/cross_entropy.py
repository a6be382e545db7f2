"""`cross_entropy` of logits that exist already."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from slime_fused.autograd.logits_passes import LogitsLossFunction, row_targets
from slime_fused.autograd.tensors import is_traced, materialize, refuse_transforms, require_plain
from slime_fused.autograd.token_operators import logits_loss_op
from slime_fused.backends import BACKEND_NAMES
from slime_fused.backends.base import HeadTransform, TokenLoss
from slime_fused.functional import checks


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
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`torch.nn.functional.cross_entropy` with statistics in float32 and no copy of the logits.

    Args:
        logits: (..., V), float32, bfloat16, float16; float64 on the CPU.
        labels: (...) int64; ``ignore_index`` marks tokens that take no part.
        reduction: "mean" over labelled tokens, "sum", or "none".
        label_smoothing: eps in [0, 1].
        z_loss: weight of the square of the log-sum-exp, added per token.
        ignore_index: the label of tokens that take no part.
        logit_scale: multiplies the logits.
        logit_softcap: c, for logits c * tanh(logits / c) after the scale.
        inplace_backward: write the gradient over the logits in backward, which saves their size in memory. Nobody
            may read the logits afterwards; autograd refuses a second backward. Logits whose elements share memory
            (an expanded tensor), or lie in columns apart, get memory of their own for it all the same, as do those
            of a compiled graph.
        backend: "auto", "cuda", "triton", "cpu" or "torch".

    Returns:
        A scalar, or for "none" the shape of ``labels`` with 0 where the label is ignored; float32 (float64 for
        float64).

    Raises:
        TypeError, ValueError: before any kernel runs, naming the argument, what was expected and what came. A mean
            over no label is refused on the CPU (on a GPU, where finding out would mean waiting, it is NaN); the sum
            of none is 0.
    """
    require_plain("logits", logits)
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating tensor, got {logits.dtype}")
    if logits.is_meta:
        raise ValueError("logits: expected a tensor that holds data, got one on the meta device")
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected (..., V) with V > 0, got shape {tuple(logits.shape)}")
    checks.check_labels(labels, logits.shape[:-1], logits.device, like="logits")
    checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    checks.check_token_loss(label_smoothing, z_loss)
    checks.check_transform(logit_scale, logit_softcap, logits.dtype)
    checks.check_ignore_index(ignore_index)
    checks.check_flag("inplace_backward", inplace_backward)
    checks.check_choice("backend", backend, ("auto", *BACKEND_NAMES))
    labels, ignore_index, is_mean = labels.long(), int(ignore_index), reduction == "mean"
    head = HeadTransform(float(logit_scale), None if logit_softcap is None else float(logit_softcap))
    token_loss = TokenLoss(float(label_smoothing), float(z_loss))
    loss: Tensor
    if is_traced(logits, labels):
        options = (token_loss.label_smoothing, token_loss.z_loss, head.scale, head.softcap, backend, ignore_index)
        loss = logits_loss_op(logits, labels, is_mean, *options)[0]
    else:
        refuse_transforms(logits=logits, labels=labels)
        logits = materialize(logits)
        targets = row_targets(labels, ignore_index, logits.shape[-1], needs_label=is_mean)
        loss = LogitsLossFunction.apply(logits, targets, head, token_loss, bool(inplace_backward), backend)
    if reduction == "none":
        return loss.view(labels.shape)
    return loss.sum() / (labels != ignore_index).sum() if is_mean else loss.sum()
