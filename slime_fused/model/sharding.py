"""A head whose weight is a DTensor during its forward: tensor parallelism over the vocabulary.

`torch.distributed.tensor.parallel.ColwiseParallel` and the plans of `transformers` (``colwise_gather_output``,
``colwise_rep``) cut the head's weight (V, D) into rows, one block per process. That is what ``tp_group`` of the
losses takes, so the loss runs on the shard. The hooks that such a plan puts around the head gather logits, of
which there are none here: the head's forward is called without them.

FSDP2 makes DTensors of weights too, but gathers them before a forward, so that none is seen there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_tensor_parallel(head: Any) -> bool:
    """Whether the weight of a plain head is a DTensor that no hook of FSDP2 will gather."""
    weight = head._parameters.get("weight")
    return is_dtensor(weight) and not _is_fsdp_unit(head)


def check_tensor_parallel(layer: Any, has_hooks: bool) -> None:
    """Whether `split_head` can take the weight of ``layer``, whose forward runs within its hooks or without.

    Raises ValueError for a DTensor that is no block of rows of one group of processes.
    """
    weight = layer.weight
    if not is_dtensor(weight):
        return
    if has_hooks:
        what = "in a unit of its own under FSDP2" if _is_fsdp_unit(layer) else "with an adapter on it"
        raise ValueError(
            f"model: a tensor-parallel output head {what} is not supported; leave lm_head out of the "
            "tensor-parallel plan, or the head out of the adapter and of the FSDP units"
        )
    places = weight.placements
    rows = len(places) == 1 and (places[0].is_replicate() or places[0].is_shard(0) or places[0].is_shard(-2))
    if not rows:
        raise ValueError(
            f"model: expected a tensor-parallel output head sharded over the vocabulary, Shard(0) on a mesh of one "
            f"dimension, got {places} on a mesh of {weight.device_mesh.ndim}; use ColwiseParallel for lm_head, or "
            "leave it out of the tensor-parallel plan"
        )


def whole_hidden(hidden: Tensor) -> Tensor:
    """``hidden`` (S, T, D) as every process of the group holds it whole; its gradient is whole on each of them."""
    if not is_dtensor(hidden):
        return hidden
    from torch.distributed.tensor import Replicate

    whole: Any = hidden
    replicated = [Replicate()] * whole.device_mesh.ndim
    result: Tensor = whole.redistribute(placements=replicated).to_local(grad_placements=replicated)
    return result


def split_head(weight: Any, bias: Any) -> tuple[Tensor, Tensor | None, Any]:
    """What the losses take for a head: ``weight`` and ``bias`` of this process, and ``tp_group``.

    A weight that is no DTensor, or a replicated one, comes back whole, with no group.
    """
    if not is_dtensor(weight):
        return weight, bias, None
    is_whole = weight.placements[0].is_replicate()
    local_bias = bias.to_local() if is_dtensor(bias) else bias
    if is_dtensor(bias) and bias.placements[0].is_replicate() != is_whole:
        raise ValueError(f"model: the head's weight lies as {weight.placements} and its bias as {bias.placements}")
    if local_bias is not None and not is_dtensor(bias) and not is_whole:
        raise ValueError("model: expected the bias of a tensor-parallel output head to be sharded as its weight is")
    return weight.to_local(), local_bias, None if is_whole else weight.device_mesh.get_group()


def is_dtensor(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor, whose module takes long to import."""
    return isinstance(tensor, torch.Tensor) and type(tensor).__name__ == "DTensor"


def _is_fsdp_unit(module: Any) -> bool:
    return any(c.__name__ == "FSDPModule" for c in type(module).__mro__)
