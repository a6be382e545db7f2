"""The gradients of the head, summed over the chunks of one pass: dW = sum R^T (c * X), db = sum R^T c."""

from __future__ import annotations

import torch
from torch import Tensor

from slime_fused.backends.base import acc_dtype
from slime_fused.engine import buffers, products
from slime_fused.engine.chunks import Head, Residual, RowSet
from slime_fused.engine.gradients import Gradients, float16_scale
from slime_fused.engine.plan import Plan


class HeadSum:
    """One pass's sums. A pass makes its own: one that was broken off, or runs beside it, leaves nothing in it."""

    def __init__(self, head: Head, plan: Plan) -> None:
        self._head = head
        self._plan = plan
        self._d_weight: Tensor | None = None
        self._d_bias: Tensor | None = None
        self._weight_scale: Tensor | None = None

    def add(self, rows: RowSet, residual: Residual, coefficient: Tensor) -> None:
        """The chunk of ``rows``, whose coefficients c = dL/d(token loss) are (M,)."""
        problem, weight = self._plan.problem, self._head.weight
        own = residual.taken_out_of(coefficient)
        assert own is not None
        if problem.want_weight:
            # Gathered again rather than kept beside R W: one (rows x hidden) array at a time.
            hidden = rows.take(self._head.hidden)
            scaled = products.scale_rows(hidden, self._lifted(hidden, own), owns=rows.copies)
            is_first = self._d_weight is None
            if self._d_weight is None:
                self._d_weight = self._new_weight_grad()
            products.add_weight_grad(self._d_weight, residual.values, scaled, is_first=is_first)
        if problem.want_bias:
            if self._d_bias is None:
                self._d_bias = weight.new_zeros(weight.shape[0], dtype=acc_dtype(weight.dtype))
            products.add_bias_grad(self._d_bias, residual.values, own)

    def gradients(self, d_hidden: Tensor | None) -> Gradients:
        """With ``d_hidden``, each in its waiting dtype; zeros where no chunk was added."""
        problem, weight, dtypes = self._plan.problem, self._head.weight, self._head.waiting_dtypes
        d_weight, d_bias = self._d_weight, self._d_bias
        if problem.want_weight and d_weight is None:
            d_weight = weight.new_zeros(weight.shape, dtype=dtypes.weight)
        if problem.want_bias and d_bias is None:
            d_bias = weight.new_zeros(weight.shape[0], dtype=dtypes.bias)
        return Gradients(
            d_hidden,
            None if d_weight is None else d_weight.to(dtypes.weight),
            None if d_bias is None else d_bias.to(dtypes.bias),
            self._weight_scale,
        )

    def _new_weight_grad(self) -> Tensor:
        """(V, D) for dW: to be handed out, or scratch that is rounded to 16 bits in the end."""
        weight = self._head.weight
        if not self._plan.sums_weight_grad_in_float32:
            return weight.new_empty(weight.shape)
        if self._head.waiting_dtypes.weight == torch.float32:
            return weight.new_empty(weight.shape, dtype=torch.float32)
        return buffers.new_scratch(weight, weight.shape, torch.float32)

    def _lifted(self, hidden: Tensor, coefficient: Tensor) -> Tensor:
        """The (M,) coefficients as dW's product takes them: in float16, times a scale that keeps it in range."""
        if hidden.dtype != torch.float16:
            return coefficient
        scale = float16_scale(hidden, coefficient)
        if self._weight_scale is not None:
            # What is summed already follows where this chunk needs a smaller one; a factor of 1 costs nothing.
            scale = torch.minimum(scale, self._weight_scale)
            assert self._d_weight is not None
            self._head.backend.scale_(self._d_weight, scale / self._weight_scale)
        self._weight_scale = scale
        return coefficient * scale
