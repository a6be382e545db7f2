"""One process of the FSDP test: trains a tiny model in several layouts, one after the other, and saves the results.

accelerate applies FSDP on accelerators only. Here that one condition is lifted, so that its own preparation of the
model, and the base trainer's, run on gloo.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import accelerate.accelerator
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from slime_fused.losses import DPO, Slime
from slime_fused.trainer import PreferenceConfig, PreferenceTrainer
from tests.tiny_models import make_pairs, make_tokenizer, tiny_llama

# Sharded checkpoints are accelerate's default for FSDP2; transformers 5 asks for whole ones.
FSDP2 = {
    "version": 2,
    "state_dict_type": "SHARDED_STATE_DICT",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "sync_module_states": False,
}
FSDP1 = {**FSDP2, "version": 1, "state_dict_type": "FULL_STATE_DICT"}
LAYOUTS: dict[str, dict[str, Any] | None] = {
    "one process": None,
    # With an adapter, PEFT's policy makes every trainable leaf a unit: modules_to_save, lora_A, lora_B.
    "FSDP1": FSDP1,
    "FSDP1, every Linear a unit": {**FSDP1, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "Linear"]},
    "FSDP1, kept until backward": {**FSDP1, "reshard_after_forward": "shard_grad_op"},
    # accelerate 1.15 and later: units [norm, lm_head] and embed_tokens, or all three in one if tied.
    "FSDP2": FSDP2,
    "FSDP2, recomputing": {**FSDP2, "activation_checkpointing": True},
    "FSDP2, head in the root": FSDP2,
    "FSDP2, head a unit": FSDP2,
    "FSDP2, every leaf a unit": FSDP2,
}


def make_model(kind: str, vocab_size: int) -> nn.Module:
    model = tiny_llama(vocab_size, tie_word_embeddings=kind.startswith("tied"))
    if "LoRA" not in kind:
        return model
    torch.manual_seed(1)
    options = {
        "LoRA": {"target_modules": ["q_proj"]},
        "LoRA head": {"target_modules": ["q_proj", "lm_head"]},
        "LoRA, saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }[kind.removeprefix("tied ")]
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **options))


def allow_fsdp_on_cpu() -> None:
    plain = AcceleratorState.__init__

    @functools.wraps(plain)
    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            self.device = torch.device("cpu")  # FSDP1 compares devices, and accelerate's has an index
            PartialState._shared_state.update(distributed_type=self.distributed_type, device=self.device)

    AcceleratorState.__init__ = init
    # Moved to the CPU, a gathered weight is a copy everywhere but on a CPU: there it is freed with the original.
    torch.distributed.fsdp.FullStateDictConfig = lambda **options: FullStateDictConfig(
        **{**options, "offload_to_cpu": False}
    )


def shard_by_hand(layout: str, accelerator: Any, model: Any) -> nn.Module:
    """FSDP2 with units that accelerate does not make."""
    for module in list(model.modules())[::-1]:
        is_leaf = not list(module.children()) and bool(list(module.parameters()))
        if (
            type(module).__name__ == "LlamaDecoderLayer"
            or (layout == "FSDP2, head a unit" and module is model.get_output_embeddings())
            or (layout == "FSDP2, every leaf a unit" and is_leaf)
        ):
            fully_shard(module)
    return fully_shard(model)


prepare_by_accelerate = accelerate.accelerator.fsdp2_prepare_model


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the whole parameters, on every process."""
    # FSDP1's gathered state dict is no way on a CPU: it gives out what it frees.
    gathered: Any = contextlib.nullcontext()
    if isinstance(model, FullyShardedDataParallel):
        gathered = FullyShardedDataParallel.summon_full_params(model, writeback=False)
    copies = {}
    with gathered:
        for name, parameter in model.named_parameters():
            for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
                name = name.replace(wrapper, "")
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            copies[name] = whole.detach().clone()
    return copies


def train(layout: str, kind: str, precision: str, loss: str, folder: Path) -> dict[str, Any]:
    """What two steps change in the weights, what they report, and what is saved at the end."""
    AcceleratorState._reset_state(reset_partial_state=True)
    sharding = LAYOUTS[layout]
    # transformers 4 hands the settings to accelerate through the environment, all but these two.
    for name in [name for name in os.environ if name.startswith("FSDP_") or name == "ACCELERATE_USE_FSDP"]:
        del os.environ[name]
    if sharding:
        os.environ["FSDP_VERSION"] = str(sharding["version"])
        os.environ["FSDP_STATE_DICT_TYPE"] = sharding["state_dict_type"]
    by_hand = layout.startswith("FSDP2, ") and layout != "FSDP2, recomputing"
    accelerate.accelerator.fsdp2_prepare_model = (
        functools.partial(shard_by_hand, layout) if by_hand else prepare_by_accelerate
    )
    tokenizer = make_tokenizer()
    trainer = PreferenceTrainer(
        make_model(kind, len(tokenizer)),
        PreferenceConfig(
            output_dir=str(folder),
            per_device_train_batch_size=1 if sharding else 2,
            gradient_accumulation_steps=2,
            max_steps=2,
            # The change of a weight is then the sum of its gradients. They are clipped by their common norm.
            optim="sgd",
            learning_rate=0.05,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            loss_impl="naive" if loss == "naive" else "fused",
            bf16=precision == "bf16",
            disable_tqdm=True,
            use_cpu=True,
            **(
                {"fsdp": "full_shard auto_wrap", "fsdp_config": dict(sharding), "ddp_backend": "gloo"}
                if sharding
                else {}
            ),
        ),
        DPO() if loss == "DPO" else Slime(),
        train_dataset=make_pairs(8),
        processing_class=tokenizer,
    )
    start = whole_weights(trainer.model)
    trainer.train()
    end = whole_weights(trainer.model_wrapped)
    result: dict[str, Any] = {"change": {name: end[name] - start[name] for name in start}}
    result["reports"] = [row for row in trainer.state.log_history if "loss" in row]
    result["eval"] = trainer.evaluate(trainer.train_dataset)
    if layout in ("FSDP1", "FSDP2") and (precision, loss) == ("float32", "fused"):
        result["end"] = end
        trainer.save_model(str(folder / f"{layout} {kind}"))
    return result


def main(folder: str, cases: list[list[str]]) -> None:
    allow_fsdp_on_cpu()
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
    # About one run in ten, gloo's process group waits for its threads forever in its destructor.
    os._exit(0)
