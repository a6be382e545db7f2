"""Which rows of the hidden states carry a label, and to which sequence they belong.

Padded and packed inputs both become one flat row space: ``hidden`` (N_all, D), one target per row (-1 where the
label is ignored) and the boundaries of S sequences. Rows without a target are never multiplied with anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

IGNORED = -1
"""Target of a row that takes no part, whatever the caller's ``ignore_index`` was."""


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Rows that carry a label, in order of their sequences: see `slime_fused.token_layout`."""

    targets: Tensor
    """(N_all,) int64: vocabulary index, or IGNORED."""
    lengths: tuple[int, ...]
    """Rows with a target in each of the S sequences."""
    rows: Tensor | None
    """(N,) int64: indices of the rows with a target; None where every row has one."""
    shape: tuple[int, ...]
    """Of the labels: (S, T), or (N_all,)."""
    cu_seqlens: Tensor | None = None
    """(S + 1,) int32 boundaries where the labels were packed."""
    vocab_size: int | None = None
    """Below which the targets are known to lie."""
    _on_device: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        """N: rows with a target."""
        return sum(self.lengths)

    @property
    def labels(self) -> Tensor:
        """The targets in the shape of the labels."""
        return self.targets.view(self.shape)

    def row_targets(self) -> Tensor:
        """(N,) int64: the targets of the rows that have one."""
        return self.of_labelled(self.targets)

    def of_labelled(self, values: Tensor) -> Tensor:
        """(N_all, ...) -> (N, ...): those of the rows that have a target."""
        return values if self.rows is None else values.index_select(0, self.rows)

    def spread(self, values: Tensor) -> Tensor:
        """(N,) of the rows that have a target -> (N_all,), 0 elsewhere."""
        if self.rows is None:
            return values
        return values.new_zeros(self.targets.shape[0]).index_copy_(0, self.rows, values)

    def to_labelled(self, values: Tensor) -> Tensor:
        """(S,) -> (N,): that of its sequence for each row that has a target."""
        index = torch.repeat_interleave(self.ints(self.lengths).long(), output_size=self.num_rows)
        return values.index_select(0, index)

    def require_below(self, vocab_size: int) -> None:
        """Refuse targets that do not lie below ``vocab_size``, where that is not known; see `check_label_range`."""
        if self.vocab_size is None or self.vocab_size > vocab_size:
            check_label_range(self.targets, self.targets == IGNORED, vocab_size)

    def ints(self, values: Sequence[int]) -> Tensor:
        """``values`` as int32 beside the targets; taken there once. Nothing waits for the device."""
        key = tuple(values)
        if key not in self._on_device:
            tensor = torch.tensor(key, dtype=torch.int32, device="cpu")
            tensor = tensor.pin_memory() if self.targets.is_cuda else tensor
            self._on_device[key] = tensor.to(self.targets.device, non_blocking=True)
        return self._on_device[key]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TokenLayout:
        """The same on another device."""
        moved = self.targets.to(device, non_blocking=non_blocking)
        if moved.device == self.targets.device:
            return self
        return self._moved(lambda tensor: tensor.to(moved.device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenLayout:
        """The same in page-locked memory, from which a copy to a GPU waits for nothing."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> TokenLayout:
        return replace(
            self,
            targets=move(self.targets),
            rows=None if self.rows is None else move(self.rows),
            cu_seqlens=None if self.cu_seqlens is None else move(self.cu_seqlens),
            _on_device={},
        )


