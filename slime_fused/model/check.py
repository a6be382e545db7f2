"""Before the first step: do the fused log-probs agree with the model's own logits?

A model may do something to its logits that its config does not tell: a scale, a cap, a second head, a slice.
Training would then optimise another distribution than the model samples from, without any sign of it. So a few
positions of the first batch are computed both ways.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slime_fused.model.calls import FusedLogProbs, run_in_head
from slime_fused.model.reference import evaluating
from slime_fused.model.sharding import is_dtensor
from slime_fused.model.transform import LogitTransform
from slime_fused.model.wrappers import unwrap_module, unwrap_peft

_NUM_POSITIONS = 4

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Absolute part. A float32 product may run in TF32, whose unit roundoff is 2**-11."""

_ROUNDOFF = {torch.float64: 2.0**-52, torch.float32: 2.0**-11, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

_ATTENTION_OPTIONS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Inputs of packed rows, which many models take among the options that they pass on."""


class HeadMismatchError(ValueError):
    """The model's logits are not what its hidden states, head and config give."""


def check_head(
    model: nn.Module,
    batch: Mapping[str, Any],
    transform: LogitTransform,
    backend: str,
    workspace: int | str,
) -> float:
    """Compare log-probs of a few tokens of one sequence of the batch; returns the largest difference.

    At each position the target, the most likely and the least likely token are compared: the extremes show a cap
    or a scale that an ordinary token may hide. Both passes go through ``model`` as training does, without
    gradients and without dropout. ``batch`` as the collator makes it: ``input_ids`` and ``labels`` (S, T), and
    whatever else the model's forward takes (masks, position ids, images); padding may be on either side.

    Raises HeadMismatchError if they differ by more than rounding of the model's dtype explains, ValueError for a
    batch without a token to predict.
    """
    base: Any = unwrap_peft(unwrap_module(model))
    parameters = _forward_parameters(base)
    labels, inputs = batch["labels"], _model_inputs(batch, parameters)
    row, targets = _first_targets(labels)
    length = labels.shape[1]
    if all(_is_per_token(value, labels) for value in inputs.values()):
        # One sequence, cut after the last position that is looked at: the plain logits stay small.
        length = int(targets[-1]) + 1
        inputs = {name: value[row : row + 1, :length] for name, value in inputs.items()}
        looked_at = 0
    else:
        looked_at = row  # images cannot be told apart by sequence
    positions = targets - 1 - length  # the token at t is predicted at t - 1; counted from the end
    options = {"logits_to_keep": int(-positions[0])} if "logits_to_keep" in parameters else {}
    with torch.no_grad(), evaluating(model):
        logits = model(**inputs, **options).logits[looked_at, positions]  # (K, V)
        _check_width(logits, base.get_output_embeddings())
        expected = torch.log_softmax(logits.float(), dim=-1)
        tokens = torch.stack([batch["input_ids"][row, targets], logits.argmax(-1), logits.argmin(-1)], dim=1)
        call = FusedLogProbs(positions, tokens, transform, backend, workspace, looked_at)
        dtypes: list[torch.dtype] = []

        def probe(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
            dtypes.append(_product_dtype(hidden, weight))
            return call(hidden, weight, bias)

        fused = run_in_head(model, inputs, probe)["logps"]
    expected = expected.gather(1, tokens)
    difference = float((fused.float() - expected).abs().max())
    dtype = dtypes[0]
    allowed = _TOLERANCE[dtype] + 2.0 * _ROUNDOFF[dtype] * float(logits.abs().max())
    if not difference <= allowed:
        raise HeadMismatchError(
            f"model: the log-probs from the hidden states and the head of {type(base).__name__} differ from those "
            f"of its own logits by {difference:.3g} (at most {allowed:.3g} expected in {dtype}), with {transform} "
            "read from its config. The model does something to its logits that is not known here: train with "
            "loss_impl='naive', or set check_head=False if you know better"
        )
    return difference


def _forward_parameters(base: Any) -> set[str]:
    """What the model's forward names, or that of a class under it which it may hand the rest to."""
    forwards = [base.forward, *(vars(c)["forward"] for c in type(base).__mro__ if "forward" in vars(c))]
    return {name for forward in forwards for name in inspect.signature(forward).parameters}


def _model_inputs(batch: Mapping[str, Any], parameters: Collection[str]) -> dict[str, Any]:
    """What of a batch the model's forward names, without what asks it for a loss."""
    names = [name for name in batch if name in parameters or name in _ATTENTION_OPTIONS]
    return {name: batch[name] for name in names if name != "labels" and batch[name] is not None}


def _first_targets(labels: Tensor) -> tuple[int, Tensor]:
    """The first sequence with a token to predict, and (K,) the places of its first few."""
    is_target = (labels != -100) & (torch.arange(labels.shape[1], device=labels.device) > 0)
    rows = is_target.any(1).nonzero().flatten()
    if not len(rows):
        raise ValueError("batch: expected a sequence with a token to predict (labels other than -100), got none")
    return int(rows[0]), is_target[rows[0]].nonzero().flatten()[:_NUM_POSITIONS]


def _check_width(logits: Tensor, head: Any) -> None:
    size = getattr(head, "out_features", logits.shape[-1])
    if is_dtensor(logits) or logits.shape[-1] < size:
        raise ValueError(
            f"model: expected whole logits of {size} tokens to compare with, got a part of {logits.shape[-1]} "
            "on each process; give lm_head output_layouts=Replicate() and use_local_output=True in the "
            "tensor-parallel plan, or set check_head=False"
        )


def _is_per_token(value: Any, labels: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape[:2] == labels.shape


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the head's product is rounded to; to be asked in the head, where autocast and FSDP have their say."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype
