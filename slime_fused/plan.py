"""The planner: problem size + byte budget -> which plan, in which chunks. Pure: no tensors, no devices.

======== ==================================================== ======================= ====================
plan     when                                                 N x V x D products      ... with a frozen head
======== ==================================================== ======================= ====================
eval     no gradient is wanted                                1                       1
stream   a chunk's coefficients are known with its log-probs  3                       2
resweep  a pair's logits do not fit the workspace             4                       2
======== ==================================================== ======================= ====================

What is known with a chunk's log-probs: for SLIME, the coefficients of whole pairs; for a mean or summed
cross-entropy, those of any row; for per-token log-probs (whose coefficients come with ``backward``) none, so
that "stream" there means one chunk whose residual is kept until then.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Operation = Literal["slime", "cross_entropy", "token"]
PlanKind = Literal["eval", "stream", "resweep"]

ROW_ALIGNMENT = 16
"""Bytes. Rows of the logits buffer begin at multiples of this, so that 16-byte accesses are aligned for any V."""

WEIGHT_GRAD_BLOCK_BYTES = 8 << 20
"""Where a product cannot accumulate into float32 (bf16 and fp16 on the CPU) it goes through blocks this large."""

_AUTO_ROWS = {"cpu": 2048, "gpu": 4096}
_AUTO_CAP = {"cpu": 1 << 30, "gpu": 4 << 30}
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True)
class Problem:
    """Everything the planner looks at."""

    operation: Operation
    rows: int
    """N: rows that carry a label."""
    hidden_size: int
    vocab_size: int
    itemsize: int
    """Bytes of one hidden state, weight or logit."""
    want_hidden: bool
    want_weight: bool
    want_bias: bool
    pair_rows: tuple[int, ...] = ()
    """For "slime": labelled rows of each pair (both responses)."""
    keeps_residual: bool = True
    """For "token": whether the residual may stay alive until backward (a compiled graph cannot keep it)."""

    @property
    def row_pitch(self) -> int:
        """Elements between two rows of the logits buffer."""
        per_line = ROW_ALIGNMENT // self.itemsize
        return -(-self.vocab_size // per_line) * per_line

    @property
    def row_bytes(self) -> int:
        """Workspace of one row: its logits."""
        return self.row_pitch * self.itemsize

    @property
    def row_scratch_bytes(self) -> int:
        """What one row takes beside its logits: its row of R W (float32 at least), or its gathered hidden state."""
        return self.hidden_size * max(4, self.itemsize)

    @property
    def wants_gradient(self) -> bool:
        """Whether any gradient is wanted."""
        return self.want_hidden or self.want_weight or self.want_bias


@dataclass(frozen=True)
class Chunk:
    """Half-open range of what is worked on at once: pairs for a streamed SLIME loss, rows otherwise."""

    begin: int
    end: int
    rows: int


@dataclass(frozen=True)
class Plan:
    """How one call runs. ``print(plan)`` explains it."""

    kind: PlanKind
    problem: Problem
    chunks: tuple[Chunk, ...]
    workspace: int
    """Byte budget of the logits buffer."""
    reason: str

    @property
    def chunk_rows(self) -> int:
        """Rows of the largest chunk."""
        return max((c.rows for c in self.chunks), default=0)

    @property
    def workspace_bytes(self) -> int:
        """What the largest chunk takes of the budget."""
        return self.chunk_rows * self.problem.row_bytes

    @property
    def scratch_bytes(self) -> int:
        """What the largest chunk takes beside its logits, hidden / vocabulary of the workspace in size."""
        return self.chunk_rows * self.problem.row_scratch_bytes

    @property
    def accumulates_weight_grad(self) -> bool:
        """Whether dW is summed over several products."""
        return self.problem.want_weight and len(self.chunks) > 1

    @property
    def accumulator_bytes(self) -> int:
        """A float32 dW beside the returned one: needed for 16-bit weights and several chunks only."""
        if not (self.accumulates_weight_grad and self.problem.itemsize < 4):
            return 0
        return 4 * self.problem.vocab_size * self.problem.hidden_size + WEIGHT_GRAD_BLOCK_BYTES

    @property
    def products(self) -> int:
        """Matrix products of size rows x vocabulary x hidden, forward and backward together."""
        p = self.problem
        if self.kind == "eval":
            return 1
        recomputed = self.kind == "resweep" and (p.want_weight or p.want_bias)
        return 1 + int(p.want_hidden) + int(p.want_weight) + int(recomputed)

    @property
    def flops(self) -> int:
        """Floating-point operations of those products."""
        p = self.problem
        return 2 * self.products * p.rows * p.vocab_size * p.hidden_size

    def __str__(self) -> str:
        p = self.problem
        wanted = [
            name for name, on in (("hidden", p.want_hidden), ("weight", p.want_weight), ("bias", p.want_bias)) if on
        ]
        lines = [
            f"plan         {self.kind}: {self.reason}",
            f"problem      {p.operation}: {p.rows} labelled rows x {p.vocab_size} vocabulary "
            f"x {p.hidden_size} hidden, {p.itemsize} bytes each; gradients: {', '.join(wanted) or 'none'}",
            f"chunks       {len(self.chunks)} of at most {self.chunk_rows} rows",
            f"workspace    {format_bytes(self.workspace_bytes)} of {format_bytes(self.workspace)} "
            f"(all logits at once: {format_bytes(p.rows * p.row_pitch * p.itemsize)})",
            f"scratch      {format_bytes(self.scratch_bytes)} of hidden-sized rows",
            f"accumulator  {format_bytes(self.accumulator_bytes)}"
            + (" (float32 dW over several chunks)" if self.accumulator_bytes else ""),
            f"products     {self.products} of rows x vocabulary x hidden, {self.flops / 1e12:.3g} TFLOP",
        ]
        return "\n".join(lines)


def make_plan(problem: Problem, workspace: int) -> Plan:
    """Choose the plan for ``problem`` whose chunks fit ``workspace`` bytes.

    Raises ValueError where not even one row fits, naming the least that works.
    """
    capacity = workspace // problem.row_bytes
    if capacity < 1:
        raise ValueError(
            f"workspace: expected at least {problem.row_bytes} bytes ({format_bytes(problem.row_bytes)}, one row "
            f"of {problem.vocab_size} logits), got {workspace}"
        )
    if not problem.wants_gradient:
        return Plan("eval", problem, _row_chunks(problem.rows, capacity), workspace, "no gradient is wanted")
    if problem.operation == "cross_entropy":
        reason = "the coefficient of every row is known beforehand"
        return Plan("stream", problem, _row_chunks(problem.rows, capacity), workspace, reason)
    if problem.operation == "slime":
        largest = max(problem.pair_rows, default=0)
        if largest <= capacity:
            reason = f"the largest pair ({largest} rows) fits the workspace ({capacity} rows)"
            return Plan("stream", problem, _pair_chunks(problem.pair_rows, capacity), workspace, reason)
        reason = f"the largest pair has {largest} rows, the workspace holds {capacity}"
    elif problem.rows <= capacity and problem.keeps_residual:
        reason = f"all rows fit the workspace ({capacity} rows): their residual is kept for backward"
        return Plan("stream", problem, _row_chunks(problem.rows, capacity), workspace, reason)
    else:
        reason = f"{problem.rows} rows, the workspace holds {capacity}: backward forms their logits again"
    return Plan("resweep", problem, _row_chunks(problem.rows, capacity), workspace, reason)


def _row_chunks(rows: int, capacity: int) -> tuple[Chunk, ...]:
    """Equal chunks: a short last one would leave the matrix units half empty."""
    if rows == 0:
        return ()
    count = -(-rows // capacity)
    base, extra = divmod(rows, count)
    bounds = [i * base + min(i, extra) for i in range(count + 1)]
    return tuple(Chunk(a, b, b - a) for a, b in pairwise(bounds))


def _pair_chunks(pair_rows: tuple[int, ...], capacity: int) -> tuple[Chunk, ...]:
    """Whole pairs, in order, as few chunks as that allows and about equally many rows in each."""
    chunks = _greedy(pair_rows, capacity, capacity)
    balanced = _greedy(pair_rows, capacity, -(-sum(pair_rows) // len(chunks)))
    return balanced if len(balanced) <= len(chunks) else chunks


def _greedy(pair_rows: tuple[int, ...], capacity: int, target: int) -> tuple[Chunk, ...]:
    chunks: list[Chunk] = []
    begin = rows = 0
    for i, count in enumerate(pair_rows):
        if i > begin and (rows >= target or rows + count > capacity):
            chunks.append(Chunk(begin, i, rows))
            begin, rows = i, 0
        rows += count
    chunks.append(Chunk(begin, len(pair_rows), rows))
    return tuple(chunks)


def resolve_workspace(workspace: int | str, problem: Problem, *, is_gpu: bool) -> int:
    """Bytes for ``workspace``: a number of bytes, a string such as "512MiB", or "auto".

    "auto" is room for the largest pair and at least 2048 rows (4096 on a GPU: each chunk reads the head twice
    and its gradient once, which that many rows hide behind the products), at most 1 GiB (4 GiB on a GPU).

    Raises TypeError or ValueError for anything else.
    """
    if isinstance(workspace, str):
        if workspace == "auto":
            kind = "gpu" if is_gpu else "cpu"
            rows = max(_AUTO_ROWS[kind], *problem.pair_rows, 1)
            return max(min(rows * problem.row_bytes, _AUTO_CAP[kind]), problem.row_bytes)
        return parse_bytes(workspace)
    if isinstance(workspace, bool) or not isinstance(workspace, int):
        raise TypeError(f"workspace: expected 'auto', bytes, or a string such as '512MiB', got {workspace!r}")
    if workspace <= 0:
        raise ValueError(f"workspace: expected a positive number of bytes, got {workspace}")
    return workspace


def parse_bytes(text: str) -> int:
    """ "512MiB" -> 536870912. Units: B, KB, MB, GB (powers of 1000), KiB, MiB, GiB (powers of 1024)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"workspace: expected 'auto', bytes, or a string such as '512MiB', got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_bytes(count: int) -> str:
    """268435456 -> "256 MiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"
