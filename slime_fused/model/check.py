"""Before the first step: do the fused log-probs agree with the model's own logits?

A model may do something to its logits that its config does not tell: a scale, a cap, a second head, a slice.
Training would then optimise another distribution than the model samples from, without any sign of it. So a few
positions of the first batch are computed both ways.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from slime_fused.model.calls import FusedLogProbs
from slime_fused.model.head import unwrap_peft
from slime_fused.model.transform import LogitTransform

_NUM_POSITIONS = 4

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Absolute part. A float32 product may run in TF32, whose unit roundoff is 2**-11."""

_ROUNDOFF = {torch.float64: 2.0**-52, torch.float32: 2.0**-11, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


class HeadMismatchError(ValueError):
    """The model's logits are not what its hidden states, head and config give."""


def check_head(
    model: nn.Module,
    batch: dict[str, Tensor],
    transform: LogitTransform,
    backend: str,
    workspace: int | str,
) -> float:
    """Compare log-probs of a few tokens of the batch's first sequence; returns the largest difference.

    At each position the target, the most likely and the least likely token are compared: the extremes show a cap
    or a scale that an ordinary token may hide. Both passes go through ``model`` as training does, without
    gradients and without dropout. ``batch`` as the collator makes it.

    Raises HeadMismatchError if they differ by more than rounding of the model's dtype explains.
    """
    length = int(batch["attention_mask"][0].sum())
    targets = (batch["labels"][0, :length] != -100).nonzero().flatten()
    targets = targets[targets > 0][:_NUM_POSITIONS]
    stop = int(targets[-1]) + 1
    # One sequence, cut after the last position that is looked at: the plain logits stay small.
    inputs = {name: value[:1, :stop] for name, value in batch.items() if name in ("input_ids", "attention_mask")}
    positions = targets - 1 - stop  # the token at t is predicted at t - 1; counted from the end
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = _plain_logits(model, inputs, keep=int(-positions[0]))[0, positions]  # (K, V)
            expected = torch.log_softmax(logits.float(), dim=-1)
            tokens = torch.stack([batch["input_ids"][0, targets], logits.argmax(-1), logits.argmin(-1)], dim=1)
            call = FusedLogProbs(positions, tokens, transform, backend, workspace)
            dtypes: list[torch.dtype] = []

            def probe(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
                dtypes.append(_product_dtype(hidden, weight))
                return call(hidden, weight, bias)

            fused = model(**inputs, head_call=probe)["logps"]
    finally:
        model.train(was_training)
    expected = expected.gather(1, tokens)
    difference = float((fused.float() - expected).abs().max())
    dtype = dtypes[0]
    allowed = _TOLERANCE[dtype] + 2.0 * _ROUNDOFF[dtype] * float(logits.abs().max())
    if not difference <= allowed:
        name = type(unwrap_peft(_unwrap_parallel(model))).__name__
        raise HeadMismatchError(
            f"model: the log-probs from the hidden states and the head of {name} differ from those of its own "
            f"logits by {difference:.3g} (at most {allowed:.3g} expected in {dtype}), with {transform} read from "
            "its config. The model does something to its logits that is not known here: train with "
            "loss_impl='naive', or set check_head=False if you know better"
        )
    return difference


def _plain_logits(model: nn.Module, inputs: dict[str, Tensor], keep: int) -> Tensor:
    """(1, T, V) logits, of the last ``keep`` positions alone where the model can be asked for them."""
    base: Any = unwrap_peft(_unwrap_parallel(model))
    options = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    return model(**inputs, **options).logits


def _unwrap_parallel(model: Any) -> Any:
    """The model inside DistributedDataParallel, FSDP1 or a DeepSpeed engine, which all call it ``module``."""
    while not hasattr(model, "config") or type(model).__module__.startswith(("torch.nn.parallel", "deepspeed")):
        model = model.module
    return model


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the head's product is rounded to; to be asked in the head, where autocast and FSDP have their say."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype
