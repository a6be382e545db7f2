"""Other projects' kernels as contestants. All are optional: one that is missing becomes a row that says so.

Each is called the way its own users call it, with its defaults unless the name says otherwise. None computes
the SLIME loss, so those that give per-token log-probabilities get the SLIME terms from plain PyTorch, and those
that give only a mean are compared on that mean.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata, util

import torch
from torch import Tensor

from bench.cases import IGNORE_INDEX, Case, Data
from bench.contestants import Contestant, Refusal, Step, differentiate, logps_contestant

# Vocabulary columns of one tile in TRL's trainers (its default; the token dimension is fixed at 4096).
_TRL_VOCAB_TILE = 32768

# Distribution names, for the versions in a result file.
DISTRIBUTIONS = (
    "liger-kernel",
    "cut-cross-entropy",
    "trl",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "unsloth",
    "unsloth-zoo",
    "rl-engine",
)


def peer_versions() -> dict[str, str]:
    """Installed versions of the peers, without importing any."""
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def needs(*modules: str, gpu: bool = True) -> Refusal:
    """A refusal for a machine without one of ``modules`` (top-level names) or, with ``gpu``, without a GPU."""

    def refuses(case: Case, device: torch.device) -> str | None:
        if gpu and device.type != "cuda":
            return "its kernels need a GPU"
        missing = [module for module in modules if util.find_spec(module) is None]
        return f"not installed: {', '.join(missing)}" if missing else None

    return refuses


def _needs_hopper(*modules: str) -> Refusal:
    """The same for kernels that compute capability 9.0 alone runs, and that take bfloat16 alone."""
    installed = needs(*modules)

    def refuses(case: Case, device: torch.device) -> str | None:
        reason = installed(case, device)
        if reason is not None:
            return reason
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) != (9, 0):
            return f"its kernels need compute capability 9.0, this device has {major}.{minor}"
        return None if case.dtype == "bfloat16" else f"its kernels take bfloat16, the case has {case.dtype}"

    return refuses


# --- TRL: the fused head of its trainers -----------------------------------------------------------------------


def trl_logps(hidden: Tensor, weight: Tensor, labels: Tensor, outputs: tuple[str, ...] = ("log_probs",)) -> Tensor:
    """(N,) log-probs by TRL's fused head, as `add_fused_lm_head` runs it: 0 where there is no label.

    Where its Triton kernels run, the rows that carry a label alone are multiplied; on a CPU all are.
    """
    from trl.kernels import ChunkedLogProbFunction

    mask = labels != IGNORE_INDEX
    compact = hidden.device.type == "cuda"
    rows, targets = (hidden[mask], labels[mask]) if compact else (hidden, labels.clamp(min=0))
    logps, *_ = ChunkedLogProbFunction.apply(rows, weight, None, targets, 1.0, _TRL_VOCAB_TILE, None, 1.0, outputs)
    return logps.new_zeros(mask.shape).masked_scatter(mask, logps) if compact else logps.masked_fill(~mask, 0)


# --- Apple cut cross entropy -----------------------------------------------------------------------------------


def _cce_logps(impl: str) -> Callable[[Data], Tensor]:
    def logps(data: Data) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        nll = linear_cross_entropy(
            data.hidden, data.weight, data.labels, ignore_index=IGNORE_INDEX, reduction="none", impl=impl
        )
        return -nll.float()

    return logps


# --- Liger -----------------------------------------------------------------------------------------------------


def _liger_ce_logps(data: Data) -> Tensor:
    """Liger's fused linear cross entropy with reduction="none" (its gradients are formed in backward)."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    nll = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="none")(
        data.weight, data.hidden, data.labels
    )
    return -nll.float()


