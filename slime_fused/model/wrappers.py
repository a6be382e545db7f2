"""The modules that others put around a model or around its head, and how to see through them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Under these names torch.compile, FSDP1 and activation checkpointing keep the module that they wrap."""

_PARALLEL = ("torch.nn.parallel", "deepspeed")
"""Packages whose wrappers (DistributedDataParallel, a DeepSpeed engine) call the model ``module``."""


def unwrap_module(module: Any) -> Any:
    """What is inside torch.compile, FSDP1, checkpointing, DistributedDataParallel or a DeepSpeed engine."""
    while True:
        inner = next((module._modules[name] for name in TRANSPARENT if name in module._modules), None)
        if inner is None and type(module).__module__.startswith(_PARALLEL):
            inner = module.module
        if inner is None:
            return module
        module = inner


def unwrap_peft(model: Any) -> Any:
    """The `transformers` model inside a PEFT wrapper, or ``model`` itself."""
    if not hasattr(model, "peft_config"):
        return model
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    # PeftMixedModel lacks the method. Adapters added by `transformers` itself leave the model as it is.
    is_wrapper = type(model).__module__.startswith("peft.")
    return model.base_model.model if is_wrapper else model


def matrix_layers(head: Any) -> Iterator[Any]:
    """The modules whose forward is the head's matrix product: behind modules_to_save there is one per adapter."""
    head = unwrap_module(head)
    if hasattr(head, "modules_to_save"):
        yield from map(unwrap_module, head.modules_to_save.values())
        yield unwrap_module(head.original_module)
    else:
        yield head


def base_layer(layer: Any) -> Any:
    """The layer of the model itself under PEFT's wrappers of one."""
    layer = unwrap_module(getattr(layer, "token_adapter", layer))
    return unwrap_module(layer.get_base_layer()) if hasattr(layer, "get_base_layer") else layer


def peft_method(layer: Any) -> str | None:
    """The folder of `peft.tuners` that the class of ``layer`` comes from, such as "lora", or None."""
    parts = type(layer).__module__.split(".")
    return parts[2] if parts[:2] == ["peft", "tuners"] else None


def is_plain_lora(layer: Any) -> bool:
    """Whether ``layer`` is LoRA's wrapper of an `nn.Linear`; a variant such as DoRA may yet change the product."""
    return any((c.__module__, c.__name__) == ("peft.tuners.lora.layer", "Linear") for c in type(layer).__mro__)


def is_token_adapter(layer: Any) -> bool:
    """Whether ``layer`` retrains chosen rows of the head: PEFT's trainable tokens, bare or inside their wrapper."""
    return peft_method(layer) == "trainable_tokens" or hasattr(layer, "token_adapter")
