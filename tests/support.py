"""Shared by the tests of the public functions: batches, oracles, tolerances, workspaces that force a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import slime_fused as sf
from slime_fused.backends import get_backend
from slime_fused.engine.plan import Plan

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "torch")
PLANS = ("stream", "stream_several", "resweep")
IGNORE = -100

_ROUNDINGS = {torch.float64: 64, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}
"""The floor of a tolerance, in eps of the dtype (twice a rounding). In 16 bits only the products and the residual
round, as they do in plain PyTorch; float32 sums too are in another order (of 9,000 outputs and gradients of
`slime_loss` the worst was 6.3 eps beyond plain PyTorch, whose own worst was 13); and a float64 truth is no better
than a float64 result."""


@dataclass(frozen=True)
class Batch:
    """Inputs of a linear loss. ``hidden`` (S, T, D) and ``labels`` (S, T), or packed with ``cu_seqlens``."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    cu_seqlens: Tensor | None = None
    ignore_index: int = IGNORE

    @property
    def sequence_labels(self) -> list[Tensor]:
        """The labels of each sequence."""
        if self.cu_seqlens is None:
            return list(self.labels)
        return [self.labels[a:b] for a, b in pairwise(self.cu_seqlens.tolist())]

    def tensors(self) -> dict[str, Tensor]:
        """The floating inputs by name."""
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: x for name, x in named.items() if x is not None}

    def to(self, dtype: torch.dtype) -> Batch:
        """The floating inputs in another dtype."""
        return replace(self, **{name: x.detach().to(dtype) for name, x in self.tensors().items()})

    def leaves(self, wanted: tuple[str, ...] = ("hidden", "weight", "bias")) -> Batch:
        """Copies of the floating inputs; those named in ``wanted`` require a gradient."""
        return replace(
            self, **{name: x.detach().clone().requires_grad_(name in wanted) for name, x in self.tensors().items()}
        )

    def call(self, function: Callable[..., Any], **options: Any) -> Any:
        """``function`` of this batch."""
        if self.ignore_index != IGNORE:
            options["ignore_index"] = self.ignore_index
        return function(
            self.hidden, self.weight, self.labels, bias=self.bias, cu_seqlens=self.cu_seqlens, **options
        )


