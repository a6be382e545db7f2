"""A decoder with random weights, the optimiser of what trains in it, and one whole training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.contestants import Gradients, Step
from bench.steps.cases import StepCase

# Position ids reach this far; rotary embeddings need no table of that length.
_MAX_POSITIONS = 1 << 20


@dataclass(frozen=True)
class Training:
    """A model and the optimiser of its trainable parameters, whose state exists already.

    The learning rate is 0: every step does the optimiser's whole work and leaves the weights as they were, so
    that contestants who share one model all take the same step, however often they are run.
    """

    model: Any
    optimizer: torch.optim.Optimizer

    @property
    def causal_lm(self) -> Any:
        """The `transformers` model, without PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the output head's weight."""
        weight: Tensor = self.causal_lm.get_output_embeddings().weight
        return weight

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the optimiser steps."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """(2P, T, D): the decoder's last hidden states, final norm included."""
        hidden: Tensor = self.causal_lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden

    def logits(self, input_ids: Tensor) -> Tensor:
        """(2P, T, V): the logits of every position."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def clear_gradients(self) -> None:
        """Free every gradient."""
        self.optimizer.zero_grad(set_to_none=True)


def build_training(case: StepCase, device: torch.device) -> Training:
    """Draw the weights of ``case`` (always the same ones), freeze what does not train, allocate AdamW's state."""
    torch.manual_seed(0)
    with torch.device(device):
        model = _causal_lm(case)
        if case.trains == "lora":
            model = _with_lora(model, case.lora_rank)
    model.to(device)
    if case.checkpointing:
        # The newer name where there is one: the older warns there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Training(model, optimizer)


def _causal_lm(case: StepCase) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    shape = case.shape
    config_of: Any = {"llama": LlamaConfig, "qwen3": Qwen3Config}[shape.family]
    config = config_of(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=_MAX_POSITIONS,
    )
    return AutoModelForCausalLM.from_config(config, dtype=case.torch_dtype, attn_implementation="sdpa")


def _with_lora(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    # Random factors: with PEFT's zero B, half of the gradients would be zero and could not be compared.
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def training_step(training: Training, loss_fn: Callable[[], Tensor]) -> Step:
    """Forward, backward, optimiser, gradients freed. The gradients stay inside: only the loss is returned."""

    def step() -> Gradients:
        loss = loss_fn()
        loss.backward()
        training.optimizer.step()
        training.clear_gradients()
        return Gradients(loss.detach(), None, None)

    return step


def held_bytes(training: Training, *others: nn.Module) -> int:
    """Bytes of weights and optimiser state, and of ``others``: what stays allocated between two steps."""
    sizes = {}
    for tensor in _tensors(training, others):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _tensors(training: Training, others: tuple[nn.Module, ...]) -> Iterator[Tensor]:
    for module in (training.model, *others):
        yield from module.parameters()
        yield from module.buffers()
    for state in training.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