def _liger_scaled_logps(data: Data) -> Tensor:
    """Liger's per-token scaled cross entropy; on Hopper it needs the CUTLASS DSL."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(
        data.hidden, data.weight, data.labels, 1.0, IGNORE_INDEX
    ).float()


def _build_liger_mean(case: Case, data: Data) -> Step:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX)
    return differentiate(data, lambda: module(data.weight, data.hidden, data.labels))


def _build_liger_mean_sm90(case: Case, data: Data) -> Step:
    """Its Hopper kernels for the mean loss: dX formed in forward, dW in backward."""
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
        LigerFusedLinearCrossEntropySM90Function,
    )

    return differentiate(
        data,
        lambda: LigerFusedLinearCrossEntropySM90Function.apply(
            data.hidden, data.weight, data.labels, IGNORE_INDEX, "mean"
        ),
    )


# --- Unsloth: the per-token log-probs of its preference trainers ------------------------------------------------


def _unsloth_logps(data: Data) -> Tensor:
    """`fused_linear_token_logps` with its defaults; only labelled rows reach the head."""
    import unsloth  # noqa: F401  # unsloth_zoo refuses to be imported before it
    from unsloth_zoo.fused_losses.preference_loss import fused_linear_token_logps

    mask = data.labels != IGNORE_INDEX
    out = fused_linear_token_logps(data.hidden, data.weight, None, data.labels.clamp(min=0), mask)
    return out["per_token_logps"].float()


# --- RL-Kernel: the linear log-prob of its Hopper extension -----------------------------------------------------


def _rl_kernel_logps(data: Data) -> Tensor:
    """`FusedLinearLogpSM90Op` on the rows that carry a label, as it knows no label to ignore."""
    from rl_engine.kernels.ops.cuda.loss.linear_logp import FusedLinearLogpSM90Op

    logps = FusedLinearLogpSM90Op()(
        data.hidden.index_select(0, data.rows), data.weight, data.labels.index_select(0, data.rows)
    )
    return torch.zeros_like(data.labels, dtype=torch.float32).index_put((data.rows,), logps.float())


# --- quack -----------------------------------------------------------------------------------------------------


def _quack_mean(*, tuned: bool) -> Callable[[Case, Data], Step]:
    def build(case: Case, data: Data) -> Step:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return differentiate(
            data,
            lambda: chunked_linear_cross_entropy(
                data.hidden, data.weight, data.labels, ignore_index=IGNORE_INDEX, tuned=tuned
            ),
        )

    return build


PEERS = (
    logps_contestant(
        "trl-fused-head",
        "trl",
        lambda data: trl_logps(data.hidden, data.weight, data.labels),
        "ChunkedLogProbFunction as its trainers call it; SLIME terms in PyTorch",
        refuses=needs("trl", "datasets", gpu=False),
    ),
    logps_contestant(
        "cce",
        "cce",
        _cce_logps("cce"),
        'linear_cross_entropy(reduction="none"), defaults (filters small gradients); SLIME terms in PyTorch',
        refuses=needs("cut_cross_entropy"),
    ),
    logps_contestant(
        "cce-exact",
        "cce",
        _cce_logps("cce_exact"),
        'impl="cce_exact": no filter, float32 accumulation; SLIME terms in PyTorch',
        refuses=needs("cut_cross_entropy"),
    ),
    logps_contestant(
        "liger-ce-none",
        "liger",
        _liger_ce_logps,
        'LigerFusedLinearCrossEntropyLoss(reduction="none"); SLIME terms in PyTorch',
        refuses=needs("liger_kernel"),
    ),
    logps_contestant(
        "liger-scaled",
        "liger-scaled",
        _liger_scaled_logps,
        "LigerFusedLinearScaledCrossEntropyFunction; SLIME terms in PyTorch",
        refuses=needs("liger_kernel"),
    ),
    Contestant(
        "ce-liger",
        "liger",
        "cross_entropy",
        _build_liger_mean,
        "mean LigerFusedLinearCrossEntropyLoss",
        needs("liger_kernel"),
    ),
    Contestant(
        "ce-liger-sm90",
        "liger-sm90",
        "cross_entropy",
        _build_liger_mean_sm90,
        "mean LigerFusedLinearCrossEntropySM90Function (CuTe kernels)",
        _needs_hopper("liger_kernel", "cutlass"),
    ),
    Contestant(
        "ce-quack",
        "quack",
        "cross_entropy",
        _quack_mean(tuned=False),
        "mean chunked_linear_cross_entropy(tuned=False), chunks of 4096 rows",
        needs("quack", "cutlass"),
    ),
    Contestant(
        "ce-quack-tuned",
        "quack-tuned",
        "cross_entropy",
        _quack_mean(tuned=True),
        "the same with its default tuned=True, which tries every configuration on the first call of a shape",
        needs("quack", "cutlass"),
    ),
    logps_contestant(
        "unsloth-logps",
        "unsloth",
        _unsloth_logps,
        "fused_linear_token_logps of unsloth_zoo, defaults; SLIME terms in PyTorch",
        refuses=needs("unsloth", "unsloth_zoo"),
    ),
    logps_contestant(
        "rl-kernel",
        "rl-kernel",
        _rl_kernel_logps,
        "FusedLinearLogpSM90Op of RL-Kernel; SLIME terms in PyTorch",
        refuses=_needs_hopper("rl_engine"),
    ),
)
