"""`token_layout`: what a batch's labels say, found once and used by every loss of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from slime_fused.autograd.tensors import is_traced, materialize, require_plain
from slime_fused.engine.layout import TokenLayout, resolve_layout
from slime_fused.functional import checks
from slime_fused.functional.arguments import int32_bounds


def token_layout(
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    lengths: Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> TokenLayout:
    """Which tokens of a batch carry a label: pass it in place of ``labels``, to as many losses as like.

    Every loss needs the number of labelled tokens of each sequence on the host, and with labels on a GPU waits for
    them. A collator has them for nothing: with a layout that was made on the CPU and moved (``.to(device)``, or
    ``.pin_memory()`` and ``.to(device, non_blocking=True)``), or made on the GPU with ``lengths``, no loss waits,
    so that a whole forward and backward pass can be captured in a CUDA graph.

    Args:
        labels: (S, T) or (N,) integer token ids.
        cu_seqlens: (S + 1,) boundaries of packed sequences, from 0 to N.
        shift: position t predicts ``labels[t + 1]`` of the same sequence.
        ignore_index: the label of tokens that take no part.
        lengths: S numbers, the labelled tokens of every sequence (after the shift), where they are known.
        vocab_size: where it is known, labels are checked against it here and not again by each loss.

    Returns:
        A `TokenLayout` on the device of ``labels``. Beside it losses take neither ``cu_seqlens`` nor ``shift`` nor
        ``ignore_index``.

    Raises:
        TypeError, ValueError: for labels, boundaries or lengths that do not fit each other, and for a label outside
            [0, vocab_size); on a GPU, what depends on values is an asynchronous device assertion.
    """
    require_plain("labels", labels)
    checks.check_labels(labels, labels.shape, labels.device)
    checks.check_flag("shift", shift)
    checks.check_ignore_index(ignore_index)
    if labels.dim() == 0:
        raise ValueError("labels: expected (S, T), or (N,) with cu_seqlens, got a scalar")
    if cu_seqlens is not None:
        if labels.dim() != 1:
            raise ValueError(f"labels: expected (N,) together with cu_seqlens, got shape {tuple(labels.shape)}")
        checks.check_cu_seqlens(cu_seqlens, labels.device)
    if is_traced(labels, cu_seqlens):
        raise ValueError("labels: expected values to count, got a traced or fake tensor: make the layout outside")
    if cu_seqlens is not None:
        # A copy, which the caller's next batch does not change, and which autograd may save.
        with torch.inference_mode(False):
            cu_seqlens = materialize(int32_bounds(cu_seqlens)).clone()
    return resolve_layout(
        materialize(labels.long()),
        cu_seqlens,
        vocab_size=None if vocab_size is None else _count("vocab_size", vocab_size, least=1),
        shift=bool(shift),
        ignore_index=int(ignore_index),
        lengths=None if lengths is None else _lengths(lengths),
    )


def _lengths(lengths: Sequence[int]) -> list[int]:
    if isinstance(lengths, Tensor):
        if lengths.device.type != "cpu":
            raise ValueError(f"lengths: expected numbers on the host, got a tensor on {lengths.device}")
        lengths = lengths.tolist()
    if isinstance(lengths, str) or not isinstance(lengths, Iterable):
        raise TypeError(f"lengths: expected a sequence of ints, got {lengths!r}")
    return [_count(f"lengths[{s}]", length, least=0) for s, length in enumerate(lengths)]


def _count(name: str, value: object, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return int(value)
