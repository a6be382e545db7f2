"""The planner: problem size + byte budget -> which plan, in which chunks. Pure: no tensors, no devices.

======== ==================================================== ======================= ====================
plan     when                                                 N x V x D products      ... with a frozen head
======== ==================================================== ======================= ====================
eval     no gradient is wanted                                1                       1
stream   a chunk's coefficients are known with its log-probs  3                       2
resweep  a unit's logits do not fit the workspace             4                       2
fused    few rows fit, and the backend has ``linear_stats``   4                       never chosen
======== ==================================================== ======================= ====================

What is known with a chunk's log-probs: for a loss of pairs or sequences, the coefficients of whole ones; for a mean
or summed cross-entropy and other losses of tokens, those of any row; for a loss that needs the whole batch, all or
none; for per-token log-probs (whose coefficients come with ``backward``) none, so that "stream" there means one
chunk whose residual is kept until then. Where an entropy's gradient may come too, it is the chunk's logits that are
kept, and "resweep" with a frozen head takes 3 products: nothing of dX is known in forward.

"fused" never writes the logits of its forward pass, and sweeps backward over blocks of the vocabulary instead of
blocks of rows: dW is written once in its own dtype, where chunks of rows would add into a float32 copy of it.
Without a gradient it is one product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from slime_fused.engine.problem import ROW_ALIGNMENT, Problem, format_bytes, padded_cols, round_up

PlanKind = Literal["eval", "stream", "resweep", "fused"]

WEIGHT_GRAD_BLOCK_BYTES = 8 << 20
"""Where a 16-bit product cannot accumulate into float32 (on the CPU; on a GPU before PyTorch 2.10) it goes through
blocks this large."""

FUSED_BELOW_ROWS = 1024
"""Rows of a chunk at which adding its dW takes as long as one of its products.

