"""Which checkpoint a run can go on from, and whether that is one of the same kind of run."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

logger = logging.get_logger(__name__)

RUN_KEY = "slime_fused: run"
"""Where a checkpoint's state keeps the kind of its run: `check_same_run`."""

_STATE = "trainer_state.json"
_WEIGHTS = re.compile(r"(adapter_)?(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)")


class RunRefusedError(ValueError):
    """A training that could not begin, or would do nothing; the message names the setting."""


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints that a run has left in its output folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(wanted: Any, output_dir: Path, *, save_only_model: bool) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` means: none, the newest complete one in the output folder, or
    a path.

    Raises RunRefusedError where there is none, or what it lacks.
    """
    if wanted is None or str(wanted).lower() in ("false", "none", ""):
        return None
    if str(wanted).lower() != "true":
        path = Path(str(wanted)).expanduser()
        fault = fault_of(path, save_only_model=save_only_model)
        if fault is not None:
            raise RunRefusedError(f"resume_from_checkpoint: expected a checkpoint, got {path}: {fault}")
        return str(path)
    faults: list[str] = []
    for path in reversed(checkpoints_in(output_dir)):
        fault = fault_of(path, save_only_model=save_only_model)
        if fault is None:
            for passed in faults:
                logger.warning(f"resume_from_checkpoint: passed over {passed}; the run goes on from {path.name}")
            return str(path)
        faults.append(f"{path.name}, {fault}")
    if not faults:
        raise RunRefusedError(f"resume_from_checkpoint: {output_dir} holds no checkpoint")
    raise RunRefusedError(f"resume_from_checkpoint: {output_dir} holds no whole checkpoint: {'; '.join(faults)}")


def fault_of(folder: Path, *, save_only_model: bool) -> str | None:
    """Why a run cannot go on from ``folder``, or None.

    `transformers` writes the state last, so a checkpoint without it was being written when the run ended. Random
    states may lack: a run on more processes has more of them. Of shards (FSDP, DeepSpeed), which only their own
    libraries can read, nothing but the state is looked at.
    """
    if not folder.is_dir():
        return "no such folder"
    try:
        json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"a folder without {_STATE}, which is written last"
    except ValueError:
        return f"its {_STATE} cannot be read"
    names = [path.name for path in folder.iterdir()]
    if any(name.startswith(("pytorch_model_fsdp", "global_step")) for name in names):
        return None
    # Of several adapters each has a folder of its own.
    weights = [path for path in [*folder.iterdir(), *folder.glob("*/adapter_*")] if _WEIGHTS.fullmatch(path.name)]
    if not weights:
        return "a folder without the weights of a model or an adapter"
    for index in folder.glob("*.index.json"):
        parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not parts <= set(names):
            return f"a folder without {min(parts - set(names))}"
    if not save_only_model:
        if not any("optimizer" in name for name in names):
            return (
                "a folder without optimizer.pt (with save_only_model=True a run goes on from the weights "
                "alone, and its optimizer begins anew)"
            )
        if "scheduler.pt" not in names:
            return "a folder without scheduler.pt"
    states = [folder / name for name in ("optimizer.pt", "scheduler.pt") if name in names]
    for path in [*weights, *states, *folder.glob("rng_state*.pth")]:
        if not _can_be_opened(path):
            return f"its {path.name} cannot be read"
    return None


def _can_be_opened(path: Path) -> bool:
    """Whether ``path`` has a beginning and an end, by which a file that was cut is known without reading it all."""
    if path.suffix != ".safetensors":
        return zipfile.is_zipfile(path)
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def check_same_run(checkpoint: str, mine: Mapping[str, Any]) -> None:
    """Refuse, with a RunRefusedError, the checkpoint of another stage, or with an adapter for a run without; warn
    of another loss. ``mine``: ``stage``, ``adapter`` and ``loss``, which maps names to texts, ``trained`` to
    which loss it is.

    A checkpoint that does not say (one of another trainer) passes.
    """
    state = json.loads((Path(checkpoint) / _STATE).read_text(encoding="utf-8"))
    theirs = (state.get("stateful_callbacks") or {}).get(RUN_KEY)
    if theirs is None:
        return
    for name, word in (("stage", "stage {}"), ("adapter", "adapter={}")):
        if theirs[name] != mine[name]:
            raise RunRefusedError(
                f"resume_from_checkpoint: {checkpoint} is of a run with {word.format(theirs[name])}, and this one "
                f"has {word.format(mine[name])}; to begin anew from its weights, give it as the model"
            )
    if theirs["loss"]["trained"] != mine["loss"]["trained"]:
        names = ["trained"]
    else:
        names = list({**theirs["loss"], **mine["loss"]})
    differing = [
        f"{name} {theirs['loss'].get(name)} there, {mine['loss'].get(name)} here"
        for name in names
        if theirs["loss"].get(name) != mine["loss"].get(name)
    ]
    if differing:
        logger.warning(
            f"resume_from_checkpoint: {checkpoint} was trained with another loss: {'; '.join(differing)}; the run "
            "goes on with this one's"
        )
