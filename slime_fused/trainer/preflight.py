"""What can be known to go wrong before a model or its data are loaded, besides what the config knows itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from slime_fused.trainer.arguments import Settings
from slime_fused.trainer.checkpoints import checkpoints_in, find_checkpoint
from slime_fused.trainer.loading import check_exists
from slime_fused.trainer.options import UsageError
from slime_fused.trainer.weighting import check_needs

_RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("weight_decay", 0, math.inf, "a number >= 0"),
    ("adam_beta1", 0, math.nextafter(1, 0), "a number in [0, 1)"),
    ("adam_beta2", 0, math.nextafter(1, 0), "a number in [0, 1)"),
    ("adam_epsilon", 0, math.inf, "a number >= 0"),
    ("per_device_train_batch_size", 1, math.inf, "at least 1"),
    ("per_device_eval_batch_size", 1, math.inf, "at least 1"),
    ("gradient_accumulation_steps", 1, math.inf, "at least 1"),
)


def check_settings(settings: Settings) -> None:
    """Refuse settings that would fail later. Raises UsageError, or ValueError that names the setting."""
    script, config = settings.script, settings.config
    for name, least, most, expected in _RANGES:
        value: Any = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise UsageError(f"{name}: expected {expected}, got {value}")
    check_exists(script.model)
    if script.tokenizer is not None:
        check_exists(script.tokenizer, "tokenizer")
    if settings.loss is not None:
        check_needs(settings.loss)
    folder = Path(str(config.output_dir))
    config.resume_from_checkpoint = find_checkpoint(
        config.resume_from_checkpoint, folder, save_only_model=config.save_only_model
    )
    if config.resume_from_checkpoint is None:
        if not script.overwrite_checkpoints:
            _check_folder(folder)
    elif script.overwrite_checkpoints and Path(config.resume_from_checkpoint).resolve().parent == folder.resolve():
        raise UsageError(
            f"overwrite_checkpoints: would delete {config.resume_from_checkpoint}, where the run is to go on from"
        )


def _check_folder(folder: Path) -> None:
    """Refuse the checkpoints of another run: a later resume would take one of them for its own."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir: expected a folder, got the file {folder}")
    checkpoints = checkpoints_in(folder)
    if checkpoints:
        raise UsageError(
            f"output_dir: {folder} holds {checkpoints[-1].name} of an earlier run; go on from it with "
            "--resume_from_checkpoint true, delete it with --overwrite_output_dir, or choose another folder"
        )
