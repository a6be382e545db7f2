"""What is right: each objective in plain PyTorch, and gradients in float64 one pair at a time.

All objectives are means over pairs, so the gradients of the whole problem are sums over pairs; going pair by pair
bounds the oracle's memory by one pair's float64 logits and lets it run at the full size of every case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Data
from bench.contestants import Gradients
from slime_fused import reference

# (M,) log-probs of the rows that carry a label, (2P + 1,) boundaries and the reference's (2P,) sums -> scalar loss
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]

DPO_BETA = 0.1
# Liger's defaults, against which SimPO is compared.
SIMPO_BETA, SIMPO_GAMMA = 0.1, 0.5


def slime(logps: Tensor, cu_seqlens: Tensor, ref_sum_logps: Tensor) -> Tensor:
    """The SLIME loss with the paper's defaults."""
    return reference.slime_terms(logps, cu_seqlens).loss


def dpo(logps: Tensor, cu_seqlens: Tensor, ref_sum_logps: Tensor) -> Tensor:
    """DPO (arXiv 2305.18290); sequences must be of equal length."""
    chosen, rejected = (logps.view(cu_seqlens.numel() - 1, -1).sum(dim=1) - ref_sum_logps).chunk(2)
    return -F.logsigmoid(DPO_BETA * (chosen - rejected)).mean()


def dpo_zero_reference(logps: Tensor, cu_seqlens: Tensor, ref_sum_logps: Tensor) -> Tensor:
    """DPO with a reference that gives both responses of a pair the same."""
    return dpo(logps, cu_seqlens, torch.zeros_like(ref_sum_logps))


def simpo(logps: Tensor, cu_seqlens: Tensor, ref_sum_logps: Tensor) -> Tensor:
    """SimPO (arXiv 2405.14734) without its optional NLL term; sequences must be of equal length."""
    means = logps.view(cu_seqlens.numel() - 1, -1).mean(dim=1)
    chosen, rejected = means.chunk(2)
    return -F.logsigmoid(SIMPO_BETA * (chosen - rejected) - SIMPO_GAMMA).mean()


def cross_entropy(logps: Tensor, cu_seqlens: Tensor, ref_sum_logps: Tensor) -> Tensor:
    """Mean negative log-likelihood."""
    return -logps.mean()


OBJECTIVES: dict[str, Objective] = {
    "slime": slime,
    "dpo": dpo,
    "dpo-zero-reference": dpo_zero_reference,
    "simpo": simpo,
    "cross_entropy": cross_entropy,
}


@dataclass(frozen=True)
class Errors:
    """Norm-wise relative errors against the oracle; None for a gradient that is not wanted."""

    loss: float
    d_hidden: float | None
    d_weight: float | None

    @property
    def worst_gradient(self) -> float:
        """The larger of the gradients' errors; NaN where one is NaN."""
        errors = torch.tensor([e for e in (self.d_hidden, self.d_weight) if e is not None])
        return float(errors.max())


def float64_gradients(case: Case, data: Data, objective: str) -> Gradients:
    """Loss and gradients of ``objective`` from float64 copies of the inputs; gradients are kept in float32."""
    loss_of = OBJECTIVES[objective]
    t, pairs = case.sequence_length, case.pairs
    weight = data.weight.detach().double().requires_grad_(not case.frozen_head)  # (V, D)
    d_hidden = torch.zeros(data.hidden.shape, dtype=torch.float32, device=data.hidden.device)
    total = 0.0
    cu_pair = data.cu_valid[:3]
    for p in range(pairs):
        chosen = slice(p * t, (p + 1) * t)
        rejected = slice((pairs + p) * t, (pairs + p + 1) * t)
        hidden = torch.cat([data.hidden[chosen], data.hidden[rejected]]).detach().double().requires_grad_()
        labels = torch.cat([data.labels[chosen], data.labels[rejected]])
        rows = torch.nonzero(labels >= 0).flatten()
        logps = reference.linear_logprobs(hidden, weight, labels).index_select(0, rows)
        loss = loss_of(logps, cu_pair, data.ref_sum_logps[p::pairs].double()) / pairs
        loss.backward()
        total += float(loss.detach())
        assert hidden.grad is not None
        d_hidden[chosen], d_hidden[rejected] = hidden.grad.float().chunk(2)
    d_weight = None if weight.grad is None else weight.grad.float()
    return Gradients(torch.tensor(total, dtype=torch.float64), d_hidden, d_weight)


# Elements of a gradient compared at a time: bounds the float32 copies to 256 MiB each.
_COMPARE_BLOCK = 1 << 26


def relative_error(actual: Tensor | None, expected: Tensor | None) -> float | None:
    """‖actual - expected‖ / ‖expected‖, summed in float64 block by block; inf where ``actual`` is missing."""
    if expected is None:
        return None
    if actual is None:
        return float("inf")
    difference = norm = 0.0
    blocks = zip(
        actual.detach().flatten().split(_COMPARE_BLOCK), expected.flatten().split(_COMPARE_BLOCK), strict=True
    )
    for a, e in blocks:
        difference += float((a.float() - e).square().sum(dtype=torch.float64))
        norm += float(e.square().sum(dtype=torch.float64))
    return (difference / norm) ** 0.5


def errors(actual: Gradients, expected: Gradients) -> Errors:
    """How far ``actual`` is from the oracle."""
    return Errors(
        loss=abs(float(actual.loss) - float(expected.loss)) / abs(float(expected.loss)),
        d_hidden=relative_error(actual.d_hidden, expected.d_hidden),
        d_weight=relative_error(actual.d_weight, expected.d_weight),
    )
