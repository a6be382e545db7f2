"""Who is benchmarked: one interface for this package, plain PyTorch and every peer.

A contestant turns a case and its data into a `Step`: a callable that runs one forward and backward pass and
returns the loss and the gradients. The same object is checked against `oracle` and timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import slime_fused
from bench.cases import IGNORE_INDEX, Case, Data
from slime_fused import reference
from slime_fused.engine.plan import Plan
from slime_fused.engine.units import Loss


@dataclass(frozen=True)
class Gradients:
    """What one step returns. ``d_weight`` is None for a frozen head."""

    loss: Tensor  # ()
    d_hidden: Tensor | None  # (N, D)
    d_weight: Tensor | None  # (V, D)


Step = Callable[[], Gradients]
LossFn = Callable[[], Tensor]
# Why a contestant cannot run a case on a device, or None where it can.
Refusal = Callable[[Case, torch.device], str | None]


def _never(case: Case, device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Contestant:
    """One implementation. ``build`` may raise: the exception's text becomes the row's reason."""

    name: str
    family: str  # contestants of one family run in one process
    objective: str  # key of oracle.OBJECTIVES, or "products"
    build: Callable[[Case, Data], Step]
    note: str = ""
    refuses: Refusal = _never
    backend: str = ""
    """This package's contestants: the backend that is asked for, "auto" included."""
    explain: Callable[[Case, Data], Plan] | None = None
    """This package's contestants: the plan of the call that the step makes."""

    def supports(self, case: Case, device: torch.device) -> str | None:
        """None where it runs ``case`` on ``device``, else the reason why not."""
        return self.refuses(case, device)

    def prepare(self, case: Case, data: Data) -> Step:
        """The forward and backward pass over ``data`` as a callable."""
        return self.build(case, data)


def differentiate(data: Data, loss_fn: LossFn) -> Step:
    """Run ``loss_fn`` and its backward pass; gradients leave the leaves, so that every step allocates them anew."""

    def step() -> Gradients:
        loss = loss_fn()
        loss.backward()
        out = Gradients(loss.detach(), data.hidden.grad, data.weight.grad)
        data.hidden.grad = data.weight.grad = None
        return out

    return step


def slime_from_logps(logps: Tensor, data: Data) -> Tensor:
    """SLIME loss of per-position log-probabilities (N,), through plain PyTorch."""
    return reference.slime_terms(logps.index_select(0, data.rows), data.cu_valid).loss


def logps_contestant(
    name: str, family: str, logps: Callable[[Data], Tensor], note: str = "", refuses: Refusal = _never
) -> Contestant:
    """A contestant that has only per-position log-probabilities (N,); the SLIME terms are added in PyTorch."""

    def build(case: Case, data: Data) -> Step:
        return differentiate(data, lambda: slime_from_logps(logps(data), data))

    return Contestant(name, family, "slime", build, note, refuses)


# --- the floor: the matrix products alone ----------------------------------------------------------------------


# Rows whose float32 softmax is formed at a time.
_RESIDUAL_BLOCK = 256


def softmax_residual_(logits: Tensor, labels: Tensor) -> None:
    """``logits`` (M, V) becomes softmax - onehot(``labels``) (M,) in place, a few rows at a time in float32.

    The operand that the products of a step really have: a GPU's rate depends on the bits it multiplies.
    """
    for rows, targets in zip(logits.split(_RESIDUAL_BLOCK), labels.split(_RESIDUAL_BLOCK), strict=True):
        residual = torch.softmax(rows.float(), 1)
        residual.scatter_add_(1, targets[:, None], residual.new_full((len(targets), 1), -1.0))
        rows.copy_(residual)


def _build_products(case: Case, data: Data) -> Step:
    x = data.hidden.detach().index_select(0, data.rows)  # (M, D)
    w = data.weight.detach()  # (V, D)
    logits = torch.mm(x, w.t())  # (M, V)
    residual = logits.clone()
    softmax_residual_(residual, data.labels.index_select(0, data.rows))
    d_x = torch.empty_like(x)
    d_w = None if case.frozen_head else torch.empty_like(w)
    loss = torch.zeros((), device=x.device)

    def step() -> Gradients:
        torch.mm(x, w.t(), out=logits)
        torch.mm(residual, w, out=d_x)
        if d_w is not None:
            torch.mm(residual.t(), x, out=d_w)
        return Gradients(loss, d_x, d_w)

    return step