A chunk of M rows adds into a float32 dW (8 V D bytes) beside products of 2 M V D FLOP each; on an H100 (about 700
TFLOP/s, 3 TB/s) that is 2.7 ps against 2.9 ps x M / 1024 per entry of dW, so at M = 1024 about 30 % of the three
products: what the fourth product of "fused" costs. By the same account "fused" adds into a float32 dX once per
block, which B columns hide as M rows hide dW. float32 products take ten times as long and hide both.
Not yet measured.
"""

FUSED_LEAST_COLS = 256
"""Columns below which no block of "fused" is worth a product: no tile of one is wider."""

FUSED_COL_MULTIPLE = 128
"""Blocks of columns are multiples of this, so that no tile of a product straddles two."""

_LOSSES = {
    "token": "a loss of tokens",
    "sequence": "a loss of sequences",
    "pair": "a loss of pairs",
    "batch": "a loss of the whole batch",
    "later": "per-token losses",
}


@dataclass(frozen=True)
class Chunk:
    """Half-open range of what is worked on at once: units where a loss of these is streamed, rows otherwise."""

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
    """Byte budget of the logits buffer, where it is chunked; see `logits_bytes`."""
    reason: str
    block_cols: int = 0
    """"fused": columns of the vocabulary whose logits (all rows) backward holds at once; 0 without a backward."""

    @property
    def blocks(self) -> int:
        """Blocks of columns that the backward pass of "fused" goes through."""
        return -(-self.problem.vocab_size // self.block_cols) if self.block_cols else 0

    @property
    def chunk_rows(self) -> int:
        """Rows of the largest chunk."""
        return max((c.rows for c in self.chunks), default=0)

    @property
    def workspace_bytes(self) -> int:
        """What is taken of the budget: the logits of a chunk; for "fused" of a block, or partial statistics."""
        p = self.problem
        if self.kind == "fused":
            block = p.rows * padded_cols(self.block_cols, p.itemsize) * p.itemsize
            block += p.wide_bytes(self.logits_rows, self.block_cols)
            return max(block, self.chunk_rows * p.linear_stats_row_bytes)
        return p.buffer_bytes(self.chunk_rows)

    @property
    def logits_rows(self) -> int:
        """Rows whose float32 logits lie beside a 16-bit residual at once; 0 where logits lie in its place."""
        p = self.problem
        if self.kind != "fused":
            return p.wide_rows(self.chunk_rows)
        return _wide_rows_of_block(p) if self.block_cols else 0

    @property
    def scratch_bytes(self) -> int:
        """Hidden-sized rows beside the logits: those of the largest chunk, or for "fused" of all rows.

        "fused" gathers its rows; backward needs them times their coefficients too, and sums dX in float32.
        """
        p = self.problem
        if self.kind != "fused":
            return self.chunk_rows * p.row_scratch_bytes
        if not self.block_cols:
            return self.chunk_rows * p.hidden_size * p.itemsize
        copies = 1 + int(p.want_weight or p.want_hidden)
        return p.rows * p.hidden_size * (copies * p.itemsize + (max(4, p.itemsize) if p.want_hidden else 0))

    @property
    def accumulates_weight_grad(self) -> bool:
        """Whether dW is summed over several products."""
        return self.problem.want_weight and len(self.chunks) > 1 and self.kind != "fused"

    @property
    def sums_weight_grad_in_float32(self) -> bool:
        """Whether products of 16 bits go into a float32 dW: over several chunks, or into one that stays so."""
        p = self.problem
        is_wide = p.keeps_float32_weight_grad or p.weight_grad_itemsize >= 4
        return p.want_weight and p.itemsize < 4 and (self.accumulates_weight_grad or is_wide)

    @property
    def accumulator_bytes(self) -> int:
        """A float32 dW beside the returned one, and a block on its way into it."""
        p = self.problem
        if not self.sums_weight_grad_in_float32:
            return 0
        return WEIGHT_GRAD_BLOCK_BYTES + (0 if p.weight_grad_itemsize >= 4 else 4 * p.vocab_size * p.hidden_size)

    @property
    def logits_bytes(self) -> int:
        """What all logits-shaped buffers and the accumulator take together."""
        return self.workspace_bytes + self.accumulator_bytes

    @property
    def _accumulator_reason(self) -> str:
        if not self.accumulator_bytes:
            return ""
        if self.problem.weight_grad_itemsize >= 4:
            return " (a block on its way into a float32 dW)"
        if self.problem.keeps_float32_weight_grad:
            return " (float16: a float32 dW until backward)"
        return " (float32 dW over several chunks)"

    @property
    def _wide_logits_line(self) -> str:
        if self.kind == "fused" and not self.block_cols:
            return "logits       float32: never rounded to the operands' dtype, and never stored"
        p = self.problem
        wide = p.wide_bytes(self.logits_rows, self.block_cols or p.vocab_size)
        return (
            f"logits       float32, {self.logits_rows} rows at once: {format_bytes(wide)} of the workspace; "
            f"written and read in 4 bytes each instead of {p.itemsize}, and on a CPU multiplied at the float32 rate"
        )

    @property
    def products(self) -> int:
        """Matrix products of size rows x vocabulary x hidden, forward and backward together."""
        p = self.problem
        needs_logits = p.wants_gradient if p.mixes_entropy else p.wants_head_gradient
        recomputed = {"resweep": needs_logits, "fused": p.wants_gradient}.get(self.kind, False)
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
            f"problem      {_LOSSES[p.unit]}{' and entropies' if p.mixes_entropy else ''}: "
            f"{p.rows} labelled rows x {p.vocab_size} vocabulary x {p.hidden_size} hidden, "
            f"{p.itemsize} bytes each; gradients: {', '.join(wanted) or 'none'}",
            f"chunks       {len(self.chunks)} of at most {self.chunk_rows} rows"
            + (" (statistics; no logits are written)" if self.kind == "fused" else ""),
            *(
                [f"blocks       {self.blocks} of at most {self.block_cols} columns x {p.rows} rows (backward)"]
                if self.block_cols
                else []
            ),
            f"workspace    {format_bytes(self.workspace_bytes)} of {format_bytes(self.workspace)} "
            f"(all logits at once: {format_bytes(p.rows * p.row_pitch * p.itemsize)})",
            *([self._wide_logits_line] if p.has_wide_logits else []),
            f"accumulator  {format_bytes(self.accumulator_bytes)}{self._accumulator_reason}; with the workspace "
            f"{format_bytes(self.logits_bytes)}",
            f"scratch      {format_bytes(self.scratch_bytes)} of hidden-sized rows",
            f"products     {self.products} of rows x vocabulary x hidden, {self.flops / 1e12:.3g} TFLOP",
        ]
        return "\n".join(lines)


@lru_cache(maxsize=256)
def make_plan(problem: Problem, workspace: int) -> Plan:
    """Choose the plan for ``problem`` whose chunks fit ``workspace`` bytes.

    Raises ValueError where not even one row fits, naming the least that works.
    """
    least = problem.buffer_bytes(1)
    if workspace < least:
        raise ValueError(
            f"workspace: expected at least {least} bytes ({format_bytes(least)}, one row "
            f"of {problem.vocab_size} logits), got {workspace}"
        )
    by_rows = plan_by_rows(problem, workspace)
    # "fused" first: it alone keeps within a small budget without a float32 dW.
    return _plan_fused(by_rows) or one_chunk_instead(by_rows) or by_rows


def one_chunk_instead(plan: Plan) -> Plan | None:
    """One chunk in place of several, where that takes no more memory: it needs no float32 copy of a 16-bit dW.

    It is also faster: it never adds to such a copy, casts none, and forms no logits twice.
    """
    # By what all processes that share sequences agree on: their own rows differ, and their chunks must meet.
    problem = replace(plan.problem, rows=sum(plan.problem.unit_rows) or plan.problem.rows)
    several = plan_by_rows(problem, plan.workspace)
    if not (several.accumulates_weight_grad and several.sums_weight_grad_in_float32):
        return None
    everything = problem.buffer_bytes(problem.rows)
    one = plan_by_rows(problem, everything)
    room = plan.workspace + several.accumulator_bytes - one.accumulator_bytes
    if several.accumulator_bytes > one.accumulator_bytes:
        # The block on the way into the accumulator is not room for logits.
        room -= WEIGHT_GRAD_BLOCK_BYTES
    is_one = len(one.chunks) == 1 and one.kind == "stream"
    if not is_one or one.workspace_bytes + one.scratch_bytes > room + several.scratch_bytes:
        return None
    whole = plan_by_rows(plan.problem, everything)
    return replace(
        whole,
        workspace=plan.workspace,
        reason=f"all {problem.rows} rows at once take no more than {several.chunk_rows} and a float32 dW would",
    )


def plan_by_rows(problem: Problem, workspace: int) -> Plan:
    """The plan that forms the logits of whole rows."""
    capacity = problem.rows_within(workspace)
    if not problem.wants_gradient:
        return Plan("eval", problem, _row_chunks(problem.rows, capacity), workspace, "no gradient is wanted")
    if problem.unit == "token":
        reason = "the coefficient of a row depends on no other row"
        return Plan("stream", problem, _row_chunks(problem.rows, capacity), workspace, reason)
    if problem.unit != "later":
        largest = max(problem.unit_rows, default=0)
        what = "the loss needs the whole batch, which" if problem.unit == "batch" else f"the largest {problem.unit}"
        if largest <= capacity:
            reason = f"{what} ({largest} rows) fits the workspace ({capacity} rows)"
            return Plan("stream", problem, _unit_chunks(problem.unit_rows, capacity), workspace, reason)
        reason = f"{what} has {largest} rows, the workspace holds {capacity}"
    elif problem.rows <= capacity and problem.can_keep_chunk:
        what = "logits are" if problem.mixes_entropy else "residual is"
        reason = f"all rows fit the workspace ({capacity} rows): their {what} kept for backward"
        return Plan("stream", problem, _row_chunks(problem.rows, capacity), workspace, reason)
    elif problem.rows <= capacity:
        what = "float32 logits are" if problem.mixes_entropy and problem.has_wide_logits else "a residual is"
        reason = f"{what} not kept for backward, which forms the logits of {problem.rows} rows again"
    else:
        reason = f"{problem.rows} rows, the workspace holds {capacity}: backward forms their logits again"
    return Plan("resweep", problem, _row_chunks(problem.rows, capacity), workspace, reason)


def _plan_fused(other: Plan) -> Plan | None:
    """The plan that takes the place of ``other`` by vocabulary blocks, where the backend can and it pays."""
    p, workspace = other.problem, other.workspace
    if not p.has_linear_stats or p.rows == 0 or workspace < p.linear_stats_row_bytes:
        return None
    chunks = _row_chunks(p.rows, workspace // p.linear_stats_row_bytes)
    if other.kind == "eval":
        capacity = p.rows_within(workspace)
        if capacity >= min(FUSED_BELOW_ROWS, p.rows):
            return None
        reason = f"no gradient is wanted, and the workspace holds the logits of {capacity} rows only"
        return Plan("fused", p, chunks, workspace, reason)
    block_cols = _block_cols(p, workspace)
    if not block_cols:
        return None
    if other.kind == "resweep" and p.wants_head_gradient:
        reason = f"{other.reason}; backward goes by blocks of {block_cols} columns"
    elif (
        other.accumulates_weight_grad
        and other.sums_weight_grad_in_float32
        and _accumulates_less(block_cols if p.want_hidden else None, other.chunk_rows)
    ):
        reason = f"{len(other.chunks)} chunks of at most {other.chunk_rows} rows would each add to a float32 dW"
    else:
        # With the head frozen the row plans take two products (with entropies three), this one three.
        return None
    return Plan("fused", p, chunks, workspace, reason, block_cols)


def _accumulates_less(block_cols: int | None, chunk_rows: int) -> bool:
    """Whether a product more and a float32 dX (unless None) over blocks cost less than a float32 dW over chunks."""
    return FUSED_BELOW_ROWS / chunk_rows > 1 + (FUSED_BELOW_ROWS / block_cols if block_cols else 0)


def _block_cols(problem: Problem, workspace: int) -> int:
    """Columns of equal blocks of the vocabulary, as few as hold all rows in the workspace; 0 where none does."""
    group = ROW_ALIGNMENT // problem.itemsize
    group_bytes = problem.rows * ROW_ALIGNMENT + problem.wide_bytes(_wide_rows_of_block(problem), group)
    room = workspace // group_bytes * group
    if room >= problem.vocab_size:
        return problem.vocab_size
    if room < FUSED_LEAST_COLS:
        return 0
    room -= room % FUSED_COL_MULTIPLE
    count = -(-problem.vocab_size // room)
    return round_up(-(-problem.vocab_size // count), FUSED_COL_MULTIPLE)


def _wide_rows_of_block(problem: Problem) -> int:
    """Rows whose wide logits lie beside a block of the vocabulary at once: a narrow block wants many."""
    return -(-problem.rows // 4) if problem.has_wide_logits else 0


def _row_chunks(rows: int, capacity: int) -> tuple[Chunk, ...]:
    """Equal chunks: a short last one would leave the matrix units half empty."""
    if rows == 0:
        return ()
    count = -(-rows // capacity)
    base, extra = divmod(rows, count)
    bounds = [i * base + min(i, extra) for i in range(count + 1)]
    return tuple(Chunk(a, b, b - a) for a, b in pairwise(bounds))


def _unit_chunks(unit_rows: tuple[int, ...], capacity: int) -> tuple[Chunk, ...]:
    """Whole units, in order, as few chunks as that allows and about equally many rows in each."""
    chunks = _greedy(unit_rows, capacity, capacity)
    balanced = _greedy(unit_rows, capacity, -(-sum(unit_rows) // len(chunks)))
    return balanced if len(balanced) <= len(chunks) else chunks


def _greedy(unit_rows: tuple[int, ...], capacity: int, target: int) -> tuple[Chunk, ...]:
    chunks: list[Chunk] = []
    begin = rows = 0
    for i, count in enumerate(unit_rows):
        if i > begin and (rows >= target or rows + count > capacity):
            chunks.append(Chunk(begin, i, rows))
            begin, rows = i, 0
        rows += count
    chunks.append(Chunk(begin, len(unit_rows), rows))
    return tuple(chunks)
