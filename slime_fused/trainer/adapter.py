"""The adapter that a command line asks for, on the model that it names."""

from __future__ import annotations

import difflib
from typing import Any

from slime_fused.trainer.arguments import ScriptArguments
from slime_fused.trainer.options import UsageError


def make_adapter(script: ScriptArguments, model: Any) -> Any:
    """Its `peft.LoraConfig`; None without ``use_peft``. Raises UsageError for layers that ``model`` lacks."""
    if not script.use_peft:
        return None
    from peft import LoraConfig

    targets = script.lora_target_modules
    names = [name for name, _ in model.named_modules() if name]
    for option, wanted in (
        ("lora_target_modules", [] if targets == ["all-linear"] else targets),
        ("lora_modules_to_save", script.lora_modules_to_save or []),
    ):
        for layer in wanted:
            _check_layer(option, layer, names)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        modules_to_save=script.lora_modules_to_save,
    )


def _check_layer(option: str, layer: str, names: list[str]) -> None:
    """PEFT takes the layers whose path ends in ``layer``, and says nothing of one that is missing among others."""
    if any(name == layer or name.endswith(f".{layer}") for name in names):
        return
    short = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    close = difflib.get_close_matches(layer, short, n=3)
    guess = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(short)}"
    raise UsageError(f"{option}: expected layers of the model, got {layer!r}; {guess}")
