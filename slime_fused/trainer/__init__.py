"""Training on top of `transformers`: ``SlimeTrainer``, ``PreferenceTrainer`` for other losses, and ``slime-train``.

Needs ``pip install slime-fused[trainer]``; ``import slime_fused`` alone does not load any of it.
"""

from slime_fused.model.check import HeadMismatchError
from slime_fused.trainer.base import HeadTrainer
from slime_fused.trainer.config import HeadConfig, PreferenceConfig, SlimeConfig
from slime_fused.trainer.data import PreferenceCollator
from slime_fused.trainer.formats import PreferenceFormatError
from slime_fused.trainer.loading import load_model, load_tokenizer
from slime_fused.trainer.preference import PreferenceTrainer
from slime_fused.trainer.trainer import SlimeTrainer

__all__ = [
    "HeadConfig",
    "HeadMismatchError",
    "HeadTrainer",
    "PreferenceCollator",
    "PreferenceConfig",
    "PreferenceFormatError",
    "PreferenceTrainer",
    "SlimeConfig",
    "SlimeTrainer",
    "load_model",
    "load_tokenizer",
]
