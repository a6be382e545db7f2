"""One process of the data-parallel test under TRL: runs of a tiny model, replicated and sharded; rank 0 saves."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

import slime_fused as sf
from slime_fused.integrations.trl import enable_loss
from tests.integrations.trl_cases import make_trainer, reports
from tests.tiny_models import GradientRecorder, make_tokenizer
from tests.trainer import fsdp_worker


def same_size(prediction) -> dict[str, bool]:
    """Of the gathered logits and of their batches; the last of five pairs comes twice to two processes."""
    return {"same_size": len(prediction.predictions) == len(prediction.label_ids)}


def train_twice(folder: Path, batch_size: int, accumulation: int, sharding: dict[str, Any] | None = None) -> None:
    """SLIME with means over tokens, then DPO on a cached reference: two steps each, and an evaluation.

    ``sharding`` is the FSDP configuration, of gradients that nobody records.
    """
    sharded = {"fsdp": "full_shard", "fsdp_config": dict(sharding)} if sharding else {}
    recorder, rows, evaluations = GradientRecorder(), [], {}
    losses = (sf.SlimeLossConfig(stabilizer_reduction="token"), sf.losses.DPO(beta=0.5))
    for loss in losses:
        is_dpo = isinstance(loss, sf.losses.DPO)
        trainer = make_trainer(
            make_tokenizer(),
            folder,
            ref_model="copy" if is_dpo else "none",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            max_grad_norm=1e9,  # reported, and never reached
            ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
            extra={"callbacks": [] if sharding else [recorder], "compute_metrics": same_size if is_dpo else None},
            **sharded,
        )
        enable_loss(trainer, loss, cache_reference=is_dpo)
        trainer.train()
        rows += reports(trainer)
        evaluations |= {f"{loss.name} {name}": value for name, value in trainer.evaluate().items()}
    if trainer.is_world_process_zero():
        torch.save(recorder.steps, folder / "gradients.pt")
        (folder / "reports.json").write_text(json.dumps([rows, evaluations]))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    train_twice(Path(sys.argv[1]), 1, 2)
    if len(sys.argv) > 2:
        fsdp_worker.allow_fsdp_on_cpu()
        AcceleratorState._reset_state(reset_partial_state=True)
        train_twice(Path(sys.argv[2]), 1, 2, fsdp_worker.FSDP2)
    sys.stdout.flush()
    # Now and then gloo's process group waits for its threads forever in its destructor.
    os._exit(0)