def shift_labels(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """Labels moved one position forward, so that position t predicts token t + 1 of the same sequence.

    ``labels`` is (S, T), or (N_all,) with ``cu_seqlens`` (S + 1,). The last position of a sequence gets
    ``ignore_index``.
    """
    shifted = torch.full_like(labels, ignore_index)
    shifted[..., :-1] = labels[..., 1:]
    if cu_seqlens is not None:
        num_rows = labels.shape[0]
        is_boundary = torch.zeros(num_rows + 1, dtype=torch.bool, device=labels.device)
        is_boundary[cu_seqlens.long().clamp(0, num_rows)] = True
        shifted.masked_fill_(is_boundary[1:], ignore_index)
    return shifted


def resolve_layout(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    *,
    vocab_size: int | None,
    shift: bool,
    ignore_index: int,
    lengths: Sequence[int] | None = None,
) -> TokenLayout:
    """Find the rows that carry a label. One copy to the host on a GPU, none on the CPU or with ``lengths``.

    ``labels``: (S, T) or (N_all,) int64; a 1-dimensional tensor without ``cu_seqlens`` is one sequence.
    ``lengths``: labelled rows of every sequence, where they are known. ``vocab_size`` None: not known yet.

    Raises ValueError for boundaries that do not run from 0 to N_all without decreasing, for lengths that are not
    those of the labels and, on the CPU, for a label outside [0, vocab_size) that is not ``ignore_index``; on a GPU
    these are asynchronous assertions.
    """
    targets = shift_labels(labels, cu_seqlens, ignore_index) if shift else labels
    ignored = targets == ignore_index
    check_label_range(targets, ignored, vocab_size)
    targets = targets.masked_fill(ignored, IGNORED).flatten()
    has_target = ignored.logical_not()
    if lengths is None:
        counts = _counts(has_target, cu_seqlens)
    else:
        counts = list(lengths)
        _check_lengths(counts, has_target, cu_seqlens)
    num_rows = sum(counts)
    all_rows = num_rows == targets.shape[0]
    # nonzero_static needs no second wait for the device: the count is known by now.
    rows = None if all_rows else torch.nonzero_static(has_target.flatten(), size=num_rows).flatten()
    return TokenLayout(targets, tuple(counts), rows, tuple(labels.shape), cu_seqlens, vocab_size)


def check_label_range(targets: Tensor, ignored: Tensor, vocab_size: int | None) -> None:
    """Refuse labels outside [0, vocab_size): with value and position on the CPU, asynchronously on a GPU.

    ``vocab_size`` None asks for labels of 0 and above.
    """
    bad = targets < 0 if vocab_size is None else (targets < 0) | (targets >= vocab_size)
    bad = bad & ignored.logical_not()
    if targets.device.type != "cpu":
        torch._assert_async(
            bad.any().logical_not(), f"labels: a label lies outside [0, {vocab_size}) and is not ignore_index"
        )
    elif bad.any():
        position = tuple(int(i) for i in bad.nonzero()[0])
        value = int(targets[position])
        where = position[0] if len(position) == 1 else position
        allowed = "of 0 or above" if vocab_size is None else f"in [0, {vocab_size})"
        raise ValueError(f"labels: expected ignore_index or a value {allowed}, got {value} at position {where}")


def _counts(has_target: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    if cu_seqlens is not None:
        return _packed_counts(has_target, cu_seqlens)
    counts: list[int] = has_target.sum(-1).reshape(-1).tolist()
    return counts


def _check_lengths(lengths: list[int], has_target: Tensor, cu_seqlens: Tensor | None) -> None:
    sequences = has_target[..., 0].numel() if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if len(lengths) != sequences:
        raise ValueError(f"lengths: expected one for each of {sequences} sequences, got {len(lengths)}")
    if has_target.device.type == "cpu":
        counts = _counts(has_target, cu_seqlens)
        if lengths != counts:
            s = next(i for i, (given, counted) in enumerate(zip(lengths, counts, strict=True)) if given != counted)
            raise ValueError(
                f"lengths: expected the labelled tokens of each sequence, got {lengths[s]} for sequence {s}, which "
                f"has {counts[s]}"
            )
        return
    if cu_seqlens is None:
        counted = has_target.sum(-1).reshape(-1)
    else:
        cumulative = torch.nn.functional.pad(has_target.cumsum(0), (1, 0))
        counted = cumulative[cu_seqlens.long().clamp(0, has_target.shape[0])].diff()
    given = torch.tensor(lengths, device="cpu").pin_memory().to(counted.device, non_blocking=True)
    torch._assert_async((counted == given).all(), "lengths: not the labelled tokens of each sequence")


def _packed_counts(has_target: Tensor, cu_seqlens: Tensor) -> list[int]:
    num_rows = has_target.shape[0]
    cumulative = torch.zeros(num_rows + 1, dtype=torch.int64, device=has_target.device)
    torch.cumsum(has_target, 0, out=cumulative[1:])
    bounds = cu_seqlens.long()
    at_bounds = cumulative[bounds.clamp(0, num_rows)]
    bounds_host, at_host = torch.stack([bounds, at_bounds]).tolist()
    _check_ends(bounds_host, num_rows, "rows of hidden")
    for s, (begin, end) in enumerate(pairwise(bounds_host)):
        if end < begin:
            raise ValueError(f"cu_seqlens: expected non-decreasing values, got {begin} then {end} at index {s}")
    return [end - begin for begin, end in pairwise(at_host)]


def check_pairs(num_sequences: int, argument: str = "labels") -> None:
    """Refuse a number of sequences that is not 2P with P >= 1; ``argument`` is what it was read off."""
    if num_sequences == 0:
        raise ValueError(f"{argument}: expected at least one pair (two sequences), got none")
    if num_sequences % 2:
        raise ValueError(
            f"{argument}: expected an even number of sequences (P chosen, then P rejected), got {num_sequences}"
        )


def require_responses(lengths: tuple[int, ...]) -> None:
    """Refuse 2P sequences that are not all responses with a label, naming the row that is wrong."""
    if not any(lengths):
        raise ValueError("labels: expected at least one label that is not ignore_index, got none")
    for s, length in enumerate(lengths):
        if length == 0:
            pairs = len(lengths) // 2
            side = "chosen" if s < pairs else "rejected"
            raise ValueError(
                f"labels: expected every response to hold a label, got none in row {s} "
                f"(the {side} response of pair {s % pairs})"
            )


def response_lengths(cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    """Lengths of the responses. Waits for the device. Raises ValueError unless all are > 0 and sum to N."""
    bounds = cu_seqlens.tolist()
    _check_ends(bounds, num_tokens, "the log-probs")
    lengths = [end - begin for begin, end in pairwise(bounds)]
    for s, length in enumerate(lengths):
        if length <= 0:
            raise ValueError(f"cu_seqlens: expected every response to hold a token, got {length} in row {s}")
    return lengths


def _check_ends(bounds: list[int], size: int, what: str) -> None:
    if bounds[0] != 0 or bounds[-1] != size:
        raise ValueError(
            f"cu_seqlens: expected to begin at 0 and end at {size} ({what}), got {bounds[0]} and {bounds[-1]}"
        )
