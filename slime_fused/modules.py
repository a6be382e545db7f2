"""The losses as `torch.nn.Module`, thin."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slime_fused.config import SlimeLossConfig
from slime_fused.functional import linear_cross_entropy, slime_loss
from slime_fused.output import SlimeOutput


class SlimeLoss(nn.Module):
    """`slime_fused.slime_loss` with its options held. Call it with (hidden, weight, labels, bias=, cu_seqlens=).

    Args:
        config: the loss's hyperparameters; None takes the paper's.
        **options: ``shift``, ``ignore_index``, ``logit_scale``, ``logit_softcap``, ``backend``, ``workspace``,
            ``tp_group``, ``cp_group``, ``dp_group``.
    """

    def __init__(self, config: SlimeLossConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.config = config or SlimeLossConfig()
        self.options = options

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
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
            ``logit_softcap``, ``backend``, ``workspace``, ``tp_group``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """See `slime_fused.linear_cross_entropy`."""
        return linear_cross_entropy(hidden, weight, labels, bias=bias, cu_seqlens=cu_seqlens, **self.options)

    def extra_repr(self) -> str:
        """The options."""
        return str(self.options)
