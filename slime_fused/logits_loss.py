"""Cross-entropy on logits that exist already: one visit for the loss, one for the gradient, no float32 copy."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from slime_fused import checks
from slime_fused.backends import BACKEND_NAMES, resolve_backend
from slime_fused.backends.base import HeadTransform, TokenLoss
from slime_fused.layout import IGNORED, check_label_range
from slime_fused.op import refuse_second_derivative
from slime_fused.stats import VocabStats


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
            may read the logits afterwards; autograd refuses a second backward.
        backend: "auto", "cuda", "triton", "cpu" or "torch".

    Returns:
        A scalar, or for "none" the shape of ``labels`` with 0 where the label is ignored; float32 (float64 for
        float64).

    Raises:
        TypeError, ValueError: before any kernel runs, naming the argument, what was expected and what came. A mean
            over no label is refused on the CPU; on a GPU, where finding out would mean waiting, it is NaN.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits: expected a floating tensor, got {got}")
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected (..., V) with V > 0, got shape {tuple(logits.shape)}")
    checks.check_labels(labels, logits.shape[:-1], logits.device)
    checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    checks.check_token_loss(label_smoothing, z_loss)
    checks.check_transform(logit_scale, logit_softcap)
    checks.check_choice("backend", backend, ("auto", *BACKEND_NAMES))
    labels = labels.long()
    ignored = labels == ignore_index
    check_label_range(labels, ignored, logits.shape[-1])
    if reduction == "mean" and labels.device.type == "cpu" and bool(ignored.all()):
        raise ValueError("labels: expected at least one label that is not ignore_index, got none")
    head = HeadTransform(float(logit_scale), None if logit_softcap is None else float(logit_softcap))
    token_loss = TokenLoss(float(label_smoothing), float(z_loss))
    targets = labels.masked_fill(ignored, IGNORED).flatten()
    loss: Tensor = LogitsLossFunction.apply(logits, targets, head, token_loss, inplace_backward, backend)
    if reduction == "none":
        return loss.view(labels.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / ignored.logical_not().sum()


class LogitsLossFunction(torch.autograd.Function):
    """(N,) token losses of logits (..., V)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        head: HeadTransform,
        token_loss: TokenLoss,
        inplace_backward: bool,
        backend_name: str,
    ) -> Tensor:
        """Statistics only; the logits stay as they are."""
        backend = resolve_backend(backend_name, logits.device, logits.dtype)
        rows = _as_rows(logits)
        stats = VocabStats.of_logits(backend, rows, targets, None, head, token_loss).finish(
            token_loss, rows.shape[1]
        )
        ctx.save_for_backward(logits, targets, stats.row_max, stats.row_sum, stats.logp)
        ctx.options = (backend, head, token_loss, inplace_backward)
        return stats.loss.masked_fill_(targets == IGNORED, 0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """The residual times each row's upstream gradient, over the logits where that was asked for."""
        refuse_second_derivative()
        logits, targets, row_max, row_sum, logp = ctx.saved_tensors
        backend, head, token_loss, inplace_backward = ctx.options
        rows = _as_rows(logits.detach())
        out = rows if inplace_backward else torch.empty_like(rows, memory_format=torch.contiguous_format)
        backend.residual_from_stats(
            rows,
            out,
            targets,
            None,
            head,
            token_loss,
            col_offset=0,
            vocab_size=logits.shape[-1],
            row_max=row_max,
            row_sum=row_sum,
            logp=logp,
            row_scale=upstream.to(logp.dtype).contiguous(),
        )
        if inplace_backward and out.data_ptr() == logits.data_ptr():
            # Whoever saved the logits too is told by autograd that they have changed.
            torch.autograd.graph.increment_version(logits)
        return out.view(logits.shape), None, None, None, None, None


def _as_rows(logits: Tensor) -> Tensor:
    """(N, V) with contiguous columns; a copy only where the layout has none."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
