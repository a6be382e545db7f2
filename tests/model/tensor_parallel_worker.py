"""One process of the tensor-parallel test: losses and gradients of models whose head is cut by rows, or is not."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM

from slime_fused.model.calls import FusedLogps, run_in_head
from slime_fused.model.check import check_head
from slime_fused.model.head import HeadCall, attach_head
from slime_fused.model.transform import LogitTransform
from slime_fused.trainer.sft import FusedCrossEntropy
from tests.model.head_cases import VOCABULARY, fused_loss, gradients_of, text_batch
from tests.tiny_models import tiny_llama

HEAD = ColwiseParallel(output_layouts=Replicate())
LAYERS = {
    "model.layers.*.self_attn.q_proj": ColwiseParallel(),
    "model.layers.*.self_attn.k_proj": ColwiseParallel(),
    "model.layers.*.self_attn.v_proj": ColwiseParallel(),
    "model.layers.*.self_attn.o_proj": RowwiseParallel(),
}


def make_model(with_bias: bool = False) -> torch.nn.Module:
    model = tiny_llama(VOCABULARY + 1)  # the shards differ in size
    if with_bias:
        torch.manual_seed(1)
        model.lm_head = torch.nn.Linear(32, VOCABULARY + 1)
    return model.double()


def cut_head(model: torch.nn.Module, mesh: DeviceMesh, placement: Any) -> None:
    def place(name: str, module: torch.nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(key, torch.nn.Parameter(distribute_tensor(parameter, mesh, [placement])))

    def whole(module: torch.nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return DTensor.from_local(inputs[0], mesh, [Replicate()])

    def gathered(module: torch.nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        return output.redistribute(mesh, [Replicate()]).to_local()

    distribute_module(model.lm_head, mesh, place, whole, gathered)


def build(kind: str, mesh: DeviceMesh, folder: Path) -> torch.nn.Module:
    if kind == "the plan of transformers":
        # Its releases from 5 on wrap forwards at loading, those before hang hooks on modules.
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float64)
    model = make_model("bias" in kind)
    if kind == "attached first":
        attach_head(model)
    if kind == "sequence parallel":
        head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
        norm = PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Shard(1), use_local_output=False
        )
        parallelize_module(model, mesh, {"model.norm": norm, "lm_head": head})
    elif kind == "sharded logits":
        parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})
    elif kind in ("replicated", "cut by columns"):
        cut_head(model, mesh, Replicate() if kind == "replicated" else Shard(1))
    elif kind == "an adapter":
        parallelize_module(model, mesh, {"lm_head": HEAD})
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]))
    elif kind != "one process":
        parallelize_module(model, mesh, {"lm_head": HEAD, **(LAYERS if kind == "whole model" else {})})
    return model


def measure(kind: str, mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    model = build(kind, mesh, folder)
    attach_head(model)
    batch = text_batch()
    result: dict[str, Any] = {"difference": check_head(model, batch, LogitTransform(), "auto", "auto")}
    loss = fused_loss(model, batch)
    grads = gradients_of(model, loss)
    result["loss"] = float(loss)
    result["calls"] = {name: call(model, batch) for name, call in CALLS.items()}
    result["local rows"] = len(local(grads["lm_head.weight"]))
    result["grads"] = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    return result


def run(model: torch.nn.Module, batch: dict[str, Any], call: HeadCall) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        (value,) = (v for k, v in run_in_head(model, inputs, call).items() if k in ("logps", "loss"))
    return value


WHERE = (LogitTransform(), "auto", "auto")
CALLS = {
    "none": lambda model, batch: run(model, batch, FusedLogps(batch["labels"], None, *WHERE)),
    "sum": lambda model, batch: run(model, batch, FusedLogps(batch["labels"], None, *WHERE, reduction="sum")),
    "mean": lambda model, batch: run(model, batch, FusedLogps(batch["labels"], None, *WHERE, reduction="mean")),
    "smoothed": lambda model, batch: run(model, batch, FusedCrossEntropy(batch["labels"], None, 0.1, 1e-3, *WHERE)),
}
"""What else runs in a head than a loss of preferences."""


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def main(folder: Path, kinds: list[str]) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results: dict[str, Any] = {}
    for kind in kinds:
        try:
            results[kind] = measure(kind, mesh, folder)
        except Exception:
            results[kind] = traceback.format_exc()
    torch.save(results, folder / f"results{dist.get_rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    # About one run in ten, gloo's process group waits for its threads forever in its destructor.
    os._exit(0)
