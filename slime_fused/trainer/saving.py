"""The whole weights of a model under FSDP1, without FSDP's own state dicts.

Those are no way for adapters: PEFT asks modules of its own for their state on the one process that writes, and
FSDP1 would gather it from all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from slime_fused.model.wrappers import TRANSPARENT


@contextmanager
def whole_weights(model: nn.Module, *, is_writer: bool) -> Iterator[dict[str, Tensor]]:
    """Parameters and saved buffers of ``model``, on the CPU, by the names that it has without FSDP1.

    Collective. Empty on processes that are not ``is_writer``. Within the block the model names its modules without
    FSDP1, and these answer `state_dict` with what they hold themselves, and wait for nobody: all that PEFT asks.
    """
    weights: dict[str, Tensor] = {}
    changed: list[tuple[nn.Module, str]] = []

    def answer(module: nn.Module, name: str, function: Any) -> None:
        vars(module)[name] = function
        changed.append((module, name))

    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        if is_writer:
            # A copy on a CPU too, where moving it there would copy nothing and FSDP1 frees what it has gathered.
            weights = {_plain(name): value.detach().to("cpu", copy=True) for name, value in _saved(model)}
            for prefix, module in model.named_modules():
                if isinstance(module, FullyShardedDataParallel):
                    own = {_plain(name): weights[_plain(f"{prefix}.{name}")] for name, _ in _saved(module)}
                    answer(module, "state_dict", functools.partial(_copy, own))
            whole: Any = model.module
            answer(whole, "named_modules", functools.partial(_plainly_named, whole.named_modules))
    try:
        yield weights
    finally:
        for module, name in changed:
            del vars(module)[name]


def _saved(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that a state dict holds."""
    yield from module.named_parameters()
    for prefix, part in module.named_modules():
        for name, value in part.named_buffers(prefix=prefix, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, value


def _copy(weights: dict[str, Tensor], *args: object, **kwargs: object) -> dict[str, Tensor]:
    return dict(weights)


def _plainly_named(named_modules: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, module in named_modules(*args, **kwargs):
        yield _plain(name), module


def _plain(name: str) -> str:
    """``name`` without what the wrappers around modules put into it."""
    return ".".join(part for part in name.split(".") if part and part not in TRANSPARENT)
