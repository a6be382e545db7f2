"""Medians, spreads, and when two of them tell a difference."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MIN_ROUNDS = 6
"""Fewer rounds give no verdict. From six on, two contestants that do not differ are told apart in less than one
comparison in fifty, with even noise and on a machine that stalls now and then (test_demo.py draws both)."""


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, and the bounds of all but the lowest and the highest tenth of them."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one or more ``values``."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(tenths[0], statistics.median(values), tenths[-1])

    def overlaps(self, other: Spread) -> bool:
        """Whether some value lies in both spreads."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Comparison:
    """The seconds of two contestants over the same rounds. ``ratio`` is the median over rounds of naive / fused."""

    naive: Spread
    fused: Spread
    ratio: float
    rounds: int

    @classmethod
    def of(cls, naive: Sequence[float], fused: Sequence[float]) -> Comparison:
        """Of measurements of the same work, round by round. Raises ValueError unless both have the same number."""
        ratios = [a / b for a, b in zip(naive, fused, strict=True)]
        return cls(Spread.of(naive), Spread.of(fused), statistics.median(ratios), len(ratios))

    @property
    def verdict(self) -> str:
        """Who is faster and by how much, or why that cannot be told."""
        if self.rounds < MIN_ROUNDS:
            return f"none ({self.rounds} rounds)"
        if self.naive.overlaps(self.fused):
            return "none (overlap)"
        if self.fused.median < self.naive.median:
            return f"fused {self.ratio:.2f}x faster"
        return f"naive {1 / self.ratio:.2f}x faster"
