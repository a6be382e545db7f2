"""Kinds of tensors that are no plain memory: lazy, sparse, wrapped by a subclass, traced, or under a transform.

Kernels take addresses, which all of these hide or misrepresent: each is made plain, led around, or refused.
"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_INSTEAD = "call backward() or torch.autograd.grad on the loss; slime_fused.reference follows transforms"


def require_plain(name: str, value: object) -> None:
    """Refuse what is no tensor, and a tensor whose elements do not lie in strided memory: says how to get one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(
            f"{name}: expected one dense tensor, got a nested tensor; pass its values() with cu_seqlens"
        )
    if value.is_quantized:
        raise TypeError(f"{name}: expected a floating dtype, got the quantized {value.dtype}; call dequantize()")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}; call to_dense()")


def materialize(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its memory does not hold its values yet (a lazy negation, lazy zeros)."""
    is_lazy = tensor.is_neg() or tensor._is_zerotensor()
    return tensor.clone() if is_lazy else tensor


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether a call on these is recorded, not run (torch.compile, make_fx, fake tensors): an operator can be."""
    if torch.compiler.is_compiling():
        return True
    mode_of, keys = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    if mode_of(keys.PROXY) is not None or mode_of(keys.FAKE) is not None:
        return True
    # A list, not a generator, whose every step costs a call.
    return True in [isinstance(x, FakeTensor) for x in tensors]


def refuse_transforms(**tensors: Tensor | None) -> None:
    """Refuse what only PyTorch's own operators can follow: torch.func, forward mode, tensors of another class."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"slime_fused losses cannot run under torch.func transforms (grad, vmap, jvp): {_INSTEAD}"
        )
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{name}: slime_fused losses have no forward-mode derivative: {_INSTEAD}")
        if type(tensor) in (Tensor, torch.nn.Parameter) or not is_traceable_wrapper_subclass(tensor):
            continue
        kind = type(tensor).__name__
        # What a collective returns waits by itself when it is read.
        if kind != "AsyncCollectiveTensor":
            how = "full_tensor() or to_local()" if kind == "DTensor" else "dequantize() or its like"
            raise TypeError(f"{name}: expected a plain tensor, got {kind}; call {how}")


def is_batched(tensor: Tensor) -> bool:
    """Whether ``tensor`` stands for several, as under vmap and ``is_grads_batched=True``."""
    keys = torch._C._dispatch_keys(tensor)
    return any(keys.has(name) for name in ("Batched", "FuncTorchBatched"))
