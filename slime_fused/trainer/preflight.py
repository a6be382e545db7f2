"""What can be known to go wrong before a model or its data are loaded, besides what the config knows itself."""

from __future__ import annotations

import contextlib
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.training_args import OptimizerNames

from slime_fused.engine.workspace import parse_workspace
from slime_fused.trainer.arguments import ScriptArguments, Settings
from slime_fused.trainer.checkpoints import checkpoints_in, find_checkpoint
from slime_fused.trainer.config import HeadConfig
from slime_fused.trainer.loading import check_exists
from slime_fused.trainer.loss_needs import check_needs
from slime_fused.trainer.options import UsageError

_RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("weight_decay", 0, math.inf, "a number >= 0"),
    ("adam_beta1", 0, math.nextafter(1, 0), "a number in [0, 1)"),
    ("adam_beta2", 0, math.nextafter(1, 0), "a number in [0, 1)"),
    ("adam_epsilon", 0, math.inf, "a number >= 0"),
    ("per_device_train_batch_size", 1, math.inf, "at least 1"),
    ("per_device_eval_batch_size", 1, math.inf, "at least 1"),
    ("gradient_accumulation_steps", 1, math.inf, "at least 1"),
    ("logging_steps", 0, math.inf, "a number >= 0"),
    ("dataloader_num_workers", 0, math.inf, "at least 0"),
)


def check_settings(settings: Settings) -> None:
    """Refuse settings that would fail later. Raises UsageError, or ValueError that names the setting."""
    script, config = settings.script, settings.config
    for name, least, most, expected in _RANGES:
        value: Any = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise UsageError(f"{name}: expected {expected}, got {value}")
    epochs = config.num_train_epochs
    if config.max_steps <= 0 and not (math.isfinite(epochs) and epochs > 0):
        raise UsageError(f"num_train_epochs: expected a number > 0, or max_steps, got {epochs}")
    if script.use_peft:
        _check_adapter(script, config)
    _check_optimizer(config)
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
        _check_writable(folder)
    elif script.overwrite_checkpoints and Path(config.resume_from_checkpoint).resolve().parent == folder.resolve():
        raise UsageError(
            f"overwrite_checkpoints: would delete {config.resume_from_checkpoint}, where the run is to go on from"
        )


def check_workspace(config: HeadConfig, model: Any) -> None:
    """Refuse, with a UsageError, a workspace that surely does not hold the logits of one row."""
    limit, head = parse_workspace(config.workspace_limit()), model.get_output_embeddings()
    if limit is None or head is None or config.loss_impl != "fused":
        return
    is_mixed = config.bf16 or config.fp16
    least = head.weight.shape[0] * (2 if is_mixed else head.weight.element_size())
    if limit < least:
        raise UsageError(
            f"workspace: expected at least {least} bytes (one row of {head.weight.shape[0]} logits), got {limit}"
        )


def _check_adapter(script: ScriptArguments, config: HeadConfig) -> None:
    if script.lora_r < 1:
        raise UsageError(f"lora_r: expected at least 1, got {script.lora_r}")
    if not 0 <= script.lora_dropout < 1:
        raise UsageError(f"lora_dropout: expected a number in [0, 1), got {script.lora_dropout}")
    on_head = any(name.rsplit(".", 1)[-1] == "lm_head" for name in script.lora_target_modules)
    if on_head and script.lora_dropout and config.loss_impl == "fused":
        raise UsageError(
            f"lora_dropout: expected 0 with lm_head among lora_target_modules, got {script.lora_dropout}: dropout "
            "in front of the output head cannot be fused; leave lm_head out or take --loss_impl naive"
        )


def _check_optimizer(config: HeadConfig) -> None:
    """Refuse an optimizer whose library is missing and a schedule without the arguments that it needs."""
    # Most handlers need no model; what those that do say without one is of no interest here.
    with contextlib.suppress(ValueError, TypeError, RuntimeError, AttributeError):
        try:
            Trainer.get_optimizer_cls_and_kwargs(config)
        except ImportError as error:
            raise UsageError(
                f"optim: {OptimizerNames(config.optim).value!r} cannot be used here: {error}"
            ) from error
    schedule = SchedulerType(config.lr_scheduler_type).value
    given: Any = config.lr_scheduler_kwargs or {}
    try:
        get_scheduler(schedule, torch.optim.SGD([torch.zeros(1)]), 0, 2, given)
    except (ValueError, TypeError) as error:
        raise UsageError(f"lr_scheduler_type: {schedule!r} with lr_scheduler_kwargs {given}: {error}") from error


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


def _check_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be made or written to, by making something there that goes away again."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise UsageError(f"output_dir: cannot write to {folder}: {error.strerror}") from error