PRODUCTS = Contestant(
    "products", "any", "products", _build_products, "the matrix products alone, over the rows that carry a label"
)


# --- plain PyTorch ---------------------------------------------------------------------------------------------


def _build_reference(case: Case, data: Data) -> Step:
    return differentiate(
        data,
        lambda: reference.slime_loss(data.hidden, data.weight, data.labels, cu_seqlens=data.cu_seqlens).loss,
    )


def full_logits_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Per-position log-probabilities (N,) by F.cross_entropy over full logits (N, V), upcast to float32."""
    logits = F.linear(hidden, weight).float()
    return -F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")


def _build_compiled(case: Case, data: Data) -> Step:
    compiled = torch.compile(full_logits_logps, dynamic=False)
    return differentiate(data, lambda: slime_from_logps(compiled(data.hidden, data.weight, data.labels), data))


def _build_full_logits_mean(case: Case, data: Data) -> Step:
    def loss() -> Tensor:
        logits = F.linear(data.hidden, data.weight).float()
        return F.cross_entropy(logits, data.labels, ignore_index=IGNORE_INDEX)

    return differentiate(data, loss)


def _refuses_linear_cross_entropy(case: Case, device: torch.device) -> str | None:
    if hasattr(F, "linear_cross_entropy"):
        return None
    return f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy"


def _torch_linear_cross_entropy(data: Data, reduction: str) -> Tensor:
    return F.linear_cross_entropy(
        data.hidden,
        data.weight,
        data.labels,
        reduction=reduction,
        ignore_index=IGNORE_INDEX,
        options=torch.nn.LinearCrossEntropyOptions(),
    )


def _build_torch_chunked_mean(case: Case, data: Data) -> Step:
    return differentiate(data, lambda: _torch_linear_cross_entropy(data, "mean"))


def _build_authors_precision(case: Case, data: Data) -> Step:
    return differentiate(
        data,
        lambda: (
            reference.slime_loss(
                data.hidden, data.weight, data.labels, cu_seqlens=data.cu_seqlens, upcast=False
            ).loss
        ),
    )


BASELINES = (
    Contestant("naive", "baseline", "slime", _build_reference, "slime_fused.reference: full logits, log-softmax"),
    Contestant(
        "naive-no-upcast",
        "baseline",
        "slime",
        _build_authors_precision,
        "the same with the log-softmax in the dtype of the logits, as in the authors' trainer",
    ),
    logps_contestant(
        "naive-cross-entropy",
        "baseline",
        lambda data: full_logits_logps(data.hidden, data.weight, data.labels),
        "F.cross_entropy over full float32 logits, SLIME terms in PyTorch",
    ),
    Contestant("naive-compiled", "compiled", "slime", _build_compiled, "the same through torch.compile"),
    logps_contestant(
        "torch-linear-ce",
        "baseline",
        lambda data: -_torch_linear_cross_entropy(data, "none").float(),
        'torch.nn.functional.linear_cross_entropy, chunked, reduction="none"; SLIME terms in PyTorch',
        refuses=_refuses_linear_cross_entropy,
    ),
    Contestant(
        "ce-naive", "baseline", "cross_entropy", _build_full_logits_mean, "mean F.cross_entropy over full logits"
    ),
    Contestant(
        "ce-torch-linear",
        "baseline",
        "cross_entropy",
        _build_torch_chunked_mean,
        "mean torch.nn.functional.linear_cross_entropy, chunked",
        refuses=_refuses_linear_cross_entropy,
    ),
)


# --- this package ----------------------------------------------------------------------------------------------


def planned(operation: str | Loss, backend: str, workspace: int | str | None) -> Callable[[Case, Data], Plan]:
    """The plan of a call of this package with the case's shapes; ``workspace`` None takes the case's."""

    def explain(case: Case, data: Data) -> Plan:
        return slime_fused.explain_plan(
            data.hidden,
            data.weight,
            data.labels,
            cu_seqlens=data.cu_seqlens,
            loss=operation,
            backend=backend,
            workspace=workspace if workspace is not None else case.workspace or "auto",
        )

    return explain


def ours(
    name: str, backend: str = "auto", workspace: int | str | None = None, note: str = "", family: str = "ours"
) -> Contestant:
    """`slime_fused.slime_loss`; ``workspace`` None takes the case's."""

    def build(case: Case, data: Data) -> Step:
        space = workspace if workspace is not None else case.workspace or "auto"

        def loss() -> Tensor:
            return slime_fused.slime_loss(
                data.hidden,
                data.weight,
                data.labels,
                cu_seqlens=data.cu_seqlens,
                backend=backend,
                workspace=space,
            ).loss

        return differentiate(data, loss)

    return Contestant(
        name,
        family,
        "slime",
        build,
        note or f'slime_loss, backend="{backend}"',
        backend=backend,
        explain=planned("slime", backend, workspace),
    )


