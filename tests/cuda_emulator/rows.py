"""Rows of logits for the kernels' bindings as they are, with addresses, and the truth about them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = tuple(CODES)
WITHOUT_MOMENTS = ("row_max", "row_sum", "label_logit", "logit_sum")
MOMENTS = ("centred_sum", "square_sum", "max_before")
FIRST, LAST, TIED_BEFORE, TIED_AFTER, MASKED, IGNORED, ALL_MASKED = range(7)


@dataclass(frozen=True)
class Case:
    name: str
    vocab: int = 37
    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0
    has_bias: bool = False
    centre: float = 0.0
    """What all logits have in common."""

    def z(self, raw: Tensor, bias: Tensor | None) -> Tensor:
        y = (raw if bias is None else raw + bias) * self.scale
        if self.softcap:
            y = self.softcap * torch.tanh(y / self.softcap)
        return y / self.temperature


CASES = (
    Case("plain"),
    Case("one_column", vocab=1, temperature=0.5),
    Case("two_columns", vocab=2),
    Case("unaligned", vocab=1003, has_bias=True),
    Case("wide", vocab=20_003, scale=0.5),
    Case("wide_softcap", vocab=20_003, softcap=6.0, temperature=1.5),
    Case("negative_scale", scale=-0.7, has_bias=True),
    Case("zero_scale", scale=0.0),
    Case("softcap", softcap=5.0, scale=2.0, has_bias=True),
    Case("cold", temperature=0.01),
    Case("hot", temperature=100.0, has_bias=True),
    Case("cold_softcap", softcap=5.0, temperature=0.01),
    Case("hot_softcap", softcap=5.0, temperature=100.0, scale=-1.0),
    Case("near_5e4", vocab=203, centre=5e4),
    Case("near_5e4_cold_softcap", vocab=203, centre=2.0, softcap=500.0, temperature=0.01),
)


class Rows:
    """Seven rows of one case, in a padded pitch that moves them off alignment."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(case.vocab)
        vocab = case.vocab
        values = case.centre + 3 * torch.randn(7, vocab + 3, generator=generator, dtype=torch.float64)
        labels = torch.randint(vocab, (7,), generator=generator)
        labels[FIRST], labels[LAST], labels[IGNORED] = 0, vocab - 1, -1
        self.case, self.dtype = case, dtype
        self.bias = torch.randn(vocab, generator=generator).to(dtype) if case.has_bias else None
        self.raw = values.to(dtype)[:, :vocab]
        # The largest logit again, before the label and after it; the bias is the same at all three places.
        label, before, after = vocab // 2, vocab // 4, vocab - 1
        labels[[TIED_BEFORE, TIED_AFTER]] = label
        beyond = (case.centre + 24) * (1.1 if case.scale >= 0 else -1.1)
        self.raw[TIED_BEFORE, [before, label]] = beyond
        self.raw[TIED_AFTER, [label, after]] = beyond
        if self.bias is not None:
            self.bias[[before, label, after]] = 0
        self.labels = labels
        self.has_masks = case.scale > 0 and not case.softcap
        self.label_smoothing = 0.0 if self.has_masks else 0.1  # the mean of logits is then -inf
        if self.has_masks:
            self.raw[MASKED, ::2] = self.raw[ALL_MASKED] = -torch.inf

    def z(self, dtype: torch.dtype) -> Tensor:
        """The logits, formed in ``dtype``."""
        return self.case.z(self.raw.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def head(self, begin: int = 0) -> dict[str, Any]:
        case = self.case
        bias = 0 if self.bias is None else self.bias.data_ptr() + begin * self.bias.element_size()
        return {"bias": bias, "scale": case.scale, "softcap": case.softcap, "temperature": case.temperature}

    def stats(
        self, native: Any, blocks: int = 1, names: tuple[str, ...] = WITHOUT_MOMENTS + MOMENTS
    ) -> dict[str, Tensor]:
        """What logits_stats writes, merged over ``blocks`` blocks of columns."""
        bounds = [self.case.vocab * i // blocks for i in range(blocks + 1)]
        return self.stats_between([(a, b) for a, b in pairwise(bounds) if a < b], native, names)

    def stats_between(
        self, spans: list[tuple[int, int]], native: Any, names: tuple[str, ...] = WITHOUT_MOMENTS + MOMENTS
    ) -> dict[str, Tensor]:
        found = {name: torch.full((len(self.raw),), torch.nan) for name in names}
        for begin, end in spans:
            native.cuda.logits_stats(
                logits=self.raw[:, begin:].data_ptr(),
                rows=len(self.raw),
                cols=end - begin,
                logits_stride=self.raw.stride(0),
                col_offset=begin,
                dtype=CODES[self.dtype],
                labels=self.labels.data_ptr(),
                **self.head(begin),
                **{name: tensor.data_ptr() for name, tensor in found.items()},
                merge=begin != spans[0][0],
                device=0,
                stream=0,
            )
        return found

    def residual(
        self,
        native: Any,
        stats: dict[str, Tensor],
        out_dtype: torch.dtype,
        blocks: int = 1,
        **scales: Tensor | None,
    ) -> Tensor:
        """What residual_from_stats writes; ``scales``: row_scale, entropy, entropy_scale."""
        vocab = self.case.vocab
        out = torch.full((len(self.raw), vocab), torch.nan, dtype=out_dtype)
        logp = stats["label_logit"] - stats["row_max"] - stats["row_sum"].log()
        bounds = [vocab * i // blocks for i in range(blocks + 1)]
        for begin, end in pairwise(bounds):
            if begin == end:
                continue
            native.cuda.residual_from_stats(
                logits=self.raw[:, begin:].data_ptr(),
                out=out[:, begin:].data_ptr(),
                rows=len(self.raw),
                cols=end - begin,
                logits_stride=self.raw.stride(0),
                out_stride=vocab,
                col_offset=begin,
                vocab_size=vocab,
                dtype=CODES[self.dtype],
                out_dtype=CODES[out_dtype],
                labels=self.labels.data_ptr(),
                **self.head(begin),
                label_smoothing=self.label_smoothing,
                z_loss=0.02,
                row_max=stats["row_max"].data_ptr(),
                row_sum=stats["row_sum"].data_ptr(),
                logp=logp.data_ptr(),
                **{name: 0 if tensor is None else tensor.data_ptr() for name, tensor in scales.items()},
                device=0,
                stream=0,
            )
        return out


def rows_with_probabilities(case: Case, dtype: torch.dtype) -> Rows:
    """Whose residual is finite: no row is -inf throughout, or at its label."""
    rows = Rows(case, dtype)
    if rows.has_masks:
        rows.raw[[MASKED, ALL_MASKED]] = rows.raw[[LAST, FIRST]]
        rows.raw[MASKED, 1::2] = -torch.inf
        rows.labels[MASKED] = 0
    return rows


def moments_of(z: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The statistics by their definitions, in the dtype of ``z``."""
    row_max = z.max(1).values
    centred = (z - row_max[:, None]).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    e = centred.exp()
    e_centred = (e * centred).masked_fill(e == 0, 0.0)
    before = torch.arange(z.shape[1]) < labels[:, None]
    found = {
        "row_max": row_max,
        "row_sum": e.sum(1),
        "centred_sum": e_centred.sum(1),
        "square_sum": (e * e).sum(1),
        "max_before": z.masked_fill(~before, -torch.inf).max(1).values,
        "label_logit": z.gather(1, labels.clamp(min=0)[:, None])[:, 0] * (labels >= 0),
    }
    return found | {"entropy": entropy_of(found)}


def entropy_of(stats: dict[str, Tensor]) -> Tensor:
    return stats["row_sum"].log() - stats["centred_sum"] / stats["row_sum"]


def assert_near(got: Tensor, truth: Tensor, plain: Tensor, name: str) -> None:
    """Within a row's largest error of plain float32, one rounding, and a few units of its largest element."""
    got64 = got.double()
    if got.dim() == 1:
        got64, truth, plain = got64[:, None], truth[:, None], plain[:, None]
    same = (got64 == truth) | (got64.isnan() & truth.isnan())
    largest = truth.abs().nan_to_num(nan=0.0, posinf=0.0).amax(1, keepdim=True)
    rounding = torch.finfo(got.dtype).eps / 2 if got.dtype != torch.float32 else 0.0
    by_plain = (plain.double() - truth).abs().amax(1, keepdim=True)
    tolerance = 2 * by_plain + 16 * torch.finfo(torch.float32).eps * largest + 1.01 * rounding * truth.abs() + 1e-7
    error = (got64 - truth).abs()
    bad = ~(error <= tolerance) & ~same
    if bad.any():
        i, j = (int(x) for x in bad.nonzero()[0])
        raise AssertionError(
            f"{name}[{i}, {j}]: got {got64[i, j].item():.9g}, truth {truth[i, j].item():.9g}, plain "
            f"{plain[i, j].item():.9g}, tolerance {tolerance[i, 0].item():.3g} ({int(bad.sum())} of {bad.numel()})"
        )


def d_raw(rows: Rows, dtype: torch.dtype, row_scale: Tensor | None, entropy_scale: Tensor) -> Tensor:
    """The gradient of the sum over rows of row_scale * loss + entropy_scale * entropy, by autograd."""
    raw = rows.raw.clone().to(dtype).requires_grad_()
    z = rows.case.z(raw, None if rows.bias is None else rows.bias.to(dtype))
    z = z.masked_fill(rows.labels[:, None] < 0, 0.0)
    lse, logps = torch.logsumexp(z, 1), torch.log_softmax(z, 1)
    logp = logps.gather(1, rows.labels.clamp(min=0)[:, None])[:, 0]
    counted = logps.clamp(min=-1e30)  # where p is 0
    entropy = -(logps.exp() * counted).sum(1)
    loss = 0.02 * lse**2 - (1 - rows.label_smoothing) * logp
    if rows.label_smoothing:
        loss = loss + rows.label_smoothing * (lse - z.mean(1))
    scale = torch.ones(len(raw)) if row_scale is None else row_scale
    (scale.to(dtype) * loss + entropy_scale.to(dtype) * entropy)[rows.labels >= 0].sum().backward()
    assert raw.grad is not None
    return raw.grad


def softmax_residual(native: Any, rows: Rows, plan: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(residual, logp, loss)"""
    out = torch.full(rows.raw.shape, torch.nan, dtype=rows.dtype)
    row_max, row_sum, logp, loss = torch.full((4, len(rows.raw)), torch.nan)
    native.cuda.softmax_residual(
        logits=rows.raw.data_ptr(),
        out=out.data_ptr(),
        rows=len(out),
        cols=rows.case.vocab,
        logits_stride=rows.raw.stride(0),
        out_stride=out.stride(0),
        dtype=CODES[rows.dtype],
        out_dtype=CODES[rows.dtype],
        labels=rows.labels.data_ptr(),
        **rows.head(),
        label_smoothing=rows.label_smoothing,
        z_loss=0.02,
        row_max=row_max.data_ptr(),
        row_sum=row_sum.data_ptr(),
        logp=logp.data_ptr(),
        loss=loss.data_ptr(),
        plan=plan,
        device=0,
        stream=0,
    )
    return out, logp, loss
