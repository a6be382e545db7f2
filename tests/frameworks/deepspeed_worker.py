"""One process of the DeepSpeed check: trains tiny models for two steps, one by one, and saves what came out."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from slime_fused.trainer import SlimeConfig, SlimeTrainer
from tests.tiny_models import make_pairs, make_tokenizer
from tests.trainer.fsdp_worker import make_model

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
        # Small enough that every layer is gathered and let go by itself, the head among them.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
}


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the whole parameters, on every process."""
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def config_for(stage: str) -> dict[str, Any] | None:
    if stage == "one process":
        return None
    zero = {**CONFIG["zero_optimization"], "stage": int(stage[0])}
    if "offload" in stage:
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    return {**CONFIG, "zero_optimization": zero}


def train(stage: str, kind: str, folder: Path) -> dict[str, Any]:
    """What two steps change in the weights, what they report, and what is saved at the end."""
    AcceleratorState._reset_state(reset_partial_state=True)
    tokenizer = make_tokenizer()
    deepspeed_config = config_for(stage)
    args = SlimeConfig(
        output_dir=str(folder),
        per_device_train_batch_size=1 if deepspeed_config else 2,
        gradient_accumulation_steps=2,
        max_steps=2,
        # The change of a weight is then the sum of its gradients. They are clipped by their common norm.
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        disable_tqdm=True,
        use_cpu=True,
        **({"deepspeed": deepspeed_config, "ddp_backend": "gloo"} if deepspeed_config else {}),
    )
    model = make_model(kind, len(tokenizer))
    trainer = SlimeTrainer(model, args, train_dataset=make_pairs(8), processing_class=tokenizer)
    start = whole_weights(trainer.model)
    trainer.train()
    end = whole_weights(trainer.model)
    result: dict[str, Any] = {"change": {name: end[name] - start[name] for name in start}}
    result["reports"] = [row for row in trainer.state.log_history if "loss" in row]
    result["eval"] = trainer.evaluate(trainer.train_dataset)
    trainer.save_model(str(folder / f"{stage} {kind}"))
    return {**result, "end": end}


def main(folder: str, cases: list[list[str]]) -> None:
    results: list[Any] = []
    for case in cases:
        try:
            results.append(train(*case, Path(folder)))
        except Exception:
            results.append(traceback.format_exc())
    if os.environ.get("RANK", "0") == "0":
        torch.save(results, Path(folder) / "results.pt")
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
