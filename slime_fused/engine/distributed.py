"""One loss on several processes: a head split by vocabulary, sequences split by tokens, batches split by pairs.

========= ========================= ============================================== ==============================
group     each process holds        what travels                                   gradients it gets
========= ========================= ============================================== ==============================
tp_group  rows [v0, v1) of W and b  3 to 7 numbers per row of logits, then R W     all of dX; its rows of dW, db
cp_group  some tokens of every pair a log-prob per token, what is given beside it  dX of its tokens; their dW, db
dp_group  some of the pairs         three counts                                   of its pairs
========= ========================= ============================================== ==============================

Everything else is the single-process path. Groups are carried by name, so that an operator's schema can hold them.
Every process of a group must make the same call; what they must agree on is compared before any kernel runs, and
each raises where they do not, so that none waits for the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from slime_fused.backends.base import VocabStats
from slime_fused.engine.layout import TokenLayout
from slime_fused.engine.units import BatchCounts


@dataclass(frozen=True)
class VocabShard:
    """This process's rows of a head that a group holds together."""

    group: dist.ProcessGroup
    offset: int
    """Index in the vocabulary of this process's first row."""
    vocab_size: int
    """Of the whole head."""
    largest: int
    """Rows of the largest shard: what every process plans with, so that all take the same chunks."""

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, labels: Tensor, wants: Sequence[bool], group: dist.ProcessGroup
    ) -> VocabShard:
        """Learn the others' sizes.

        Raises ValueError, on every process, where they disagree on ``hidden``'s shape, on ``labels`` or on which
        gradients are wanted, or where one holds no row of ``weight``.
        """
        flat = labels.flatten()
        checksum = torch.arange(1, flat.numel() + 1, device=flat.device).mul_(flat.long() + 1).sum()
        sizes = [hidden.numel() // hidden.shape[-1], hidden.shape[-1], weight.shape[0], _bits(wants)]
        told = gather_ints([*sizes, checksum], group, hidden.device)
        for what, place in (("hidden: expected as many rows", 0), ("hidden: expected as many columns", 1)):
            _require_alike(what, [numbers[place] for numbers in told], "tp_group")
        _require_alike("labels: expected the same ones (a checksum)", [numbers[4] for numbers in told], "tp_group")
        _require_alike(_SAME_WANTS, [numbers[3] for numbers in told], "tp_group")
        shards = [numbers[2] for numbers in told]
        if min(shards) == 0:
            raise ValueError(f"weight: expected at least one row on every process of tp_group, got {shards}")
        return cls(group, sum(shards[: dist.get_rank(group)]), sum(shards), max(shards))

    def merge(self, stats: VocabStats) -> None:
        """Statistics of this shard's columns -> of the whole vocabulary, in place. Two reductions."""
        moments = stats.moments
        maxima = [stats.row_max] if moments is None else [stats.row_max, moments.max_before]
        largest = torch.stack(maxima)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        # A shard whose logits are all -inf has the sums of no exponential.
        is_empty = stats.row_max == -torch.inf
        shift = (stats.row_max - largest[0]).masked_fill_(is_empty, 0)
        share = torch.exp(shift).masked_fill_(is_empty, 0)
        sums = [stats.row_sum, stats.label_logit]
        if stats.logit_sum is not None:
            sums.append(stats.logit_sum)
        if moments is not None:
            moments.centred_sum.addcmul_(stats.row_sum, shift).mul_(share)
            moments.square_sum.mul_(share).mul_(share)
            sums += [moments.centred_sum, moments.square_sum]
        stats.row_sum.mul_(share)
        total = torch.stack(sums)
        dist.all_reduce(total, group=self.group)
        for own, value in zip(sums + maxima, (*total.unbind(), *largest.unbind()), strict=True):
            own.copy_(value)

    def add_up(self, partial: Tensor) -> Tensor:
        """(M, D): this shard's part of R W -> all of it."""
        total = partial.to(torch.promote_types(partial.dtype, torch.float32))
        dist.all_reduce(total, group=self.group)
        return total


@dataclass(frozen=True)
class ContextShard:
    """This process's tokens of sequences that a group holds together."""

    group: dist.ProcessGroup
    lengths: tuple[tuple[int, ...], ...]
    """[rank][sequence]: labelled tokens."""

    @classmethod
    def of(
        cls,
        resolve: Callable[[], TokenLayout],
        wants: Sequence[bool],
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> tuple[TokenLayout, ContextShard]:
        """This process's layout, and the others' lengths.

        ``resolve`` forms the layout. What it raises is raised once the others know of it; they raise ValueError,
        as all do where they disagree on the number of sequences or on which gradients are wanted.
        """
        layout, error = None, None
        try:
            layout = resolve()
        except ValueError as raised:
            error = raised
        told = gather_ints([-1 if layout is None else len(layout.lengths), _bits(wants)], group, device)
        if error is not None:
            raise error
        assert layout is not None
        sequences = [numbers[0] for numbers in told]
        if min(sequences) < 0:
            raise ValueError(
                f"cp_group: the labels of process {sequences.index(min(sequences))} of the group were refused there"
            )
        _require_alike("labels: expected as many sequences", sequences, "cp_group")
        _require_alike(_SAME_WANTS, [numbers[1] for numbers in told], "cp_group")
        return layout, cls(group, tuple(tuple(x) for x in gather_ints(layout.lengths, group, device)))

    @property
    def total_lengths(self) -> tuple[int, ...]:
        """Labelled tokens of every sequence, over all processes."""
        return tuple(map(sum, zip(*self.lengths, strict=True)))

    @property
    def largest_lengths(self) -> tuple[int, ...]:
        """The most that one process holds of every sequence: what every process plans with."""
        return tuple(map(max, zip(*self.lengths, strict=True)))

    def complete(self, logp: Tensor, sequences: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Whole sequences from this process's tokens of them.

        Args:
            logp: (n,) of this process's labelled tokens, in the order of ``sequences``.
            sequences: which ones.

        Returns:
            (N,) log-probs, sequence by sequence and in each in the order of the processes; their boundaries
            (S + 1,) int32; and (n,) where this process's tokens lie. The same bits on every process.
        """
        counts = [[lengths[s] for s in sequences] for lengths in self.lengths]
        stride = max(sum(c) for c in counts)
        padded = logp.new_zeros(stride)
        padded[: logp.shape[0]] = logp
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=self.group)

        begins = [rank * stride for rank in range(len(counts))]
        pieces, bounds = [], [0]
        for s in range(len(sequences)):
            for rank, of_rank in enumerate(counts):
                pieces.append(torch.arange(begins[rank], begins[rank] + of_rank[s], device="cpu"))
                begins[rank] += of_rank[s]
            bounds.append(bounds[-1] + sum(of_rank[s] for of_rank in counts))
        order = torch.cat(pieces)
        own = (order // stride == dist.get_rank(self.group)).nonzero().flatten()
        device = logp.device
        whole = torch.cat(gathered).index_select(0, order.to(device))
        return whole, torch.tensor(bounds, dtype=torch.int32, device=device), own.to(device)


def count_batch(lengths: Sequence[int], group: dist.ProcessGroup | None, device: torch.device) -> BatchCounts:
    """What a mean over the batch divides by, from the labelled tokens of this process's sequences.

    With several processes that hold other sequences each, it is the batch's counts per process, so that the mean of
    their losses (and of their gradients, which data-parallel wrappers take) is that of the whole batch.
    """
    counts = [len(lengths), sum(lengths), sum(lengths[: len(lengths) // 2])]
    if group is None:
        return BatchCounts(*counts)
    total = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(total, group=group)
    return BatchCounts(*(count / dist.get_world_size(group) for count in total.tolist()))


def gather_ints(values: Sequence[int | Tensor], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """``values``, as many on every process, of every process in order of rank. Waits for the device."""
    own = torch.stack([torch.as_tensor(value, dtype=torch.int64, device=device) for value in values])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    return torch.stack(gathered).tolist()


_SAME_WANTS = "requires_grad: expected the same of hidden, weight and bias (bits 1, 2, 4)"


def _bits(flags: Sequence[bool]) -> int:
    return sum(flag << place for place, flag in enumerate(flags))


def _require_alike(expected: str, told: list[int], group: str) -> None:
    if len(set(told)) > 1:
        raise ValueError(f"{expected} on every process of {group}, got {told}")


def group_name(argument: str, group: object) -> str | None:
    """The name by which an operator carries ``group``.

    Raises TypeError for anything but None and a group that holds this process.
    """
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{argument}: expected a torch.distributed.ProcessGroup that holds this process, or None, got {group!r}"
        )
    return str(group.group_name)


def find_group(name: str | None) -> dist.ProcessGroup | None:
    """The group of that name."""
    if name is None:
        return None
    # Absent from torch's stubs; and the module itself from a torch without distributed support.
    resolve: Any = importlib.import_module("torch.distributed.distributed_c10d")._resolve_process_group
    return cast("dist.ProcessGroup", resolve(name))
