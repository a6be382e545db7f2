"""One grid for every backend: each contract function against float64, for every feature it fuses.

The truth is PyTorch's autograd in float64 on the same (already rounded) inputs. The tolerance of an element is
the error that plain PyTorch makes there in the same dtype (statistics in float32), plus one rounding of the output
and a floor of a few float32 units: never a round number that happens to pass.

Which problems, and why these suffice: `tests.row_cases`. The moments of a row and the entropy in its residual:
`tests.moment_grid`; what works on tokens rather than on logits: `tests.token_grid`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slime_fused.backends.base import (
    Backend,
    HeadTransform,
    LogitsBlock,
    Moments,
    RowFactors,
    RowStats,
    TokenStats,
    VocabStats,
    acc_dtype,
)
from tests.row_cases import DTYPES, NLL, PLAIN_HEAD, RowCase, TokenLoss, row_cases

__all__ = ["DTYPES", "NLL", "PLAIN_HEAD", "RowCase", "TokenLoss", "row_cases"]


def xfail_unless_taken(
    backend: Backend,
    device: torch.device,
    head: HeadTransform = PLAIN_HEAD,
    *,
    moments: bool = False,
    entropy: bool = False,
) -> None:
    """End a test, as one that is expected to fail, of arguments that the kernels of ``backend`` do not have."""
    if head.temperature == 1.0 and not moments and not entropy:
        return
    rows = torch.zeros(8, 1, device=device).unbind()
    block = LogitsBlock(
        torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device), None, head
    )
    try:
        if entropy:
            factors = RowFactors(None, rows[3], rows[4])
            backend.residual_from_stats(block, torch.zeros_like(block.logits), NLL, RowStats(*rows[:3]), factors)
        else:
            backend.logits_stats(block, VocabStats(*rows[:4], Moments(*rows[4:7]) if moments else None))
    except TypeError as error:
        pytest.xfail(f"{backend.name}: {str(error).splitlines()[0]}")


def expected_logits(raw: Tensor, bias: Tensor | None, head: HeadTransform) -> Tensor:
    """(M, V) products -> the logits of the softmax, in their dtype."""
    z = raw if bias is None else raw + bias
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature


def expected_rows(
    raw: Tensor, bias: Tensor | None, labels: Tensor, head: HeadTransform, token_loss: TokenLoss
) -> dict[str, Tensor]:
    """Residual, lse, logp and loss of (M, V) products by autograd in their dtype."""
    raw = raw.detach().requires_grad_()
    z = expected_logits(raw, bias, head)
    keep = labels >= 0
    lse = torch.logsumexp(z, 1)
    # Not z - lse: the rounding of lse would be as large as what a float64 backend may err.
    logp = torch.log_softmax(z, 1).gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    eps = token_loss.label_smoothing
    loss = -(1 - eps) * logp
    if eps or token_loss.z_loss:
        loss = loss + eps * (lse - z.mean(1)) + token_loss.z_loss * lse**2
    (loss * keep).sum().backward()
    assert raw.grad is not None
    return {
        "residual": raw.grad,
        "lse": (lse * keep).detach(),
        "logp": (logp * keep).detach(),
        "loss": (loss * keep).detach(),
    }


@dataclass
class RowData:
    """Tensors of a case, and the truth about them."""

    case: RowCase
    device: torch.device
    raw: Tensor = field(init=False)
    labels: Tensor = field(init=False)
    bias: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        c = self.case
        generator = torch.Generator().manual_seed(c.rows * 7919 + c.vocab)
        pitch = c.pitch or c.vocab
        values = c.spread * torch.randn(c.rows, pitch, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, c.vocab, (c.rows,), generator=generator)
        if c.name.startswith("likely_labels"):
            labels = values[:, : c.vocab].argmax(1)
        labels[list(c.ignored)] = -1
        bias = torch.randn(c.vocab, generator=generator).to(c.dtype)
        self.raw = values.to(c.dtype).to(self.device)[:, : c.vocab]
        self.labels = labels.to(self.device)
        self.bias = bias.to(self.device) if c.has_bias else None

    def empty_rows(self, count: int) -> tuple[Tensor, ...]:
        """Poisoned (M,) outputs: an element nobody wrote shows as NaN."""
        shape = (count, self.case.rows)
        return torch.full(shape, torch.nan, dtype=acc_dtype(self.case.dtype), device=self.device).unbind()

    def token_stats(self) -> TokenStats:
        """Poisoned."""
        return TokenStats(*self.empty_rows(4))

    def block(self, begin: int = 0, end: int | None = None) -> LogitsBlock:
        """The columns begin to end."""
        bias = None if self.bias is None else self.bias[begin:end].contiguous()
        return LogitsBlock(self.raw[:, begin:end], self.labels, bias, self.case.head, begin, self.case.vocab)

    def blocks(self, shards: int) -> list[slice]:
        """The columns of so many blocks, but for empty ones."""
        bounds = [self.case.vocab * i // shards for i in range(shards + 1)]
        return [slice(a, b) for a, b in pairwise(bounds) if b > a]

    def row_scale(self) -> Tensor:
        """(M,) factors of both signs."""
        return torch.linspace(-2, 3, max(self.case.rows, 1), device=self.device)[: self.case.rows].to(
            acc_dtype(self.case.dtype)
        )

    def expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Residual, lse, logp and loss by autograd in ``dtype``, on the CPU."""
        bias = None if self.bias is None else self.bias.cpu().to(dtype)
        return expected_rows(
            self.raw.cpu().to(dtype), bias, self.labels.cpu(), self.case.head, self.case.token_loss
        )

    def check(self, name: str, got: Tensor, scale: Tensor | None = None) -> None:
        """Assert that ``got`` is as near to the truth as plain PyTorch is, plus a rounding and a floor."""
        truth = self.expected(torch.float64)[name]
        plain = self.expected(acc_dtype(self.case.dtype))[name]
        if scale is not None:
            truth = truth * scale.cpu().double()[:, None]
            plain = plain * scale.cpu().to(plain.dtype)[:, None]
        assert_as_exact(got, truth, plain, name)


def assert_as_exact(
    got: Tensor, truth: Tensor, plain: Tensor, name: str = "result", slack: Tensor | float = 0.0
) -> None:
    """|got - truth| <= |plain - truth| + a rounding of the output dtype + a few units of acc dtype + slack."""
    got64 = got.detach().cpu().double()
    unit = torch.finfo(acc_dtype(got.dtype)).eps
    rounding = torch.finfo(got.dtype).eps / 2 if got.dtype != acc_dtype(got.dtype) else 0.0
    smallest = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    magnitude = truth.abs().clamp(max=1e30)
    tolerance = (plain.double() - truth).abs() + (rounding * 1.01 + 32 * unit) * magnitude + 8 * unit + smallest
    tolerance = tolerance + slack
    error = (got64 - truth).abs()
    worst = (error - tolerance).nan_to_num(nan=torch.inf)
    same = (got64 == truth) | (got64.isnan() & truth.isnan())
    bad = (worst > 0) & ~same
    if bad.any():
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{name}{where}: got {got64[where].item():.9g}, truth {truth[where].item():.9g}, "
            f"plain PyTorch {plain[where].item():.9g}, tolerance {tolerance[where].item():.3g} "
            f"({int(bad.sum())} of {bad.numel()} elements)"
        )


def check_softmax_residual(backend: Backend, case: RowCase, device: torch.device) -> None:
    """In place and out of place give the same bits, the truth's numbers, and leave the padding alone."""
    xfail_unless_taken(backend, device, case.head)
    data = RowData(case, device)
    stats = data.token_stats()
    out = torch.full_like(data.raw, torch.nan)
    backend.softmax_residual(data.block(), out, case.token_loss, stats)
    lse = stats.row_max + stats.row_sum.log()
    for name, got in (("residual", out), ("lse", lse), ("logp", stats.logp), ("loss", stats.loss)):
        data.check(name, got)
    again = RowData(case, device)
    pitch = again.raw.stride(0) if case.rows else case.vocab
    whole = again.raw.as_strided((case.rows, pitch), (pitch, 1))
    padding = whole[:, case.vocab :].clone()
    without_loss = RowStats(*again.empty_rows(3))
    backend.softmax_residual(again.block(), again.raw, case.token_loss, without_loss)
    assert torch.equal(again.raw, out)
    for got, expected in zip(vars(without_loss).values(), (stats.row_max, stats.row_sum, stats.logp), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(whole[:, case.vocab :], padding)


def check_stats_then_residual(backend: Backend, case: RowCase, device: torch.device, shards: int) -> None:
    """Statistics merged over ``shards`` blocks of columns, then the residual of each block from them."""
    xfail_unless_taken(backend, device, case.head)
    data = RowData(case, device)
    stats = VocabStats(*data.empty_rows(4))
    for cols in data.blocks(shards):
        backend.logits_stats(data.block(cols.start, cols.stop), stats, merge=cols.start > 0)
    keep = data.labels >= 0
    all_lse = stats.row_max + stats.row_sum.log()
    lse = all_lse * keep
    logp = (stats.label_logit - stats.row_max - stats.row_sum.log()) * keep
    eps = case.token_loss.label_smoothing
    uniform = all_lse - stats.logit_sum / case.vocab
    loss = -(1 - eps) * logp + (eps * uniform + case.token_loss.z_loss * lse**2) * keep
    for name, got in (("lse", lse), ("logp", logp), ("loss", loss)):
        data.check(name, got)
    known = RowStats(stats.row_max, stats.row_sum, logp)
    for scale in (None, data.row_scale()):
        out = torch.full_like(data.raw, torch.nan)
        for cols in data.blocks(shards):
            block = data.block(cols.start, cols.stop)
            backend.residual_from_stats(block, out[:, cols], case.token_loss, known, RowFactors(scale))
        data.check("residual", out, scale)


def check_extreme_logits(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    """Masked vocabulary (-inf), huge logits, certain and impossible labels, and NaN."""
    big = 1e4
    rows = [
        [0.0, 1.0, -torch.inf, 2.0],  # masked vocabulary
        [-torch.inf, -torch.inf, 5.0, -torch.inf],  # one survivor: probability 1 at the label
        [big, -big, 0.0, 1.0],  # probability 1 at the label
        [big, -big, 0.0, 1.0],  # probability 0 at the label
        [-big, -big, -big, -big],
        [0.0, torch.nan, 1.0, 2.0],
        [-torch.inf] * 4,
    ]
    labels = torch.tensor([3, 2, 0, 1, 2, 0, 0], device=device)
    raw = torch.tensor(rows, dtype=torch.float64).to(dtype).to(device)
    stats = TokenStats(*torch.full((4, len(rows)), torch.nan, dtype=acc_dtype(dtype), device=device).unbind())
    out, logp = torch.full_like(raw, torch.nan), stats.logp
    block = LogitsBlock(raw, labels, None, PLAIN_HEAD)
    backend.softmax_residual(block, out, NLL, stats)
    lse = stats.row_max + stats.row_sum.log()
    z = raw.cpu().double()
    truth_lse = torch.logsumexp(z, 1)
    at_label = labels.cpu()[:, None]
    truth_logp = torch.log_softmax(z, 1).gather(1, at_label).squeeze(1)
    truth = torch.softmax(z, 1) - F.one_hot(labels.cpu(), 4)
    finite = slice(0, 5)
    assert_as_exact(lse[finite], truth_lse[finite], truth_lse[finite].to(lse.dtype), "lse")
    assert_as_exact(logp[finite], truth_logp[finite], truth_logp[finite].to(lse.dtype), "logp")
    assert_as_exact(out[finite], truth[finite], truth[finite], "residual")
    assert lse[5].isnan()
    assert out[5].isnan().all()
    assert not logp[5].isfinite()
    assert not logp[6].isfinite()
    # From statistics, as exact: no log-sum-exp was rounded to one number on the way.
    again = torch.full_like(raw, torch.nan)
    backend.residual_from_stats(block, again, NLL, stats)
    assert_as_exact(again[finite], truth[finite], truth[finite], "residual from statistics")
    assert again[5].isnan().all()


SCALES_AT_THE_EDGE = ((0.0, 1.0), (-0.7, 1.0), (4.0, 1.0), (-1e5, 1 / 64))
"""(scale, what the logits are multiplied by before it): the last one's gradients are beyond float16."""


def check_extreme_scales(backend: Backend, dtype: torch.dtype, device: torch.device, softcap: float | None) -> None:
    """Numbers and NaN as plain PyTorch gives them where a scale meets -inf or the ends of float16.

    -inf times 0 is NaN and times a negative scale +inf, and with either a row has no probabilities, unless a soft
    cap bounds the +inf. Logits are scaled in float32, where no product of float16 overflows; a gradient may.
    """
    rows = [
        [0.0, 1.0, -torch.inf, 2.0],
        [65504.0, -65504.0, 0.0, 1.0],
        [65504.0, 65440.0, 0.0, -65504.0],
        [0.0] * 4,
    ]
    labels = torch.tensor([3, 0, 1, 2])
    for scale, shrink in SCALES_AT_THE_EDGE:
        raw = torch.tensor(rows).mul(shrink).to(dtype)
        head, acc = HeadTransform(scale=scale, softcap=softcap), acc_dtype(dtype)
        truth, plain = (expected_rows(raw.to(wide), None, labels, head, NLL) for wide in (torch.float64, acc))
        stats = TokenStats(*torch.full((4, len(rows)), torch.nan, dtype=acc, device=device).unbind())
        block = LogitsBlock(raw.to(device), labels.to(device), None, head)
        out = [torch.full_like(block.logits, torch.nan) for _ in range(2)]
        backend.softmax_residual(block, out[0], NLL, stats)
        backend.residual_from_stats(block, out[1], NLL, stats)
        for name, got in (("residual", out[0]), ("residual", out[1]), ("logp", stats.logp), ("loss", stats.loss)):
            fits = truth[name].to(got.dtype).isfinite() | truth[name].isnan()
            beyond = truth[name].masked_fill(~fits, torch.inf).copysign(truth[name])
            assert_as_exact(got, beyond, plain[name], f"{name} at scale {scale}")


def check_target_does_not_cancel(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    """At p = 0.999 the label's entry keeps its relative precision: softmax - 1 in 16 bits would lose all of it."""
    gap = torch.tensor([0.999, 0.9999, 0.99999], dtype=torch.float64).logit()
    raw = torch.stack([gap, torch.zeros(3, dtype=torch.float64)], 1).to(dtype).to(device)
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    stats = RowStats(*torch.empty(3, 3, dtype=acc_dtype(dtype), device=device).unbind())
    out = torch.full_like(raw, torch.nan)
    backend.softmax_residual(LogitsBlock(raw, labels, None, PLAIN_HEAD), out, NLL, stats)
    truth = torch.expm1(torch.log_softmax(raw.cpu().double(), 1)[:, 0])
    # lse - z carries an absolute error of a unit of lse (about 10), which is relative to 1 - p here.
    slack = 16 * torch.finfo(acc_dtype(dtype)).eps
    rounding = torch.finfo(dtype).eps
    assert ((out[:, 0].cpu().double() - truth).abs() <= rounding * truth.abs() + slack).all()
