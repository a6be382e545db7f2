"""Merging a trained adapter into the weights of the model it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from slime_fused.model.head import unwrap_peft


def adapts_embeddings(model: Any) -> bool:
    """Whether the adapter of a PEFT model changes, replaces or wraps its input embeddings or its head."""
    base = unwrap_peft(model)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    return any(hasattr(end, name) for end in ends for name in ("base_layer", "modules_to_save", "token_adapter"))


def merge_adapter(base: PreTrainedModel, adapter: str | Path, untie: bool) -> PreTrainedModel:
    """``base`` with the adapter saved in the folder ``adapter`` merged into its weights, in their dtype.

    ``base`` is the model as it was before training, and is used up. ``untie`` gives a tied head weights of its own
    first, which an adapter of the head or of the embeddings needs: merged into shared weights it would change both
    ends of the model, and a tied model is saved without its head.
    """
    from peft import PeftModel

    model: Any = base
    if untie and model.config.get_text_config().tie_word_embeddings:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
