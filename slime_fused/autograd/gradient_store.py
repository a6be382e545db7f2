"""Gradients that were formed in forward, until backward hands them out; and what no backward here can follow."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slime_fused.autograd.tensors import is_batched
from slime_fused.backends.base import Backend
from slime_fused.engine.gradients import GradientDtypes, Gradients


class GradientStore:
    """Gradients formed in forward, handed out by backward without a copy unless the graph is kept."""

    def __init__(self, gradients: Gradients, dtypes: GradientDtypes, backend: Backend) -> None:
        self._gradients: Gradients | None = gradients
        self._dtypes = dtypes
        self._backend = backend

    def hand_out(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(d_hidden, d_weight, d_bias) times the scalar ``upstream``."""
        refuse_transformed_backward(upstream)
        stored = self._gradients
        if stored is None:
            raise RuntimeError(
                "this loss formed its gradients in the forward pass and handed them out in the first backward(); "
                "call that with retain_graph=True to go through the graph again"
            )
        keeps = graph_is_kept()
        if not keeps:
            # The store lets go of the tensors, so that autograd can adopt them as .grad instead of copying.
            self._gradients = None
        gradients = stored.times(upstream, self._dtypes, self._backend, keeps=keeps)
        return gradients.hidden, gradients.weight, gradients.bias


def refuse_transformed_backward(upstream: Tensor) -> None:
    """Backward runs with gradients enabled only under create_graph=True; ``upstream`` may stand for a batch."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "slime_fused losses are not twice differentiable: backward was called with create_graph=True; "
            "use slime_fused.reference for second derivatives"
        )
    if is_batched(upstream):
        raise RuntimeError(
            "slime_fused losses take one upstream gradient at a time, got a batch (is_grads_batched=True or vmap): "
            "call torch.autograd.grad(..., retain_graph=True) for each; slime_fused.reference takes batches"
        )


def graph_is_kept() -> bool:
    """Whether the running backward was called with retain_graph=True."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def like_hidden(gradients: Gradients, hidden: Tensor) -> Gradients:
    """With d_hidden in the shape of ``hidden``."""
    if gradients.hidden is None:
        return gradients
    return replace(gradients, hidden=gradients.hidden.view(hidden.shape))
