"""SLIME in a Lightning module, for any causal language model of `transformers`, bare or wrapped by PEFT.

    model = transformers.AutoModelForCausalLM.from_pretrained(...)
    lightning.Trainer(max_steps=100).fit(PreferenceModule(model), dataloader)

Batches hold ``input_ids``, ``attention_mask``, ``labels``; rows [chosen..., rejected...], -100 on prompt
and padding. The loss runs inside the model's head, so the logits are never materialised and DDP, FSDP and ZeRO find
the forward pass that they expect.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor

from slime_fused.losses import Formula, Slime
from slime_fused.model.calls import FusedLoss, run_in_head
from slime_fused.model.head import attach_head
from slime_fused.model.transform import transform_of


class PreferenceModule(lightning.LightningModule):
    """Trains ``model`` with a loss of pairs that needs no reference model."""

    def __init__(self, model: torch.nn.Module, loss: Formula | None = None, learning_rate: float = 1e-4) -> None:
        super().__init__()
        attach_head(model)  # before a strategy shards it
        self.model = model
        self.loss = Slime() if loss is None else loss
        self.learning_rate = learning_rate
        self.transform = transform_of(model)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self._loss_of(batch, "train")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """As the training step; Lightning takes no gradient."""
        return self._loss_of(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of what is trained; with an adapter that is little."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.learning_rate)

    def _loss_of(self, batch: dict[str, Tensor], stage: str) -> Tensor:
        inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
        call = FusedLoss(batch["labels"], None, self.loss, self.transform, backend="auto", workspace="auto")
        outputs = run_in_head(self.model, inputs, call)
        chosen, rejected = outputs["mean_logps"].chunk(2)
        pairs = len(chosen)
        self.log(f"{stage}/loss", outputs["loss"], prog_bar=True, batch_size=pairs)
        self.log(f"{stage}/margin", (chosen - rejected).mean(), batch_size=pairs)
        self.log(f"{stage}/accuracy", (chosen > rejected).float().mean(), batch_size=pairs)
        return outputs["loss"]
