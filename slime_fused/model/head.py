"""Running a function of (hidden states, head weight, bias) inside the model's own `lm_head`.

Fused losses need the head's weight, not its output. Reading ``model.lm_head.weight`` from outside goes wrong when
the head is a unit of its own under FSDP or ZeRO-3: no hook gathers the weight, or none reduces its gradient. Here
the call goes model -> decoder -> `lm_head.__call__`, so every hook that surrounds a plain forward surrounds the
loss too, and what leaves the head is a dictionary of tensors, as those hooks expect.

`attach_head` adds the keyword ``head_call`` to the model's forward and to the head's (`layers.py`). Without it both
behave as before: generation, saving and evaluation by other means are untouched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slime_fused.model.layers import HeadCall, attach_layers, patch_forward
from slime_fused.model.sharding import is_tensor_parallel
from slime_fused.model.wrappers import unwrap_module, unwrap_peft

__all__ = ["HeadCall", "attach_head", "unwrap_peft"]

_RAN = "_slime_head_call_ran"

_UNFUSED_METHODS = ("SHADOW", "XLORA")
"""Methods of PEFT that a decoder called by itself does not run."""


def attach_head(model: nn.Module) -> None:
    """Let ``model(..., head_call=call)`` return ``call(hidden, weight, bias)``, plus ``aux_loss`` for a router's.

    ``model`` is a causal language model of `transformers`, bare or wrapped by PEFT. Attach before the model is
    prepared for a device or sharded. A second call changes nothing, unless something has replaced the model's
    forward since (a patch by Liger): it then goes around the new one. An adapter may be added later.

    Raises TypeError for a model without an output head, ValueError for a head that is no plain matrix product.
    """
    base = unwrap_peft(unwrap_module(model))
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        raise TypeError(f"model: expected a causal language model with an output head, got {type(base).__name__}")
    _check_methods(getattr(unwrap_module(model), "peft_config", {}))
    attach_layers(head)
    patch_forward(base, _model_forward)
    if _RAN not in base.__dict__:
        setattr(base, _RAN, False)
        base.register_forward_pre_hook(_forget_head_call)
        base.register_forward_hook(_require_head_call, with_kwargs=True)


def _check_methods(peft_config: Any) -> None:
    for config in peft_config.values() if isinstance(peft_config, dict) else ():
        method = getattr(getattr(config, "peft_type", None), "value", None)
        if method in _UNFUSED_METHODS:
            raise ValueError(
                f"peft_config: {method} puts more than hidden states between the model's layers, or runs the model "
                "twice, so that no loss is fused; train with loss_impl='naive'"
            )


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
    setattr(base, _RAN, True)
    kwargs.pop("labels", None)
    routed = bool(getattr(base.config.get_text_config(), "output_router_logits", False))
    routed = routed if router_weight is None else router_weight != 0
    if routed:
        kwargs["output_router_logits"] = True
    outputs = _decoder(base)(*args, **{**kwargs, "use_cache": False, "return_dict": True})
    head = base.get_output_embeddings()
    attach_layers(head)  # an adapter may have come since
    if is_tensor_parallel(head):
        # Its hooks gather logits. FSDP's stand around the whole model in that case.
        result = head.forward(outputs.last_hidden_state, head_call=head_call, has_hooks=False)
    else:
        result = head(outputs.last_hidden_state, head_call=head_call)
    if routed:
        result = {**result, "aux_loss": _router_loss(base, outputs, kwargs.get("attention_mask"), router_weight)}
    return result


def _forget_head_call(base: Any, args: Any) -> None:
    """After an exception in the head no forward hook ran."""
    setattr(base, _RAN, False)


def _require_head_call(base: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """A forward put in place of ours takes ``head_call`` for one of the decoder's options, and drops it."""
    if kwargs.get("head_call") is not None and not getattr(base, _RAN):
        raise RuntimeError(
            f"model: the forward of {type(base).__name__} was replaced after attach_head (by "
            f"{base.forward.__module__}), so that the loss does not run in its head; call attach_head again after "
            "that patch, or switch it off (liger_kernel_config={'fused_linear_cross_entropy': False})"
        )


def _decoder(base: Any) -> Any:
    """The model under the head, with whatever encodes its other inputs."""
    if base.base_model is not base:
        return base.base_model
    # Releases before 5 give Gemma3 no prefix, and so itself as base model; `get_decoder` may leave out its images.
    return base.model if isinstance(getattr(base, "model", None), nn.Module) else base.get_decoder()


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
