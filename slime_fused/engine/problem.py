"""What the planner looks at: the size of a call, and what one of its rows takes."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

Unit = Literal["token", "sequence", "pair", "batch", "later"]
"""What decides a row's coefficient dL/d(token loss): the log-probs of the token, of its sequence, of its pair, of
all; or ("later") what comes from upstream in backward, as for per-token log-probs."""

ROW_ALIGNMENT = 16
"""Bytes. Rows of the logits buffer begin at multiples of this, so that 16-byte accesses are aligned for any V."""

WIDE_LOGITS_ROWS = 512
"""Most rows whose float32 logits lie beside the 16-bit residual of a chunk at once.

Each such block reads the whole head: 2 V D bytes beside 2 x 512 x V D FLOP, which an H100 (3 TB/s, 700 TFLOP/s)
does in 0.7 and 1.5 ps per entry of the head. Not yet measured.
"""


@dataclass(frozen=True)
class Problem:
    """Everything the planner looks at."""

    unit: Unit
    rows: int
    """N: rows that carry a label."""
    hidden_size: int
    vocab_size: int
    itemsize: int
    """Bytes of one hidden state or weight, and of one logit unless ``logits_itemsize`` says otherwise."""
    want_hidden: bool
    want_weight: bool
    want_bias: bool
    unit_rows: tuple[int, ...] = ()
    """For "sequence" and "pair": labelled rows of each (of a pair: both responses). For "batch": of the whole."""
    keeps_residual: bool = True
    """For "later": whether the residual may stay alive until backward (a compiled graph cannot keep it)."""
    mixes_entropy: bool = False
    """For "later": whether coefficients of the rows' entropies come with backward too: no residual is known yet."""
    linear_stats_row_bytes: int = 0
    """Scratch that the backend's ``linear_stats`` takes for each row; 0 where it has none."""
    weight_grad_itemsize: int = 0
    """Bytes of one entry of the dW that is returned (4 for a float32 head under autocast); 0: ``itemsize``."""
    keeps_float32_weight_grad: bool = False
    """float16: dW waits in float32 for the factor that reaches it in backward, however many the chunks."""
    logits_itemsize: int = 0
    """Bytes of one logit where these are wider than the operands (float32 of 16-bit ones); 0: ``itemsize``."""

    @property
    def has_linear_stats(self) -> bool:
        """Whether statistics can be formed without storing logits."""
        return self.linear_stats_row_bytes > 0

    @property
    def row_pitch(self) -> int:
        """Elements between two rows of the logits buffer."""
        return padded_cols(self.vocab_size, self.itemsize)

    @property
    def row_bytes(self) -> int:
        """Of one row of the logits buffer, which holds the residual in the end."""
        return self.row_pitch * self.itemsize

    @property
    def can_keep_chunk(self) -> bool:
        """For "later": whether a chunk may stay alive until backward: its residual or, with ``mixes_entropy``, its
        logits where these lie in one piece."""
        return self.keeps_residual and not (self.mixes_entropy and self.has_wide_logits)

    @property
    def has_wide_logits(self) -> bool:
        """Whether logits are wider than the residual, and so cannot lie where it does."""
        return self.logits_itemsize > self.itemsize

    def wide_rows(self, rows: int) -> int:
        """Rows whose wide logits lie in memory at once, where a chunk has ``rows``; 0 where logits are not wide."""
        if not self.has_wide_logits:
            return 0
        # Without a residual the wide logits are all that a chunk needs.
        return min(WIDE_LOGITS_ROWS, -(-rows // 4)) if self.wants_gradient else rows

    def buffer_bytes(self, rows: int) -> int:
        """Workspace of a chunk of ``rows``: its logits in place of which the residual is written, or both."""
        residual = 0 if self.has_wide_logits and not self.wants_gradient else rows * self.row_bytes
        return residual + self.wide_bytes(self.wide_rows(rows), self.vocab_size)

    def wide_bytes(self, rows: int, cols: int) -> int:
        """Of so many wide logits."""
        return rows * padded_cols(cols, self.logits_itemsize) * self.logits_itemsize if rows else 0

    def rows_within(self, workspace: int) -> int:
        """Rows of the largest chunk within so many bytes."""
        if not self.has_wide_logits:
            return workspace // self.row_bytes
        return bisect_right(range(1, workspace // self.row_bytes + 1), workspace, key=self.buffer_bytes)

    @property
    def row_scratch_bytes(self) -> int:
        """What one row takes beside its logits: its row of R W (float32 at least), or its gathered hidden state."""
        return self.hidden_size * max(4, self.itemsize)

    @property
    def wants_gradient(self) -> bool:
        """Whether any gradient is wanted."""
        return self.want_hidden or self.wants_head_gradient

    @property
    def wants_head_gradient(self) -> bool:
        """Whether a gradient of the head is wanted: its weight's or its bias's."""
        return self.want_weight or self.want_bias


def padded_cols(cols: int, itemsize: int) -> int:
    """Elements between two rows of a buffer of ``cols`` columns."""
    return round_up(cols, ROW_ALIGNMENT // itemsize)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is no less than ``value``."""
    return -(-value // multiple) * multiple


def format_bytes(count: int) -> str:
    """268435456 -> "256 MiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"
