"""What the planner looks at: the size of a call, and what one of its rows takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Operation = Literal["slime", "cross_entropy", "token"]

ROW_ALIGNMENT = 16
"""Bytes. Rows of the logits buffer begin at multiples of this, so that 16-byte accesses are aligned for any V."""


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
    linear_stats_row_bytes: int = 0
    """Scratch that the backend's ``linear_stats`` takes for each row; 0 where it has none."""
    weight_grad_itemsize: int = 0
    """Bytes of one entry of the dW that is returned (4 for a float32 head under autocast); 0: ``itemsize``."""
    keeps_float32_weight_grad: bool = False
    """float16: dW waits in float32 for the factor that reaches it in backward, however many the chunks."""

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
        """Workspace of one row: its logits."""
        return self.row_pitch * self.itemsize

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