def make_batch(
    lengths: tuple[int, ...] = (4, 3, 5, 2, 6, 3),
    *,
    hidden_size: int = 5,
    vocab_size: int = 37,
    prompt: int = 2,
    padding: int = 1,
    dtype: torch.dtype = torch.float64,
    has_bias: bool = False,
    ignore_index: int = IGNORE,
    spread: float = 2.0,
    seed: int = 0,
) -> Batch:
    """A padded batch whose sequence s has ``prompt`` ignored tokens, then ``lengths[s]`` labelled ones.

    ``spread`` is about the standard deviation of the logits. The hidden size is small beside the rows: else one
    chunk would take less memory than several and a float32 dW, and no 16-bit batch would be chunked.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    length = prompt + max(lengths, default=0) + padding
    labels = torch.full((len(lengths), length), ignore_index)
    for s, count in enumerate(lengths):
        tokens = torch.randint(0, vocab_size, (count,), generator=generator)
        labels[s, prompt : prompt + count] = torch.where(tokens == ignore_index, (tokens + 1) % vocab_size, tokens)
    return Batch(
        hidden=normal(len(lengths), length, hidden_size).to(dtype),
        weight=(normal(vocab_size, hidden_size) * spread / hidden_size**0.5).to(dtype),
        labels=labels,
        bias=normal(vocab_size).to(dtype) if has_bias else None,
        ignore_index=ignore_index,
    )


def pack(batch: Batch, *, drop: int = 1) -> Batch:
    """The same sequences packed; the last ``drop`` positions of each (padding) are left out."""
    kept = batch.labels.shape[1] - drop
    bounds = torch.arange(batch.labels.shape[0] + 1, dtype=torch.int32) * kept
    return replace(
        batch,
        hidden=batch.hidden[:, :kept].reshape(-1, batch.hidden.shape[-1]),
        labels=batch.labels[:, :kept].reshape(-1),
        cu_seqlens=bounds,
    )


@dataclass(frozen=True)
class Result:
    """Named outputs and gradients of one call."""

    outputs: Mapping[str, Tensor]
    grads: Mapping[str, Tensor] = field(default_factory=dict)


def slime_outputs(out: sf.SlimeOutput) -> dict[str, Tensor]:
    """Everything a `SlimeOutput` holds, by name."""
    names = ("loss", "anchor", "margin_loss", "stabilizer", "chosen_logps", "rejected_logps", "margins")
    return {name: getattr(out, name) for name in names}


def unit_outputs(out: sf.PreferenceOutput | sf.PolicyOutput) -> dict[str, Tensor]:
    """Everything that a loss of units says, by name; the loss first."""
    named = {"loss": out.loss, **out.terms, **out.metrics, "mean_logps": out.mean_logps}
    return {**named, "logps": out.logps} if isinstance(out, sf.PolicyOutput) else named


def outputs_of(out: Any) -> dict[str, Tensor]:
    """By name, what the call returned; what to call ``backward()`` on comes first."""
    if isinstance(out, sf.SlimeOutput):
        return slime_outputs(out)
    return unit_outputs(out) if isinstance(out, (sf.PreferenceOutput, sf.PolicyOutput)) else {"value": out}


def run(
    function: Callable[..., Any],
    batch: Batch,
    *,
    wanted: tuple[str, ...] = ("hidden", "weight", "bias"),
    upstream: Tensor | float = 1.0,
    **options: Any,
) -> Result:
    """Call ``function`` on fresh leaves and backpropagate ``upstream`` through its loss."""
    leaves = batch.leaves(wanted)
    out = leaves.call(function, **options)
    outputs = outputs_of(out)
    loss = next(iter(outputs.values()))
    wanted_leaves = {name: x for name, x in leaves.tensors().items() if name in wanted}
    if wanted_leaves:
        seed = torch.as_tensor(upstream, dtype=torch.float64).to(loss.dtype).expand(loss.shape)
        loss.backward(seed)
    return Result({k: v.detach() for k, v in outputs.items()}, {k: _grad(x) for k, x in wanted_leaves.items()})


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    assert leaf.grad.dtype == leaf.dtype
    assert leaf.grad.shape == leaf.shape
    return leaf.grad


def assert_as_exact_as_plain(
    fused: Callable[..., Any],
    plain: Callable[..., Any],
    batch: Batch,
    *,
    options: Mapping[str, Any],
    roundings: float = 1.0,
    smallest_grad: float = 0.0,
    **how: Any,
) -> None:
    """``fused`` errs no more against float64 than plain PyTorch in the batch's dtype, plus a small floor.

    ``options`` go to both functions; ``how`` to `run` of the fused one, except ``wanted`` and ``upstream``, which
    go to both. ``roundings`` multiplies the floor; a gradient's floor is never below that of ``smallest_grad``.
    """
    both = {k: how[k] for k in ("wanted", "upstream") if k in how}
    truth = run(plain, batch.to(torch.float64), **options, **both)
    naive = run(plain, batch, **options, **both)
    got = run(fused, batch, **options, **how)
    eps = roundings * floor_of(batch.hidden.dtype)
    for name, value in got.outputs.items():
        assert_close(name, value, naive.outputs[name], truth.outputs[name], eps, smallest=1.0)
    assert got.grads.keys() == truth.grads.keys()
    for name, grad in got.grads.items():
        assert_close(f"d_{name}", grad, naive.grads[name], truth.grads[name], eps, smallest_grad)


def floor_of(dtype: torch.dtype) -> float:
    """What a result of a few roundings may err by, relative to the largest value."""
    return _ROUNDINGS[dtype] * torch.finfo(dtype).eps


def assert_close(name: str, got: Tensor, plain: Tensor, truth: Tensor, eps: float, smallest: float = 0.0) -> None:
    """The largest error is at most that of plain PyTorch plus ``eps`` times the largest value.

    A logit is rounded to the inputs' dtype before any statistic is formed, so an output may err by a rounding of a
    logit of magnitude ``smallest`` or more, even where it is itself near 0.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: not finite"
    error = (got.double() - truth).abs().max().item()
    floor = eps * max(truth.abs().max().item(), smallest)
    allowed = (plain.double() - truth).abs().max().item() + floor
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} ({floor:.3g} of it floor)"


def force_plan(kind: str, batch: Batch, *, loss: str = "slime", **options: Any) -> tuple[int, Plan]:
    """(workspace bytes, plan) with which a call on ``batch`` streams once, streams in chunks, or sweeps twice."""
    probe = batch.call(sf.explain_plan, loss=loss, workspace="1GiB", **options)
    problem = probe.problem
    largest_unit = max(problem.unit_rows, default=max(1, problem.rows // 3))
    rows = {"stream": problem.rows, "stream_several": largest_unit, "resweep": largest_unit - 1}[kind]
    workspace = rows * problem.row_bytes
    plan = batch.call(sf.explain_plan, loss=loss, workspace=workspace, **options)
    expected_kind = "resweep" if kind == "resweep" else "stream"
    if plan.problem.wants_gradient:
        assert plan.kind == expected_kind, f"wanted {kind}, planned {plan}"
        assert (len(plan.chunks) == 1) == (kind == "stream"), f"wanted {kind}, planned {plan}"
    return workspace, plan


def require_backend(name: str) -> str:
    """The name, once it is sure that the backend runs here: a test must not pass because its backend is missing."""
    is_available, reason = get_backend(name).available()
    assert is_available, f"{name}: {reason}"
    return name
