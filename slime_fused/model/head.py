"""Running a function of (hidden states, head weight, bias) inside the model's own `lm_head`.

Fused losses need the head's weight, not its output. Reading ``model.lm_head.weight`` from outside goes wrong when
the head is a unit of its own under FSDP or ZeRO-3: no hook gathers the weight, or none reduces its gradient. Here
the call goes model -> decoder -> `lm_head.__call__`, so every hook that surrounds a plain forward surrounds the
loss too, and what leaves the head is a dictionary of tensors, as those hooks expect. For LoRA on the head the same
holds of its parts, of which PEFT's own FSDP policy makes units: the adapter's matrices come out of calls of
`lora_A` and `lora_B`, and the loss runs inside a call of the base layer.

`attach_head` adds the keyword ``head_call`` to the model's forward and to the head's. Without it both behave as
before: generation, saving and evaluation by other means are untouched.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class HeadCall(Protocol):
    """What to do in the head. The result may hold tensors only, for the sake of sharding hooks."""

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """``hidden`` (S, T, D), ``weight`` (V, D), ``bias`` (V,) or None."""


def attach_head(model: nn.Module) -> None:
    """Let ``model(..., head_call=call)`` return ``call(hidden, weight, bias)``, plus ``aux_loss`` for a router's.

    ``model`` is a causal language model of `transformers`, bare or wrapped by PEFT; attach after wrapping and
    before the model is prepared for a device or sharded. A second call changes nothing.

    Raises TypeError for a model without an output head, ValueError for a head that is no plain matrix product.
    """
    base: Any = unwrap_peft(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        raise TypeError(f"model: expected a causal language model with an output head, got {type(base).__name__}")
    for layer in _matrix_layers(head):
        _check_layer(layer)
        if _is_lora(layer):
            _patch_lora(layer)
        else:
            _patch(layer, _matrix_forward)
    _patch(base, _model_forward)


def unwrap_peft(model: Any) -> Any:
    """The `transformers` model inside a PEFT wrapper, or ``model`` itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _matrix_layers(head: Any) -> Iterator[nn.Module]:
    """The modules whose forward is the matrix product: behind modules_to_save there is one per adapter."""
    if hasattr(head, "modules_to_save"):
        yield from head.modules_to_save.values()
        yield head.original_module
    else:
        yield head


def _check_layer(layer: Any) -> None:
    if _is_lora(layer):
        if getattr(layer, "lora_variant", None):
            variants = sorted(type(v).__name__ for v in layer.lora_variant.values())
            raise ValueError(
                f"peft_config: the output head carries the LoRA variant {variants} (DoRA and the like), whose "
                "weight is no sum of two matrices; take the head out of target_modules, or use plain LoRA there"
            )
    elif not hasattr(layer, "token_adapter") and not isinstance(layer, nn.Linear):
        raise ValueError(
            f"model: expected an output head that is a torch.nn.Linear, got {type(layer).__name__}; "
            "train with loss_impl='naive'"
        )
    weight = getattr(layer, "base_layer", layer).weight if _is_lora(layer) else layer.weight
    # FSDP and ZeRO-3 may have flattened or emptied the parameter by now; a packed one is no floating-point number.
    if not weight.is_floating_point():
        raise ValueError(
            f"model: expected an output head with floating-point weights, got {weight.dtype}; "
            "exclude the head from quantisation"
        )


def _patch_lora(layer: Any) -> None:
    _patch(layer, _lora_forward)
    _patch(layer.get_base_layer(), _matrix_forward)
    for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
        _patch(factor, _factor_forward)


def _patch(module: Any, replacement: Callable[..., Any]) -> None:
    """Let ``replacement(plain, module, ...)`` be the forward of ``module``, where ``plain`` is the one it had."""
    if "_slime_plain_forward" in module.__dict__:
        return
    plain = module.forward

    # The signature stays visible: generation and the base trainer inspect it.
    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(plain, self, *args, **kwargs)

    module._slime_plain_forward = plain
    module.forward = types.MethodType(forward, module)


def _model_forward(
    plain: Callable[..., Any],
    base: Any,
    *args: Any,
    head_call: HeadCall | None = None,
    router_weight: float | None = None,
    **kwargs: Any,
) -> Any:
    """``router_weight``: of the router's loss, 0 for none; None is what the model's config says."""
    if head_call is None:
        return plain(*args, **kwargs)
    kwargs.pop("labels", None)
    routed = bool(getattr(base.config.get_text_config(), "output_router_logits", False))
    routed = routed if router_weight is None else router_weight != 0
    if routed:
        kwargs["output_router_logits"] = True
    outputs = _decoder(base)(*args, **{**kwargs, "use_cache": False, "return_dict": True})
    result = base.get_output_embeddings()(outputs.last_hidden_state, head_call=head_call)
    if routed:
        result = {**result, "aux_loss": _router_loss(base, outputs, kwargs.get("attention_mask"), router_weight)}
    return result


def _decoder(base: Any) -> Any:
    """The model under the head, with whatever encodes its other inputs."""
    # Releases before 5 give Gemma3ForCausalLM the prefix of its multimodal sibling, and so itself as base model.
    return base.base_model if base.base_model is not base else base.get_decoder()


def _matrix_forward(
    plain: Callable[..., Any],
    layer: Any,
    hidden: Tensor,
    *args: Any,
    head_call: HeadCall | None = None,
    deltas: Sequence[Tensor] = (),
    **kwargs: Any,
) -> Any:
    """Of a plain head, or of the base layer under LoRA, to whose weight ``deltas`` are added."""
    if head_call is None:
        return plain(hidden, *args, **kwargs)
    weight = layer.weight
    # PEFT's wrapper for trainable tokens multiplies without a bias and answers no question about one.
    bias = None if hasattr(layer, "token_adapter") else layer.bias
    if type(weight).__name__ == "DTensor":
        raise ValueError(
            "model: expected the whole weight of the output head during its forward, got a DTensor (tensor "
            "parallelism), which this trainer does not support; leave lm_head out of the tensor-parallel plan"
        )
    for delta in deltas:
        weight = weight + delta.to(weight.dtype)
    return head_call(hidden, weight, bias)


def _lora_forward(
    plain: Callable[..., Any], layer: Any, *args: Any, head_call: HeadCall | None = None, **kwargs: Any
) -> Any:
    """``head_call`` on the weight ``W + scaling * B A``, which costs one more matrix of W's size.

    Raises ValueError where no such matrix exists: LoRA dropout, an adapter bias.
    """
    if head_call is None:
        return plain(*args, **kwargs)
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


def _is_lora(layer: nn.Module) -> bool:
    return hasattr(layer, "lora_A") and hasattr(layer, "get_delta_weight")


def _router_loss(base: Any, outputs: Any, attention_mask: Tensor | None, weight: float | None) -> Tensor:
    """The load-balancing loss of a mixture-of-experts model; its own forward's weight where ``weight`` is None."""
    balance = getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)
    config = base.config.get_text_config()
    own = getattr(base, "router_aux_loss_coef", getattr(config, "router_aux_loss_coef", None))
    coefficient = own if weight is None else weight
    if balance is None or coefficient is None:
        raise ValueError(
            f"model: output_router_logits is set, but {type(base).__name__} has no load-balancing loss known here; "
            "set config.output_router_logits=False to train without it"
        )
    # Every such model sets both in its constructor, from config entries of various names.
    loss = balance(outputs.router_logits, base.num_experts, base.num_experts_per_tok, attention_mask)
    return float(coefficient) * torch.as_tensor(loss)
