"""Gradients on their way out: which dtype they wait in, and the factor that reaches them in backward.

A loss that forms its gradients in the forward pass does not know yet what they will be multiplied with. In float16
no fixed power of two can stand in for it: a mean's gradients lie near the subnormals, a sum's near 65504, and a
loss scaler may follow either. So float16 gradients are summed and kept in float32 until backward, and rounded once,
with their factor. Other dtypes have float32's range and wait in their own.

Gradients of float32 tensors that autocast has cast wait in float32. What rounds them before is a product that gives
16 bits (bfloat16's on the CPU), and R W where it waits for its coefficients in bfloat16 (log-probs, "resweep").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from slime_fused.backends.base import Backend, HeadTransform, TokenLoss, acc_dtype
from slime_fused.engine import products
from slime_fused.engine.mix import Mix
from slime_fused.engine.row_results import RowResults

_LARGEST_EXPONENT = 14
"""Scaled float16 operands are below 2^15: half of what float16 holds."""
_MORE_FOR_CERTAIN_ROWS = 12
_EXPONENT_RANGE = 100
"""Scales are within 2^-100 and 2^100, so that neither they nor their inverses leave float32."""


def waiting_dtype(dtype: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """What the gradient of a tensor of ``dtype`` waits in, where the products run in ``compute``."""
    return torch.float32 if torch.float16 in (dtype, compute) else dtype


@dataclass(frozen=True)
class GradientDtypes:
    """The dtypes of the caller's tensors, which their gradients get in the end; None where there is no tensor."""

    hidden: torch.dtype
    weight: torch.dtype
    bias: torch.dtype | None

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> GradientDtypes:
        """Those of the inputs."""
        return cls(hidden.dtype, weight.dtype, None if bias is None else bias.dtype)

    def waiting(self, compute: torch.dtype) -> GradientDtypes:
        """What the three wait in."""
        return GradientDtypes(
            waiting_dtype(self.hidden, compute),
            waiting_dtype(self.weight, compute),
            None if self.bias is None else waiting_dtype(self.bias, compute),
        )

    def __iter__(self) -> Iterator[torch.dtype | None]:
        return iter((self.hidden, self.weight, self.bias))


@dataclass(frozen=True)
class Gradients:
    """Gradients of hidden, weight and bias; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    weight_scale: Tensor | None = None
    """0-dim float32: ``weight`` is this many times the gradient. None is 1."""

    def times(self, factor: Tensor | None, dtypes: GradientDtypes, backend: Backend, *, keeps: bool) -> Gradients:
        """The gradients times a 0-dim ``factor`` (None: 1), in the dtypes of the caller's tensors.

        Where a dtype is right already this is done in place; ``keeps`` leaves these as they are.
        """
        weight_factor = factor
        if self.weight_scale is not None:
            weight_factor = self.weight_scale.reciprocal() if factor is None else factor / self.weight_scale
        factors = (factor, weight_factor, factor)
        grads = (self.hidden, self.weight, self.bias)
        return Gradients(
            *(
                None if grad is None or dtype is None else _times(grad, number, dtype, backend, keeps)
                for grad, number, dtype in zip(grads, factors, dtypes, strict=True)
            )
        )


def _times(grad: Tensor, factor: Tensor | None, dtype: torch.dtype, backend: Backend, keeps: bool) -> Tensor:
    if factor is None:
        return grad.to(dtype)
    factor = factor.to(acc_dtype(grad.dtype))
    if grad.dtype != dtype:
        return products.scaled_to(grad, factor, dtype)
    grad = grad.clone() if keeps else grad
    backend.scale_(grad, factor)
    return grad


def float16_gain(
    stats: RowResults, transform: HeadTransform, token_loss: TokenLoss, mix: Mix | None = None
) -> Tensor:
    """(M,) powers of two that bring the residuals of rows with these statistics near 2^14 in float16.

    A probability of 1e-8 is below float16's least number, though a loss scaler may lift its gradient to an ordinary
    one; and a logit scale of 1e5 leaves float16 at the other end. No entry of a row's residual is above ::

        |scale| / temperature ((1 - eps) (1 - p_label) + eps + 2 z_loss |lse|)

    and with a ``mix`` none above `Mix.bound` of that. A row whose bound is small gets at most 2^12 more than
    others: its coefficient shrinks by as much, which meets the hidden states in float16 too.
    """
    eps, lse = token_loss.label_smoothing, stats.row_max + stats.row_sum.log()
    entry = (1 - eps) * -torch.expm1(stats.logp) + eps + 2 * token_loss.z_loss * lse.abs()
    if mix is not None:
        entry = mix.bound(entry, stats)
    bound = entry * transform.slope_bound
    usual = _LARGEST_EXPONENT - math.frexp(transform.slope_bound)[1]
    return _power_of_two_below(bound, _LARGEST_EXPONENT, usual + _MORE_FOR_CERTAIN_ROWS)


def float16_scale(rows: Tensor, coefficient: Tensor) -> Tensor:
    """A power of two that brings the largest entry of ``coefficient * rows`` to [2^14, 2^15), as a 0-dim tensor.

    ``rows`` (M, D) float16, ``coefficient`` (M,) float32. Nothing then overflows, and entries 2^29 times smaller
    are still normal numbers. Nothing waits for the device. 1 where an entry is not finite.
    """
    if rows.shape[0] == 0:
        return coefficient.new_ones(())
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, dtype=torch.float32).mul_(coefficient.abs()).amax()
    return _power_of_two_below(largest, _LARGEST_EXPONENT + 1, _EXPONENT_RANGE)


def _power_of_two_below(values: Tensor, limit: int, most: int) -> Tensor:
    """Powers of two, 2^``most`` at most, that leave each of ``values`` (>= 0) below 2^``limit``, nearly.

    2^``most`` for 0, and 1 for what is not finite.
    """
    exponent = (limit - torch.frexp(values).exponent).clamp_(max=most).masked_fill_(values == 0, most)
    exponent.clamp_(-_EXPONENT_RANGE, _EXPONENT_RANGE)
    return torch.where(torch.isfinite(values), torch.ldexp(torch.ones_like(values), exponent), 1.0)
