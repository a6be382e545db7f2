"""Settings of supervised fine-tuning."""

from dataclasses import dataclass, field
from typing import ClassVar

from slime_fused.functional.checks import check_token_loss
from slime_fused.trainer.config import HeadConfig


@dataclass
class SftConfig(HeadConfig):
    """Settings of `SftTrainer`: cross-entropy of completions, the stage before preferences.

    ``per_device_train_batch_size`` counts rows. Raises ValueError for values the loss refuses.
    """

    full_learning_rate: ClassVar[float] = 2e-5

    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Initial learning rate of AdamW. Unset: 2e-5, or 1e-4 for an adapter (LoRA)."},
    )
    completion_only_loss: bool = field(
        default=True, metadata={"help": "Train on completions (a chat's assistant turns) alone, not on prompts."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of the target that is spread over the vocabulary."}
    )
    z_loss: float = field(default=0.0, metadata={"help": "Weight of the square of the log-sum-exp of each token."})

    def __post_init__(self) -> None:
        check_token_loss(self.label_smoothing, self.z_loss)
        super().__post_init__()
