"""One process of the data-parallel test: trains a tiny model and saves what rank 0 saw."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from slime_fused.trainer import SlimeConfig, SlimeTrainer
from tests.tiny_models import make_pairs, make_tokenizer, tiny_llama


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        module = getattr(model, "module", model)
        self.gradients.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})


def main(folder: str, reduction: str, batch_size: int, accumulation: int) -> None:
    tokenizer = make_tokenizer()
    recorder = Recorder()
    trainer = SlimeTrainer(
        tiny_llama(len(tokenizer)),
        SlimeConfig(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=accumulation,
            stabilizer_reduction=reduction,
            max_steps=2,
            max_grad_norm=0.0,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        ),
        train_dataset=make_pairs(8),
        eval_dataset=make_pairs(8, seed=5),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        torch.save(recorder.gradients, Path(folder) / "gradients.pt")
        history = [row for row in trainer.state.log_history if "loss" in row]
        (Path(folder) / "reports.json").write_text(json.dumps({"train": history, "eval": metrics}))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    sys.stdout.flush()
    # About one run in ten, gloo's process group waits for its threads forever in its destructor.
    os._exit(0)
