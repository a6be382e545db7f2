"""Which training steps are measured: model shapes, batches, and what of the model trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bench.cases import IGNORE_INDEX

Family = Literal["llama", "qwen3"]
Trains = Literal["all", "lora"]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a published decoder; its weights are drawn at random."""

    family: Family
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


# From the models' published configurations; all of them tie the output head to the token embedding.
MODEL_SHAPES = {
    "llama3.2-1b": ModelShape("llama", 16, 2048, 8192, 32, 8, 64, 128256),
    "qwen3-4b": ModelShape("qwen3", 36, 2560, 9728, 32, 8, 128, 151936),
    "smollm2-135m": ModelShape("llama", 30, 576, 1536, 9, 3, 64, 49152),
    "tiny": ModelShape("llama", 2, 64, 128, 2, 1, 32, 2003),
}


@dataclass(frozen=True)
class StepCase:
    """One training step. Every sequence has ``length`` positions, of which ``prompt_share`` are prompt."""

    model: str
    layers: int
    trains: Trains
    pairs: int
    length: int
    dtype: str
    prompt_share: float = 0.5
    checkpointing: bool = True
    lora_rank: int = 64

    def __post_init__(self) -> None:
        """Refuse what no batch can be made of."""
        if self.model not in MODEL_SHAPES:
            raise ValueError(f"model must be one of {', '.join(MODEL_SHAPES)}, got {self.model!r}")
        if not 1 <= self.layers <= self.shape.layers:
            raise ValueError(f"{self.name}: layers must lie in [1, {self.shape.layers}], got {self.layers}")
        if self.trains not in ("all", "lora"):
            raise ValueError(f'{self.name}: trains must be "all" or "lora", got {self.trains!r}')
        if self.pairs < 1:
            raise ValueError(f"{self.name}: pairs must be at least 1, got {self.pairs}")
        if not 1 <= self.prompt_length < self.length:
            raise ValueError(
                f"{self.name}: prompt and response need a position each, got {self.prompt_length} of "
                f"{self.length} for the prompt"
            )

    @property
    def name(self) -> str:
        """Model, what trains, pairs x length, and the layers where the model has more."""
        fewer = f"-{self.layers}l" if self.layers < self.shape.layers else ""
        return f"{self.model}-{self.trains}-{self.pairs}x{self.length}{fewer}"

    @property
    def shape(self) -> ModelShape:
        """The model's published sizes."""
        return MODEL_SHAPES[self.model]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of parameters and activations."""
        return getattr(torch, self.dtype)

    @property
    def prompt_length(self) -> int:
        """Positions of the prompt at the front of every sequence."""
        return round(self.prompt_share * self.length)

    @property
    def positions(self) -> int:
        """Positions of the padded batch."""
        return 2 * self.pairs * self.length

    def but(self, **changes: object) -> StepCase:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def describe(self) -> str:
        """What ran, in a line; fewer layers than the model has are named."""
        shape = self.shape
        layers = (
            f"{self.layers} of {shape.layers} layers" if self.layers < shape.layers else f"{self.layers} layers"
        )
        trained = "AdamW on all parameters" if self.trains == "all" else f"AdamW on LoRA of rank {self.lora_rank}"
        kept = "activation checkpointing" if self.checkpointing else "all activations kept"
        return (
            f"{self.model} shape, {layers}, random weights, D={shape.hidden}, V={shape.vocab}, {self.dtype}, "
            f"{trained}, {kept}; {self.pairs} pairs of 2 x {self.length} tokens, "
            f"{self.prompt_length} of each sequence prompt"
        )


@dataclass(frozen=True)
class StepBatch:
    """Token ids of [chosen..., rejected...]; both sequences of a pair begin with the same prompt."""

    input_ids: Tensor  # (2P, T) int64
    labels: Tensor  # (2P, T) int64: IGNORE_INDEX on prompts; position t predicts labels[:, t + 1]
    targets: Tensor  # (2P * T,) int64: what each position predicts, IGNORE_INDEX where nothing counts
    rows: Tensor  # (M,) int64: positions that predict a label
    cu_valid: Tensor  # (2P + 1,) int32: boundaries of the sequences among those

    @property
    def decoder_positions(self) -> int:
        """Positions that go through the decoder in one forward pass."""
        return self.input_ids.numel()


def make_batch(case: StepCase, device: torch.device, seed: int = 0) -> StepBatch:
    """Draw a batch; the same seed gives the same batch on every machine with the same kind of device."""
    gen = torch.Generator(device=device).manual_seed(seed)
    vocab, prompt = case.shape.vocab, case.prompt_length
    prompts = torch.randint(vocab, (case.pairs, prompt), generator=gen, device=device)
    responses = torch.randint(vocab, (2 * case.pairs, case.length - prompt), generator=gen, device=device)
    input_ids = torch.cat([prompts.repeat(2, 1), responses], dim=1)
    labels = input_ids.clone()
    labels[:, :prompt] = IGNORE_INDEX
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    valid = targets != IGNORE_INDEX
    cu_valid = torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return StepBatch(input_ids, labels, targets.flatten(), torch.nonzero(valid.flatten()).flatten(), cu_valid)


def _gpu_case(model: str, pairs: int, length: int, trains: Trains = "all", layers: int | None = None) -> StepCase:
    return StepCase(model, layers or MODEL_SHAPES[model].layers, trains, pairs, length, "bfloat16")


# In order of importance: a run that spends its time budget has measured the first ones. All 36 layers of Qwen3-4B
# train with LoRA; with AdamW on all parameters (four times their bytes) 12 of them leave room for naive logits.
GPU_CASES = (
    _gpu_case("llama3.2-1b", 4, 1024),
    _gpu_case("qwen3-4b", 4, 1024, "lora"),
    _gpu_case("llama3.2-1b", 2, 8192),
    _gpu_case("llama3.2-1b", 32, 512),
    _gpu_case("qwen3-4b", 8, 2048, "lora"),
    _gpu_case("qwen3-4b", 4, 1024, "all", 12),
    _gpu_case("llama3.2-1b", 2, 512),
)
CPU_CASES = (
    StepCase("smollm2-135m", 30, "lora", 2, 128, "float32"),
    StepCase("smollm2-135m", 8, "all", 2, 384, "float32"),
)
QUICK_CASES = (StepCase("tiny", 2, "lora", 2, 32, "float32", lora_rank=4),)

# Searched for the longest sequence at this number of pairs, and for the most pairs at this length.
GPU_LIMIT_CASES = (_gpu_case("llama3.2-1b", 2, 1024), _gpu_case("qwen3-4b", 2, 1024, "lora"))
CPU_LIMIT_CASES = (StepCase("smollm2-135m", 2, "all", 1, 256, "float32"),)
QUICK_LIMIT_CASES = (StepCase("tiny", 1, "all", 1, 64, "float32"),)

ALL_CASES = {
    case.name: case
    for case in (*GPU_CASES, *CPU_CASES, *QUICK_CASES, *GPU_LIMIT_CASES, *CPU_LIMIT_CASES, *QUICK_LIMIT_CASES)
}
