"""Training on top of `transformers`: ``SlimeTrainer``, ``PreferenceTrainer`` for other losses, and ``slime-train``.

Needs ``pip install slime-fused[trainer]``; ``import slime_fused`` alone does not load any of it, and neither does
``import slime_fused.trainer`` until a name of it is asked for: the command line's help waits for no library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slime_fused.model.check import HeadMismatchError
    from slime_fused.trainer.base import HeadTrainer
    from slime_fused.trainer.config import HeadConfig, PreferenceConfig, SlimeConfig
    from slime_fused.trainer.data import PreferenceCollator
    from slime_fused.trainer.formats import PreferenceFormatError
    from slime_fused.trainer.loading import load_model, load_tokenizer
    from slime_fused.trainer.preference import PreferenceTrainer
    from slime_fused.trainer.sft import SftTrainer
    from slime_fused.trainer.sft_config import SftConfig
    from slime_fused.trainer.trainer import SlimeTrainer

_MODULES = {
    "HeadConfig": "slime_fused.trainer.config",
    "HeadMismatchError": "slime_fused.model.check",
    "HeadTrainer": "slime_fused.trainer.base",
    "PreferenceCollator": "slime_fused.trainer.data",
    "PreferenceConfig": "slime_fused.trainer.config",
    "PreferenceFormatError": "slime_fused.trainer.formats",
    "PreferenceTrainer": "slime_fused.trainer.preference",
    "SftConfig": "slime_fused.trainer.sft_config",
    "SftTrainer": "slime_fused.trainer.sft",
    "SlimeConfig": "slime_fused.trainer.config",
    "SlimeTrainer": "slime_fused.trainer.trainer",
    "load_model": "slime_fused.trainer.loading",
    "load_tokenizer": "slime_fused.trainer.loading",
}

__all__ = [
    "HeadConfig",
    "HeadMismatchError",
    "HeadTrainer",
    "PreferenceCollator",
    "PreferenceConfig",
    "PreferenceFormatError",
    "PreferenceTrainer",
    "SftConfig",
    "SftTrainer",
    "SlimeConfig",
    "SlimeTrainer",
    "load_model",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
