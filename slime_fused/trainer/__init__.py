"""Training with the SLIME loss on top of `transformers`: ``SlimeTrainer``, ``SlimeConfig``, and ``slime-train``.

Needs ``pip install slime-fused[trainer]``; ``import slime_fused`` alone does not load any of it.
"""

from slime_fused.model.check import HeadMismatchError
from slime_fused.trainer.config import SlimeConfig
from slime_fused.trainer.data import PreferenceCollator
from slime_fused.trainer.formats import PreferenceFormatError
from slime_fused.trainer.loading import load_model, load_tokenizer
from slime_fused.trainer.trainer import SlimeTrainer

__all__ = [
    "HeadMismatchError",
    "PreferenceCollator",
    "PreferenceFormatError",
    "SlimeConfig",
    "SlimeTrainer",
    "load_model",
    "load_tokenizer",
]
