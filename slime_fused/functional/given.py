"""What `preference_loss` and `token_policy_loss` share: the loss as a value, what is given for it, and its call."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from slime_fused.autograd import operators
from slime_fused.autograd.tensors import is_traced, materialize, require_plain
from slime_fused.autograd.unit_losses import UnitLossFunction
from slime_fused.backends.base import acc_dtype
from slime_fused.engine.calls import LinearRequest
from slime_fused.engine.layout import check_pairs
from slime_fused.engine.units import GIVEN_PER_SEQUENCE, GIVEN_PER_TOKEN, Loss
from slime_fused.output import TokenStatistics

_ARGUMENTS = (*GIVEN_PER_SEQUENCE, *GIVEN_PER_TOKEN, "kl_baseline", "loss_weights", "advantages")
"""Keys of what a loss is given by arguments."""


def run_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    request: LinearRequest,
    loss: Loss,
    given: Mapping[str, Tensor],
    asked: tuple[str, ...] = (),
) -> tuple[Tensor, ...]:
    """The tensors of `UnitOutputs`, (K, N_all) as (K, *labels.shape).

    Checks what shows of the sequences and of what is given.
    """
    if request.rows.cu_seqlens is None and hidden.dim() != 3:
        raise ValueError(f"hidden: expected (S, T, D), or (N, D) with cu_seqlens, got shape {tuple(hidden.shape)}")
    loss.check_given(given)
    if is_traced(hidden, weight, request.rows.labels):
        options = operators.flat_request(request)
        rows = request.rows
        if loss.unit == "pair" and request.options.cp_group is None:  # else once the others told what they hold
            check_pairs(rows.num_sequences)
        names, values = " ".join(given), list(given.values())
        outputs: tuple[Tensor, ...] = operators.unit_loss_op(
            hidden, weight, bias, rows.labels, rows.cu_seqlens, loss.key, values, names, " ".join(asked), *options
        )
        return outputs[:4]
    *of_batch, tokens = UnitLossFunction.apply(hidden, weight, bias, request, loss, given, asked)
    return *of_batch, tokens.view(len(asked), *request.rows.labels.shape)


def token_statistics(tokens: Tensor, asked: tuple[str, ...]) -> TokenStatistics:
    """What was asked for of each token, by name, from (K, ...)."""
    by_name = dict(zip(asked, tokens.unbind(), strict=True))
    return TokenStatistics(**{name: x > 0 if name == "is_top1" else x for name, x in by_name.items()})


class GivenChecks:
    """Refuses what does not fit a batch; what fits comes back detached, in the batch's accumulation dtype."""

    def __init__(self, request: LinearRequest, hidden: Tensor) -> None:
        self._labels = request.rows.labels
        self._sequences = request.rows.num_sequences
        self._dtype = acc_dtype(hidden.dtype)

    def per_token(self, name: str, value: Tensor) -> Tensor:
        """In the shape of the labels."""
        return self._of_shape(name, value, [tuple(self._labels.shape)], "the shape of labels")

    def per_sequence(self, name: str, value: Tensor) -> Tensor:
        """(S,)"""
        return self._of_shape(name, value, [(self._sequences,)], "one number per sequence")

    def per_pair(self, name: str, value: Tensor) -> Tensor:
        """(P,)"""
        return self._of_shape(name, value, [(self._sequences // 2,)], "one number per pair")

    def per_unit(self, name: str, value: Tensor, loss: Loss) -> Tensor:
        """One for each of the loss's units."""
        checks = {"pair": self.per_pair, "sequence": self.per_sequence, "token": self.per_token}
        return checks[loss.unit](name, value)

    def per_sequence_or_token(self, name: str, value: Tensor) -> Tensor:
        """(S,), or the shape of the labels."""
        shapes = [(self._sequences,), tuple(self._labels.shape)]
        return self._of_shape(name, value, shapes, "one number per sequence or per token")

    def _any_of(self, name: str, value: Tensor, loss: Loss) -> Tensor:
        """A scalar, one number per pair where there are pairs, per sequence, or per token."""
        shapes = [(), (self._sequences,), tuple(self._labels.shape)]
        shapes += [(self._sequences // 2,)] if loss.unit == "pair" else []
        return self._of_shape(name, value, shapes, "a scalar, or one number per unit, sequence or token")

    def references(
        self, kind: str, chosen: Tensor | None, rejected: Tensor | None, both: Tensor | None
    ) -> Tensor | None:
        """(S,) of the ``kind`` "sum" or "mean", from either side's (P,) or from all; None where none are given."""
        names = [f"ref_{which}{kind}_logps" for which in ("chosen_", "rejected_", "")]
        if both is not None:
            if chosen is not None or rejected is not None:
                raise ValueError(f"{names[2]}: expected either it or {names[0]} and {names[1]}, got both")
            return self.per_sequence(names[2], both)
        if chosen is None and rejected is None:
            return None
        if chosen is None or rejected is None:
            missing, got = names[:2] if chosen is None else names[1::-1]
            raise ValueError(f"{missing}: expected it together with {got}, got none")
        return torch.cat([self.per_pair(names[0], chosen), self.per_pair(names[1], rejected)])

    def flags(self, name: str, value: Tensor) -> Tensor:
        """(S,) bool."""
        require_plain(name, value)
        if value.dtype != torch.bool:
            raise TypeError(f"{name}: expected a bool tensor, got {value.dtype}")
        return self.per_sequence(name, value)

    def extras(self, extra: Mapping[str, Tensor] | None, loss: Loss) -> dict[str, Tensor]:
        """What a loss of one's own is given beside the arguments that have a name."""
        if not isinstance(extra, (Mapping, type(None))):
            raise TypeError(f"extra: expected a mapping of names to tensors, got {type(extra).__name__}")
        for name in extra or {}:
            if not isinstance(name, str) or not name.isidentifier() or name in _ARGUMENTS:
                raise ValueError(f"extra: expected names of its own that are identifiers, got {name!r}")
        return {name: self._any_of(f"extra[{name!r}]", value, loss) for name, value in (extra or {}).items()}

    def scalar(self, name: str, value: Tensor | float) -> Tensor:
        """A number."""
        if isinstance(value, Real) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                raise ValueError(f"{name}: expected a number within float64's range, got {value!r}") from None
            return self._labels.new_full((), number, dtype=self._dtype)
        return self._of_shape(name, value, [()], "a number")

    def _of_shape(self, name: str, value: Any, shapes: list[tuple[int, ...]], what: str) -> Tensor:
        require_plain(name, value)
        if not any(_is_same(value.shape, shape) for shape in shapes):
            wanted = " or ".join(str(shape) for shape in shapes)
            raise ValueError(f"{name}: expected shape {wanted} ({what}), got {tuple(value.shape)}")
        if value.device != self._labels.device:
            raise ValueError(f"{name}: expected on {self._labels.device} like hidden, got {value.device}")
        if value.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {value.dtype}")
        value = value.detach()
        if not is_traced(value):
            # Autograd cannot save an inference tensor, and a formula may want to.
            value = value.clone() if value.is_inference() else materialize(value)
        return value.to(self._dtype) if value.is_floating_point() else value


def _is_same(shape: torch.Size, expected: tuple[int, ...]) -> bool:
    """Compared one by one: a tracer keeps sizes symbolic, and does not look for tuples of them in a list."""
    return len(shape) == len(expected) and all(a == b for a, b in zip(shape, expected, strict=True))
