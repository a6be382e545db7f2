"""DPO and SimPO as contestants: this package's streamed path, plain PyTorch, and the peers that have them.

TRL's fused head gives log-probs, to which the loss is added in plain PyTorch as its trainer does; Liger has both
losses whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import slime_fused
from bench.cases import IGNORE_INDEX, Case, Data
from bench.contestants import Contestant, Step, differentiate, full_logits_logps, planned
from bench.oracle import DPO_BETA, OBJECTIVES, SIMPO_BETA, SIMPO_GAMMA
from bench.peers import needs, trl_logps
from slime_fused import losses, reference

_LOSSES = {"dpo": losses.DPO(beta=DPO_BETA), "simpo": losses.SimPO(beta=SIMPO_BETA, gamma=SIMPO_GAMMA)}
# What TRL's DPOTrainer has its head compute on every call: the last three for its metrics.
_TRL_DPO_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def _references(objective: str, data: Data) -> dict[str, Tensor]:
    """What the loss is given beside the labels."""
    if objective == "simpo":
        return {}
    chosen, rejected = data.ref_sum_logps.chunk(2)
    return {"ref_chosen_sum_logps": chosen, "ref_rejected_sum_logps": rejected}


def _ours(objective: str) -> Contestant:
    value = _LOSSES[objective]

    def build(case: Case, data: Data) -> Step:
        given = _references(objective, data)

        def loss() -> Tensor:
            return slime_fused.preference_loss(
                data.hidden,
                data.weight,
                data.labels,
                loss=value,
                cu_seqlens=data.cu_seqlens,
                workspace=case.workspace or "auto",
                **given,  # type: ignore[arg-type]
            ).loss

        return differentiate(data, loss)

    return Contestant(
        f"{objective}-slime_fused",
        "ours",
        objective,
        build,
        f"preference_loss(loss={type(value).__name__}(...)) with the case's workspace",
        backend="auto",
        explain=planned(value, "auto", None),
    )


def _naive(objective: str) -> Contestant:
    def build(case: Case, data: Data) -> Step:
        given = _references(objective, data)

        def loss() -> Tensor:
            return reference.preference_loss(
                data.hidden,
                data.weight,
                data.labels,
                loss=_LOSSES[objective],
                cu_seqlens=data.cu_seqlens,
                **given,  # type: ignore[arg-type]
            ).loss

        return differentiate(data, loss)

    return Contestant(
        f"{objective}-naive", "baseline", objective, build, "slime_fused.reference: full logits, log-softmax"
    )


def _from_logps(objective: str, logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Case, Data], Step]:
    """A step from per-position log-probs (N,), the loss added in PyTorch."""
    loss_of = OBJECTIVES[objective]

    def build(case: Case, data: Data) -> Step:
        def loss() -> Tensor:
            rows = logps(data.hidden, data.weight, data.labels).index_select(0, data.rows)
            return loss_of(rows, data.cu_valid, data.ref_sum_logps)

        return differentiate(data, loss)

    return build


def _naive_compiled(objective: str) -> Contestant:
    def build(case: Case, data: Data) -> Step:
        return _from_logps(objective, torch.compile(full_logits_logps, dynamic=False))(case, data)

    return Contestant(
        f"{objective}-naive-compiled",
        "compiled",
        objective,
        build,
        "F.cross_entropy over full float32 logits through torch.compile, the loss in PyTorch",
    )


def _trl(objective: str, outputs: tuple[str, ...], note: str) -> Contestant:
    return Contestant(
        f"{objective}-trl-fused-head",
        "trl",
        objective,
        _from_logps(objective, lambda hidden, weight, labels: trl_logps(hidden, weight, labels, outputs)),
        note,
        needs("trl", "datasets", gpu=False),
    )


def _liger(case: Case, data: Data, loss_module: torch.nn.Module) -> Step:
    shape = (2 * case.pairs, case.sequence_length)
    labels = data.labels.view(shape)

    def loss() -> Tensor:
        out = loss_module(data.weight, data.hidden.view(*shape, case.hidden), labels)
        return out[0] if isinstance(out, tuple) else out

    return differentiate(data, loss)


def _build_liger_dpo(case: Case, data: Data) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = LigerFusedLinearDPOLoss(ignore_index=IGNORE_INDEX, beta=DPO_BETA, use_ref_model=False)
    return _liger(case, data, module)


def _build_liger_simpo(case: Case, data: Data) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    module = LigerFusedLinearSimPOLoss(
        ignore_index=IGNORE_INDEX, beta=SIMPO_BETA, gamma=SIMPO_GAMMA, compute_nll_loss=False
    )
    return _liger(case, data, module)


OURS_PREFERENCES = (_ours("dpo"), _ours("simpo"))
PREFERENCES = (
    *(make(objective) for objective in _LOSSES for make in (_naive, _naive_compiled)),
    _trl(
        "dpo", _TRL_DPO_OUTPUTS, "ChunkedLogProbFunction with the outputs of TRL's DPOTrainer, its loss in PyTorch"
    ),
    _trl("simpo", ("log_probs",), "ChunkedLogProbFunction for log-probs alone, SimPO in PyTorch"),
    Contestant(
        "dpo-liger",
        "liger-dpo",
        "dpo-zero-reference",
        _build_liger_dpo,
        "LigerFusedLinearDPOLoss(use_ref_model=False): it takes no cached references, so they are 0 here",
        needs("liger_kernel", gpu=False),
    ),
    Contestant(
        "simpo-liger",
        "liger-simpo",
        "simpo",
        _build_liger_simpo,
        "LigerFusedLinearSimPOLoss, no NLL term",
        needs("liger_kernel", gpu=False),
    ),
)
