"""The layers of a model's head, each with a forward that can hand its weight to a `HeadCall`.

A layer is the plain `nn.Linear`, or what PEFT puts in its place: one linear layer per adapter (modules_to_save),
LoRA's wrapper, or the one for trainable tokens. For LoRA the adapter's matrices come out of calls of `lora_A` and
`lora_B`, and the loss runs inside a call of the base layer: PEFT's own FSDP policy makes units of these parts.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slime_fused.model.sharding import check_tensor_parallel, whole_hidden
from slime_fused.model.wrappers import (
    base_layer,
    is_plain_lora,
    is_token_adapter,
    matrix_layers,
    peft_method,
    unwrap_module,
)

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_WAYS_OUT = (
    "take the head out of target_modules, train a copy of it (modules_to_save=['lm_head']), use plain LoRA there, "
    "or train with loss_impl='naive'"
)


class HeadCall(Protocol):
    """What to do in the head. The result may hold tensors only, for the sake of sharding hooks."""

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """``hidden`` (S, T, D), ``weight`` (V, D), ``bias`` (V,) or None.

        Of a tensor-parallel head the last two are DTensors, which `slime_fused.model.sharding.split_head` takes.
        """


def attach_layers(head: Any) -> None:
    """Let the layers of ``head`` take the keyword ``head_call``. Those that do already are left as they are.

    Raises ValueError for a layer that is no plain matrix product.
    """
    for layer in matrix_layers(head):
        if runs_head_calls(layer):
            continue
        _check_layer(layer)
        if is_plain_lora(layer):
            patch_forward(layer, _lora_forward)
        else:
            patch_forward(layer, _matrix_forward)
    for layer in filter(is_plain_lora, matrix_layers(head)):
        # An adapter that came later has brought new factors.
        patch_forward(unwrap_module(layer.get_base_layer()), _matrix_forward)
        for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
            patch_forward(unwrap_module(factor), _factor_forward)


def runs_head_calls(module: Any) -> bool:
    """Whether the forward of ``module`` is one by `patch_forward`, or a wrapper that names it as what it wraps."""
    forward = module.forward
    while forward is not None:
        if getattr(forward, "_runs_head_calls", False):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def patch_forward(module: Any, replacement: Callable[..., Any]) -> None:
    """Let ``replacement(plain, module, ...)`` be the forward of ``module``, where ``plain`` is the one it had."""
    if runs_head_calls(module):
        return
    plain = module.forward
    # A copy of the module (modules_to_save, a reference model) takes its forward along, and must not run it on us.
    is_own = getattr(plain, "__self__", None) is module
    plain = plain.__func__ if is_own else plain

    # The signature stays visible: generation and the base trainer inspect it.
    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(functools.partial(plain, self) if is_own else plain, self, *args, **kwargs)

    forward._runs_head_calls = True  # type: ignore[attr-defined]
    module.forward = types.MethodType(forward, module)


def _check_layer(layer: Any) -> None:
    base = base_layer(layer)
    _check_quantised(base)
    variants = sorted(type(v).__name__ for v in (getattr(layer, "lora_variant", None) or {}).values())
    if variants:
        raise ValueError(
            f"peft_config: the output head carries the LoRA variant {variants} (DoRA and the like), whose "
            f"weight is no sum of two matrices; {_WAYS_OUT}"
        )
    method = peft_method(layer)
    if method is not None and not is_plain_lora(layer) and not is_token_adapter(layer):
        raise ValueError(
            f"peft_config: the output head carries an adapter of the kind {method} ({type(layer).__name__}), with "
            f"which no loss is fused; {_WAYS_OUT}"
        )
    if not isinstance(base, nn.Linear):
        raise ValueError(
            f"model: expected an output head that is a torch.nn.Linear, got {type(base).__name__}; "
            "train with loss_impl='naive'"
        )


def _check_quantised(base: Any) -> None:
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor):
        return
    # FSDP and ZeRO-3 may have flattened or emptied the parameter by now: only its kind can be asked for. The
    # quantisers' own tensor classes claim the dtype that they stand for.
    is_plain = type(weight).__module__.startswith(("torch.", "deepspeed.")) or type(weight) is Tensor
    if weight.dtype not in _FLOATS or not is_plain:
        kind = weight.dtype if is_plain else f"{type(weight).__module__}.{type(weight).__name__}"
        raise ValueError(
            f"model: expected an output head with floating-point weights, got {kind} (quantised): the fused loss "
            "reads the weight itself; exclude the head from quantisation (llm_int8_skip_modules=['lm_head'], "
            "modules_to_not_convert) or train with loss_impl='naive'"
        )


def _matrix_forward(
    plain: Callable[..., Any],
    layer: Any,
    hidden: Tensor,
    *args: Any,
    head_call: HeadCall | None = None,
    deltas: Sequence[Tensor] = (),
    has_hooks: bool = True,
    **kwargs: Any,
) -> Any:
    """Of a plain head, or of the base layer under LoRA, to whose weight ``deltas`` are added."""
    if head_call is None:
        return plain(hidden, *args, **kwargs)
    check_tensor_parallel(layer, has_hooks)
    weight, bias = _token_weight(layer) if is_token_adapter(layer) else (layer.weight, layer.bias)
    for delta in deltas:
        weight = weight + delta.to(weight.dtype)
    return head_call(whole_hidden(hidden), weight, bias)


def _token_weight(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The weight with its retrained rows, and the bias, which PEFT leaves out unless it runs the base layer."""
    adapter = getattr(layer, "token_adapter", layer)
    base = adapter.get_base_layer()
    if adapter.disable_adapters or not adapter.active_adapters:
        if adapter.merged:
            adapter.unmerge()
        return base.weight, base.bias
    if adapter.merged:
        return base.weight, base.bias
    return adapter.get_merged_weights(adapter.active_adapters), None


def _lora_forward(
    plain: Callable[..., Any], layer: Any, *args: Any, head_call: HeadCall | None = None, **kwargs: Any
) -> Any:
    """``head_call`` on the weight ``W + scaling * B A``, which costs one more matrix of W's size.

    Raises ValueError where no such matrix exists: LoRA dropout, an adapter bias, an adapter per sequence.
    """
    if head_call is None:
        return plain(*args, **kwargs)
    if kwargs.get("adapter_names") is not None:
        raise ValueError("adapter_names: an adapter per sequence on the output head is not supported")
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    adapters = [] if layer.merged or layer.disable_adapters else layer.active_adapters
    deltas = []
    for name in adapters:
        if name not in layer.lora_A:
            continue
        dropout = layer.lora_dropout[name]
        if layer.training and getattr(dropout, "p", 0.0) > 0.0:
            raise ValueError(
                f"peft_config: lora_dropout={dropout.p} on the output head cannot be fused; "
                "set lora_dropout=0 or disable_dropout=True"
            )
        if layer.lora_bias.get(name):
            raise ValueError("peft_config: lora_bias=True on the output head is not supported; set it to False")
        a = layer.lora_A[name](weight_only=True)  # (r, D)
        b = layer.lora_B[name](weight_only=True)  # (V, r)
        deltas.append(layer.scaling[name] * (b @ a))
    return layer.get_base_layer()(*args, head_call=head_call, deltas=deltas)


def _factor_forward(
    plain: Callable[..., Any], factor: Any, *args: Any, weight_only: bool = False, **kwargs: Any
) -> Any:
    """``weight_only`` gives a copy of the weight: FSDP may free the weight itself when this call ends."""
    return factor.weight.clone() if weight_only else plain(*args, **kwargs)
