"""The Lightning module of examples/ trains, and each of its steps is that of the reference."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from slime_fused.losses import SimPO, Slime
from tests.frameworks.support import plain_loss
from tests.tiny_models import make_pairs, make_tokenizer, tiny_llama

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from lightning_module import PreferenceModule


def collate(tokenizer, pairs) -> dict[str, torch.Tensor]:
    rows = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in rows]
    ids = [start + tokenizer(text)["input_ids"] for start, (_, text) in zip(prompts, rows, strict=True)]
    length = max(map(len, ids))
    labels = [[-100] * len(start) + row[len(start) :] for start, row in zip(prompts, ids, strict=True)]
    return {
        "input_ids": torch.tensor([row + [1] * (length - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids]),
        "labels": torch.tensor([row + [-100] * (length - len(row)) for row in labels]),
    }


@pytest.mark.parametrize("loss", [Slime(), SimPO(beta=2.0, gamma=0.5)], ids=["slime", "simpo"])
def test_every_step_is_that_of_the_reference(loss, tmp_path):
    tokenizer = make_tokenizer()

    class Watched(PreferenceModule):
        """Holds gradients against plain PyTorch's before the optimizer acts on them."""

        losses: list[float]

        def training_step(self, batch, batch_idx):
            self.batch = batch
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer):
            gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
            self.model.zero_grad()
            with torch.enable_grad():
                want = plain_loss(self.model, self.batch, loss)
                want.backward()
            got = self.trainer.callback_metrics["train/loss"]
            torch.testing.assert_close(got.double(), want.detach(), rtol=2e-5, atol=1e-6)
            for name, parameter in self.model.named_parameters():
                floor = 2e-5 * float(parameter.grad.abs().max()) + 1e-7
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=floor, msg=name)
                parameter.grad = gradients[name]
            self.losses.append(float(want))

    module = Watched(tiny_llama(len(tokenizer)), loss, learning_rate=1e-2)
    module.losses = []
    loader = DataLoader(make_pairs(9), batch_size=3, collate_fn=lambda pairs: collate(tokenizer, pairs))
    trainer = lightning.Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader, loader)
    assert len(module.losses) == 6
    assert module.losses[-1] < module.losses[0]
    assert {"val/loss", "val/margin", "val/accuracy"} <= trainer.callback_metrics.keys()
