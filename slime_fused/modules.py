"""The losses as `torch.nn.Module`, thin."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from slime_fused.engine.layout import TokenLayout
from slime_fused.functional.preference import slime_loss
from slime_fused.functional.tokens import linear_cross_entropy
from slime_fused.losses import Slime, SlimeLossConfig
from slime_fused.output import SlimeOutput


class SlimeLoss(nn.Module):
    """`slime_fused.slime_loss` with its options held. Call it with (hidden, weight, labels, bias=, cu_seqlens=).

    Args:
        config: the loss's hyperparameters; None takes the paper's.
        **options: ``shift``, ``ignore_index``, ``logit_scale``, ``logit_softcap``, ``temperature``,
            ``logits_dtype``, ``backend``, ``workspace``, ``tp_group``, ``cp_group``, ``dp_group``. A TypeError for
            any other name.
    """

    def __init__(self, config: SlimeLossConfig | None = None, **options: Any) -> None:
        super().__init__()
        Slime.of(config)  # refuses what is no configuration
        self.config = SlimeLossConfig() if config is None else config
        self.options = _known_options(slime_loss, options)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor | TokenLayout,
        *,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> SlimeOutput:
        """See `slime_fused.slime_loss`."""
        return slime_loss(
            hidden, weight, labels, bias=bias, cu_seqlens=cu_seqlens, config=self.config, **self.options
        )

    def extra_repr(self) -> str:
        """The configuration."""
        return f"{self.config}, {self.options}"


class LinearCrossEntropyLoss(nn.Module):
    """`slime_fused.linear_cross_entropy` with its options held. Call it with (hidden, weight, labels, ...).

    Args:
        **options: ``reduction``, ``label_smoothing``, ``z_loss``, ``shift``, ``ignore_index``, ``logit_scale``,
            ``logit_softcap``, ``temperature``, ``logits_dtype``, ``backend``, ``workspace``, ``tp_group``. A
            TypeError for any other name.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = _known_options(linear_cross_entropy, options)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor | TokenLayout,
        *,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """See `slime_fused.linear_cross_entropy`."""
        return linear_cross_entropy(hidden, weight, labels, bias=bias, cu_seqlens=cu_seqlens, **self.options)

    def extra_repr(self) -> str:
        """The options."""
        return str(self.options)


def _known_options(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options, once all are keyword arguments of ``function`` that a module holds for its calls."""
    given_later = ("bias", "cu_seqlens", "config", "return_stats")
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in given_later]
    for name in options:
        if name not in known:
            raise TypeError(f"{name}: expected an option among {', '.join(known)}, got an unknown one")
    return options
