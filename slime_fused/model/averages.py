"""Averages that are right across micro-batches of different size, accumulation steps and processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


class Averages:
    """Weighted means and sums by name. Accumulates on the device, without waiting for it; `flush` brings them to
    the host.
    """

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}

    def add(self, group: str, weight: Tensor, means: Mapping[str, Tensor]) -> None:
        """Add one batch's ``means`` (scalars), which count ``weight``: of so many items of that ``group``, such as
        "pairs", are they means. A group has the same names in every batch.
        """
        if means:
            weight = weight.double()
            values = torch.stack([value.detach().double() for value in means.values()])
            self._append(group, _Group(tuple(means), torch.cat([values * weight, weight.reshape(1)])))

    def count(self, numbers: Mapping[str, Tensor]) -> None:
        """Add one batch's numbers, which are summed up. The same names in every batch."""
        values = torch.stack([value.detach().double() for value in numbers.values()])
        self._append("counts of " + ",".join(numbers), _Group(tuple(numbers), values, is_count=True))

    def add_nothing_of(self, other: Averages) -> None:
        """Know the names of ``other``, whose batch does not count: all processes must `flush` the same."""
        for name, group in other._groups.items():
            self._append(name, replace(group, sums=torch.zeros_like(group.sums)))

    def flush(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The numbers by name, and an empty accumulator. Collective: ``reduce_sum`` adds up over processes.

        Empty if nothing was added since the last call.
        """
        groups, self._groups = self._groups, {}
        if not groups:
            return {}
        sums = reduce_sum(torch.cat([group.sums for group in groups.values()])).tolist()
        result: dict[str, float] = {}
        for group in groups.values():
            own, sums = sums[: group.sums.numel()], sums[group.sums.numel() :]
            if group.is_count:
                result |= {key: int(value) for key, value in zip(group.names, own, strict=True)}
            elif own[-1] > 0:
                result |= {key: value / own[-1] for key, value in zip(group.names, own, strict=False)}
        return result

    def _append(self, name: str, batch: _Group) -> None:
        known = self._groups.get(name)
        self._groups[name] = batch if known is None else replace(known, sums=known.sums + batch.sums)


@dataclass(frozen=True)
class _Group:
    names: tuple[str, ...]
    sums: Tensor
    """One for each name; of means their weights' sum is the last."""
    is_count: bool = False
