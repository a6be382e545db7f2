"""Calls with ``return_stats`` beside the reference: what the tests of token statistics share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import slime_fused as sf
from slime_fused import reference
from slime_fused.autograd.token_losses import STATISTICS
from slime_fused.engine.plan import Plan
from tests.support import Batch, Result, assert_close, floor_of

ROWS = {"kept": 1000, "several": 7, "row_by_row": 1}
"""Rows that the workspace holds."""
USES = {"both": (1.0, 0.5), "logps": (1.0, None), "entropy": (None, -2.0), "mostly_entropy": (1e-3, 7.0)}
"""What the two are multiplied with on their way into a loss."""
ALL = ("hidden", "weight", "bias")
HEAD = {"logit_scale": 1.5, "logit_softcap": 8.0, "temperature": 0.7}
CE = {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.01}


def like_labels(batch: Batch, factor: float) -> Tensor:
    """One coefficient per token, of both signs and with zeros."""
    shape, device = batch.labels.shape, batch.labels.device
    values = torch.linspace(-2, 3, shape.numel(), dtype=torch.float64, device=device).reshape(shape)
    return factor * values.where(values.abs() > 0.2, 0)


def run(
    function: Callable[..., sf.TokenStatistics],
    batch: Batch,
    *,
    use: tuple[float | None, float | None] = USES["both"],
    wanted: tuple[str, ...] = ALL,
    statistics: tuple[str, ...] = STATISTICS,
    **options: Any,
) -> Result:
    """Everything that a call tells, and the gradients of its losses and entropies times `like_labels`."""
    leaves = batch.leaves(wanted)
    out = leaves.call(function, return_stats=statistics, **options)
    own = "losses" if out.logps is None else "logps"
    outputs = {name: getattr(out, name) for name in (own, *statistics)}
    assert all(getattr(out, name) is None for name in {*STATISTICS, "logps", "losses"} - outputs.keys())
    for name, value in outputs.items():
        assert value.shape == batch.labels.shape
        assert value.dtype == torch.bool if name == "is_top1" else value.dtype in (torch.float32, torch.float64)
        assert not value.requires_grad or name in (own, "entropy"), name
    inputs = {name: x for name, x in leaves.tensors().items() if name in wanted}
    pairs = [(outputs.get(name), factor) for name, factor in zip((own, "entropy"), use, strict=True)]
    used = [(x, like_labels(batch, factor).to(x.dtype)) for x, factor in pairs if x is not None and factor]
    outcomes, coefficients = zip(*used, strict=True)
    grads = torch.autograd.grad(outcomes, list(inputs.values()), coefficients) if inputs else ()
    return Result({name: x.detach() for name, x in outputs.items()}, dict(zip(inputs, grads, strict=True)))


def assert_as_exact(
    batch: Batch,
    *,
    function: str = "linear_logprobs",
    options: dict[str, Any] | None = None,
    roundings: float = 1.0,
    call: Callable[..., Any] | None = None,
    **how: Any,
) -> Result:
    """As `tests.support.assert_as_exact_as_plain`; a rank may differ where rounding decides it."""
    options = options or {}
    both = {k: how[k] for k in ("use", "wanted", "statistics") if k in how}
    plain = getattr(reference, function)
    truth = run(plain, batch.to(torch.float64), **options, **both)
    naive = run(plain, batch, **options, **both)
    got = run(call or getattr(sf, function), batch, **options, **how)
    eps = roundings * floor_of(batch.hidden.dtype)
    for name, value in got.outputs.items():
        exact = truth.outputs[name]
        if name == "is_top1":
            assert torch.equal(value, exact) or batch.hidden.dtype.itemsize < 4
            assert (value != exact).sum() <= (naive.outputs[name] != exact).sum() + 1
        else:
            assert_close(name, value, naive.outputs[name], exact, eps, smallest=1.0)
    assert got.grads.keys() == truth.grads.keys()
    for name, grad in got.grads.items():
        assert grad.dtype == batch.tensors()[name].dtype
        assert_close(f"d_{name}", grad, naive.grads[name], truth.grads[name], eps)
    return got


def assert_told(stats: sf.TokenStatistics, batch: Batch, **options: Any) -> None:
    """What came beside a loss of units is what the reference tells, without a gradient."""
    truth = batch.to(torch.float64).call(reference.linear_logprobs, return_stats=STATISTICS, **options)
    plain = batch.call(reference.linear_logprobs, return_stats=STATISTICS, **options)
    assert stats.losses is None
    for name in ("logps", *STATISTICS):
        value, exact = getattr(stats, name), getattr(truth, name)
        assert not value.requires_grad
        if name == "is_top1":
            assert value.dtype == torch.bool
            assert (value != exact).sum() <= (plain.is_top1 != exact).sum() + (batch.hidden.dtype.itemsize < 4)
        else:
            assert_close(name, value, getattr(plain, name), exact, floor_of(batch.hidden.dtype), smallest=1.0)


def plan_of(batch: Batch, workspace: int | str, statistics: tuple[str, ...] = STATISTICS, **options: Any) -> Plan:
    return batch.call(sf.explain_plan, loss="token", workspace=workspace, return_stats=statistics, **options)


def workspace_of(rows: int, batch: Batch) -> int:
    return rows * plan_of(batch, "1GiB").problem.row_bytes
