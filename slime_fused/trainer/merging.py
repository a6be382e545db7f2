"""Merging a trained adapter into the weights of the model it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slime_fused.model.wrappers import base_layer, matrix_layers, unwrap_peft


def adapts_embeddings(model: Any) -> bool:
    """Whether the adapter of a PEFT model changes, replaces or wraps its input embeddings or its head."""
    base = unwrap_peft(model)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    return any(hasattr(end, name) for end in ends for name in ("base_layer", "modules_to_save", "token_adapter"))


def merge_adapter(base: PreTrainedModel, adapter: str | Path, untie: bool) -> PreTrainedModel:
    """``base`` with the adapter saved in the folder ``adapter`` merged into its weights, in their dtype.

    ``base`` is the model as it was before training, and is used up. ``untie`` gives a tied head weights of its own,
    which an adapter of the head or of the embeddings needs: merged into shared weights it would change both ends
    of the model, or one that PEFT ties would change them twice; and a tied model is saved without its head. Ends
    that are the same afterwards stay tied.
    """
    from peft import PeftModel

    text_config = base.config.get_text_config()
    untie = untie and text_config.tie_word_embeddings
    model: Any = PeftModel.from_pretrained(base, str(adapter))
    if untie:
        # After loading: PEFT looks at the model's ties to know which adapters it has to tie.
        for layer in map(base_layer, matrix_layers(base.get_output_embeddings())):
            layer.weight = nn.Parameter(layer.weight.detach().clone())
    merged: Any = model.merge_and_unload()
    if untie:
        inputs, head = merged.get_input_embeddings(), merged.get_output_embeddings()
        is_tied = torch.equal(inputs.weight, head.weight)
        if is_tied:
            head.weight = inputs.weight
        for config in (base.config, text_config):
            config.tie_word_embeddings = is_tied
    result: PreTrainedModel = merged
    return result
