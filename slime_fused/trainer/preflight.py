"""What can be known to go wrong before a model or its data are loaded."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import integration_utils

from slime_fused.backends import resolve_backend
from slime_fused.engine.workspace import parse_bytes
from slime_fused.trainer.arguments import Settings
from slime_fused.trainer.config import HeadConfig
from slime_fused.trainer.loading import check_exists
from slime_fused.trainer.options import UsageError
from slime_fused.trainer.weighting import check_needs

_RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("learning_rate", 0, math.inf, "a number >= 0"),
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
    _check_execution(script.dtype, config)
    _check_reports(config.report_to)
    config.resume_from_checkpoint = resume_from(config)
    if config.resume_from_checkpoint is None and not script.overwrite_checkpoints:
        _check_folder(Path(str(config.output_dir)))


def _check_execution(dtype: str, config: HeadConfig) -> None:
    limit = config.workspace_limit()
    if isinstance(limit, str) and limit != "auto":
        parse_bytes(limit)
    elif isinstance(limit, int) and limit <= 0:
        raise UsageError(f"workspace: expected a positive number of bytes, got {limit}")
    # Without "auto": what its weights are is known only with the model.
    weights = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    autocast = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else weights
    resolve_backend(config.backend, config.device, autocast)


def _check_reports(report_to: Any) -> None:
    """`transformers` asks for the library only when the trainer is built."""
    known = integration_utils.INTEGRATION_TO_CALLBACK
    installed = integration_utils.get_available_reporting_integrations()
    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        if name in ("none", "all"):
            continue
        if name not in known:
            raise UsageError(f"report_to: expected none or one of {sorted(known)}, got {name!r}")
        # Not every integration is looked for by that function.
        if name not in installed and name != "flyte":
            raise UsageError(f"report_to: {name!r} needs a library that is not installed here")


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
