"""What is benchmarked: shapes, masks and dtypes, and the random data of one case.

Every number of a benchmark belongs to one `Case`. Model shapes are those of published configurations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100
# Logits of a trained model spread by a few nats over the vocabulary; with N(0, 1) hidden states the head's rows
# get this standard deviation divided by sqrt(D).
LOGIT_STD = 2.5
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Case:
    """One problem. ``tokens`` counts prompts too; 2 * ``pairs`` sequences of equal length share them."""

    name: str
    tokens: int
    hidden: int
    vocab: int
    dtype: str
    pairs: int
    masked: float = 0.0
    frozen_head: bool = False
    workspace: int | None = None

    def __post_init__(self) -> None:
        """Refuse shapes that `make_data` cannot lay out evenly."""
        if self.tokens % (2 * self.pairs):
            raise ValueError(f"{self.name}: tokens must divide by 2 * pairs = {2 * self.pairs}, got {self.tokens}")
        if not 0.0 <= self.masked < 1.0:
            raise ValueError(f"{self.name}: masked must lie in [0, 1), got {self.masked}")
        if self.valid_per_sequence < 1:
            raise ValueError(f"{self.name}: no token of a response is left at masked = {self.masked}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of hidden states and weight."""
        return getattr(torch, self.dtype)

    @property
    def sequence_length(self) -> int:
        """Positions of one sequence, its prompt included."""
        return self.tokens // (2 * self.pairs)

    @property
    def valid_per_sequence(self) -> int:
        """Positions of one sequence that carry a label."""
        return self.sequence_length - round(self.masked * self.sequence_length)

    @property
    def valid_tokens(self) -> int:
        """Rows that need logits at all."""
        return 2 * self.pairs * self.valid_per_sequence

    @property
    def product_flops(self) -> int:
        """FLOPs of one matrix product of size valid tokens x V x D."""
        return 2 * self.valid_tokens * self.vocab * self.hidden

    @property
    def products(self) -> int:
        """Matrix products that loss and gradients need: logits and dX, and dW unless the head is frozen."""
        return 2 if self.frozen_head else 3

    @property
    def logits_bytes(self) -> int:
        """Size of the logits of the valid rows in the case's dtype."""
        return self.valid_tokens * self.vocab * self.torch_dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Size of the gradients that are wanted, in the dtype of the inputs."""
        rows = self.tokens + (0 if self.frozen_head else self.vocab)
        return rows * self.hidden * self.torch_dtype.itemsize

    def but(self, **changes: object) -> Case:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Data:
    """Random tensors of a case. ``rows`` and ``cu_valid`` describe the tokens that carry a label, compacted."""

    hidden: Tensor  # (N, D), requires grad
    weight: Tensor  # (V, D), requires grad unless the head is frozen
    labels: Tensor  # (N,) int64, IGNORE_INDEX on prompts
    cu_seqlens: Tensor  # (2P + 1,) int32, all positions
    rows: Tensor  # (M,) int64, positions that carry a label
    cu_valid: Tensor  # (2P + 1,) int32, valid positions only
    ref_sum_logps: Tensor  # (2P,) float32, a reference model's log-probs summed over each response


def make_data(case: Case, device: torch.device, seed: int = 0) -> Data:
    """Draw the tensors of ``case``: normal hidden states and weight, uniform labels, prompts as masked prefixes."""
    gen = torch.Generator(device=device).manual_seed(seed)
    hidden = torch.randn(case.tokens, case.hidden, generator=gen, device=device).to(case.torch_dtype)
    weight = torch.randn(case.vocab, case.hidden, generator=gen, device=device)
    weight = weight.mul_(LOGIT_STD / math.sqrt(case.hidden)).to(case.torch_dtype)
    labels = torch.randint(case.vocab, (2 * case.pairs, case.sequence_length), generator=gen, device=device)
    labels[:, : case.sequence_length - case.valid_per_sequence] = IGNORE_INDEX
    labels = labels.reshape(-1)
    # What another head of the same spread would give: log-probs of mean -(log V + std^2 / 2), independent by token.
    spread = (
        torch.randn(2 * case.pairs, generator=gen, device=device) * LOGIT_STD * math.sqrt(case.valid_per_sequence)
    )
    ref_sum_logps = spread - case.valid_per_sequence * (math.log(case.vocab) + LOGIT_STD**2 / 2)
    starts = torch.arange(2 * case.pairs + 1, device=device, dtype=torch.int32)
    return Data(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(not case.frozen_head),
        labels=labels,
        cu_seqlens=starts * case.sequence_length,
        rows=torch.nonzero(labels != IGNORE_INDEX).flatten(),
        cu_valid=starts * case.valid_per_sequence,
        ref_sum_logps=ref_sum_logps,
    )


# name: (D, V)
MODELS = {
    "llama3.2-1b": (2048, 128256),
    "qwen3-4b": (2560, 151936),
    "gemma3-4b": (2560, 262144),
    "llama3-8b": (4096, 128256),
    # The shapes of tables that others published at 8192 tokens: Liger's README (fused linear scaled cross-entropy),
    # and TRL's pull request 7244 (log-probs of Qwen3-8B).
    "liger-readme": (4096, 131072),
    "qwen3-8b": (4096, 151936),
}


def gpu_case(model: str, tokens: int, masked: float = 0.0, *, frozen_head: bool = False) -> Case:
    """A case at the head of a published model: bf16, sequences of 512 positions, 1 GiB of workspace."""
    d, v = MODELS[model]
    name = f"{model}-{tokens // 1024}k" + (f"-m{round(100 * masked)}" if masked else "")
    return Case(
        name + ("-frozen" if frozen_head else ""),
        tokens=tokens,
        hidden=d,
        vocab=v,
        dtype="bfloat16",
        pairs=tokens // 1024,
        masked=masked,
        frozen_head=frozen_head,
        workspace=GIB,
    )


HEADLINE = gpu_case("llama3-8b", 8192)
HEADLINES = (
    HEADLINE,
    gpu_case("liger-readme", 8192),
    gpu_case("qwen3-8b", 8192),
    gpu_case("liger-readme", 8192, 0.5),
    gpu_case("qwen3-8b", 8192, 0.5),
)

# In order of importance: a run that spends its time budget has measured the first ones.
GPU_CASES = (
    *HEADLINES,
    gpu_case("llama3-8b", 16384, 0.5),
    gpu_case("qwen3-4b", 8192),
    gpu_case("gemma3-4b", 8192),
    gpu_case("llama3-8b", 8192, frozen_head=True),
    gpu_case("llama3.2-1b", 8192),
    gpu_case("qwen3-4b", 16384, 0.5),
    gpu_case("llama3-8b", 32768, 0.75),
    gpu_case("llama3-8b", 4096),
    gpu_case("llama3.2-1b", 32768, 0.5),
    gpu_case("gemma3-4b", 16384, 0.5),
    gpu_case("qwen3-4b", 32768),
)


def _cpu_case(name: str, tokens: int, d: int, v: int, dtype: str, **options: object) -> Case:
    return Case(name, tokens, d, v, dtype, pairs=tokens // 256, workspace=256 * MIB).but(**options)


CPU_CASES = (
    _cpu_case("v32k-fp32", 2048, 1024, 32000, "float32"),
    _cpu_case("v32k-bf16", 2048, 1024, 32000, "bfloat16"),
    _cpu_case("v32k-fp32-m50", 2048, 1024, 32000, "float32", masked=0.5),
    _cpu_case("v32k-fp32-frozen", 2048, 1024, 32000, "float32", frozen_head=True),
    _cpu_case("v152k-fp32", 2048, 896, 151936, "float32"),
    _cpu_case("v152k-bf16", 2048, 896, 151936, "bfloat16"),
)
CPU_MEMORY_CASE = _cpu_case("v152k-fp32-4k", 4096, 896, 151936, "float32")
QUICK_CASES = (
    Case("quick-fp32", 64, 32, 500, "float32", pairs=2, workspace=MIB),
    Case("quick-bf16-m50", 64, 32, 500, "bfloat16", pairs=2, masked=0.5, workspace=MIB),
    Case("quick-fp32-frozen", 64, 32, 500, "float32", pairs=2, frozen_head=True, workspace=MIB),
)

ALL_CASES = {case.name: case for case in (*GPU_CASES, *CPU_CASES, CPU_MEMORY_CASE, *QUICK_CASES)}
