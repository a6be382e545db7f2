"""What a model does to its logits after the head, read from its config.

Every model of the `transformers` library whose forward does no more than scale and soft-cap the product of its
head is covered by the tables below; for the others the comparison of the first batch (`check.py`) refuses to train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slime_fused.model.wrappers import unwrap_module, unwrap_peft

_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Config entries that multiply the logits: Cohere, Falcon-H1, Muse."""

_DIVISORS = ("logits_scaling",)
"""Config entries that divide them: Granite. HyperCLOVA X multiplies by the entry of the same name."""

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Gemma and most others; RecurrentGemma; xLSTM."""


@dataclass(frozen=True)
class LogitTransform:
    """``z = cap(scale * raw)`` with ``cap(y) = softcap * tanh(y / softcap)``, or no cap."""

    scale: float = 1.0
    softcap: float | None = None


def transform_of(model: Any) -> LogitTransform:
    """That of a model, whatever wraps it; a DeepSpeed engine has a config, too, but of its own."""
    return find_logit_transform(unwrap_peft(unwrap_module(model)).config)


def find_logit_transform(config: Any) -> LogitTransform:
    """The transform of a model with ``config`` (a `PretrainedConfig`; of a multimodal one the text part)."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    multiplies = "hyperclovax" in str(getattr(config, "model_type", ""))
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= _number(config, name) or 1.0
    for name in _DIVISORS:
        value = _number(config, name) or 1.0
        scale = scale * value if multiplies else scale / value
    # MiniCPM3 divides the hidden states before the head, which for a head without bias scales the logits.
    base_width = _number(config, "dim_model_base")
    if base_width:
        scale *= base_width / config.hidden_size
    softcap = next((cap for name in _SOFTCAPS if (cap := _number(config, name))), None)
    return LogitTransform(scale, softcap)


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