def _build_ours_logps(case: Case, data: Data) -> Step:
    def loss() -> Tensor:
        logps = slime_fused.linear_logprobs(
            data.hidden, data.weight, data.labels, cu_seqlens=data.cu_seqlens, workspace=case.workspace or "auto"
        )
        return slime_from_logps(logps, data)

    return differentiate(data, loss)


def ours_mean(
    name: str, backend: str = "auto", workspace: int | str | None = None, note: str = "", family: str = "ours"
) -> Contestant:
    """`slime_fused.linear_cross_entropy`; ``workspace`` None takes the case's."""

    def build(case: Case, data: Data) -> Step:
        space = workspace if workspace is not None else case.workspace or "auto"

        def loss() -> Tensor:
            return slime_fused.linear_cross_entropy(
                data.hidden, data.weight, data.labels, backend=backend, workspace=space
            )

        return differentiate(data, loss)

    return Contestant(
        name,
        family,
        "cross_entropy",
        build,
        note or "mean linear_cross_entropy",
        backend=backend,
        explain=planned("cross_entropy", backend, workspace),
    )


OURS = (
    ours("slime_fused", note="slime_loss with the case's workspace"),
    ours("slime_fused-auto", workspace="auto", note='slime_loss, workspace="auto"'),
    ours("slime_fused-256MiB", workspace="256MiB", note='slime_loss, workspace="256MiB"'),
    Contestant(
        "slime_fused-logps",
        "ours",
        "slime",
        _build_ours_logps,
        "linear_logprobs, SLIME terms in PyTorch",
        backend="auto",
        explain=planned("token", "auto", None),
    ),
    ours_mean("ce-slime_fused"),
)
# One process each: a fault in one backend must not take the other's rows with it.
OURS_BACKENDS = tuple(
    ours(f"slime_fused-{backend}", backend=backend, family=f"ours-{backend}")
    for backend in ("cuda", "triton", "torch")
)

# Where fewer rows than `plan.FUSED_BELOW_ROWS` fit, backends with linear_stats take the plan "fused"; others, whose
# small chunks would add to a float32 dW, take one chunk in the room of that dW: the yardstick.
SMALL_WORKSPACE = "128MiB"
OURS_SMALL = tuple(
    contestant
    for backend, plans in (("triton", ("fused", "fused")), ("cuda", ("stream", "stream")))
    for contestant in (
        ours(
            f"slime_fused-{backend}-{SMALL_WORKSPACE}",
            backend,
            SMALL_WORKSPACE,
            f'slime_loss, backend="{backend}", workspace="{SMALL_WORKSPACE}" (plan {plans[0]})',
            f"ours-{backend}",
        ),
        ours_mean(
            f"ce-slime_fused-{backend}-{SMALL_WORKSPACE}",
            backend,
            SMALL_WORKSPACE,
            f'mean linear_cross_entropy, backend="{backend}", workspace="{SMALL_WORKSPACE}" (plan {plans[1]})',
            f"ours-{backend}",
        ),
    )
)
