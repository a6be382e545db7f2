"""What can be known to go wrong before a model and its data are loaded; every error names the setting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import integration_utils
from transformers.utils import logging
from transformers.utils.import_utils import is_liger_kernel_available

from slime_fused.backends import resolve_backend
from slime_fused.model.options import check_options

logger = logging.get_logger(__name__)

_UNTOLD = ("azure_ml", "flyte")
"""Reporters whose libraries `get_available_reporting_integrations` does not always look for."""


def check_choices(config: Any) -> None:
    """Of a `HeadConfig`, before its base class sees it: numbers, names and sizes."""
    rate = config.learning_rate
    if rate is not None and not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"learning_rate: expected a finite number >= 0, got {rate}")
    if rate is None and config.deepspeed:
        raise ValueError(
            "learning_rate: expected a number with deepspeed, which wants it before it is known whether the model "
            f"carries an adapter, got None; {config.full_learning_rate:g} is the default for all weights and "
            f"{config.adapter_learning_rate:g} for an adapter"
        )
    check_options(config.backend, config.workspace_limit())
    if config.pad_to_multiple_of is not None and config.pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of: expected at least 1, got {config.pad_to_multiple_of}")
    given = config.fsdp_config
    if isinstance(given, str) and not given.lstrip().startswith("{") and not Path(given).is_file():
        raise ValueError(f"fsdp_config: expected JSON or the path of a JSON file, got {given!r}: no such file")
    if "inputs" in config.include_for_metrics:
        raise ValueError(
            "include_for_metrics: expected no 'inputs', whose rows are responses while predictions are per pair or "
            "per row; compute_metrics gets predictions in the order of the dataset, which has the inputs"
        )
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("use_liger_kernel: expected the package liger-kernel, which is not installed here")


def check_devices(config: Any) -> None:
    """Refuse a backend that cannot run where the model will be, with a ValueError that says why."""
    if config.backend != "auto" and config.loss_impl == "fused":
        resolve_backend(config.backend, config.device, torch.float32)


def check_reports(report_to: list[str]) -> None:
    """Refuse, with a ValueError, reporters that do not exist or whose library is missing."""
    known = integration_utils.INTEGRATION_TO_CALLBACK
    installed = integration_utils.get_available_reporting_integrations()
    for name in report_to:
        if name not in known:
            raise ValueError(f"report_to: expected 'none' or some of {sorted(known)}, got {name!r}")
        if name not in installed and name not in _UNTOLD:
            raise ValueError(f"report_to: {name!r} needs its library, which is not installed here")


def liger_without_its_head(config: dict[str, bool] | None) -> dict[str, bool]:
    """Liger's settings without the replacement of the model's forward, in whose place our head call is."""
    if config and config.get("fused_linear_cross_entropy"):
        logger.warning(
            "liger_kernel_config: fused_linear_cross_entropy is switched off: the loss runs in the head already"
        )
    return {**(config or {}), "fused_linear_cross_entropy": False}
