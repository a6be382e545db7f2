"""What can be known to go wrong before a model or its data are loaded, besides what the config knows itself."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from slime_fused.trainer.arguments import Settings
from slime_fused.trainer.config import HeadConfig
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
    config.resume_from_checkpoint = resume_from(config)
    folder = Path(str(config.output_dir))
    if config.resume_from_checkpoint is None:
        if not script.overwrite_checkpoints:
            _check_folder(folder)
    elif script.overwrite_checkpoints and Path(config.resume_from_checkpoint).resolve().parent == folder.resolve():
        raise UsageError(
            f"overwrite_checkpoints: would delete {config.resume_from_checkpoint}, where the run is to go on from"
        )


def resume_from(config: HeadConfig) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` means: none, the newest in the output folder, or a path.

    Raises UsageError where there is none.
    """
    wanted: Any = config.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none", ""):
        return None
    folder = Path(str(config.output_dir))
    if str(wanted).lower() == "true":
        checkpoints = checkpoints_in(folder)
        if not checkpoints:
            raise UsageError(f"resume_from_checkpoint: {folder} holds no checkpoint")
        return str(checkpoints[-1])
    path = Path(str(wanted)).expanduser()
    if not (path / "trainer_state.json").is_file():
        reason = "a folder without trainer_state.json" if path.is_dir() else "no such folder"
        raise UsageError(f"resume_from_checkpoint: expected a checkpoint, got {path}: {reason}")
    return str(path)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints that a run has left in its output folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.split("-")[1]))


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
