"""The problems of the row kernels that every backend is given: each feature, scale and size, in every dtype.

Why these suffice: V = 1 and 2 (no vector at all), 37 (tails only), 1000 (vectors and a tail, rows off alignment in
a padded pitch), 4096 (aligned, several visits per thread) walk every branch of a row loop; M runs from 0 over 1 to
more rows than a small grid; each fused feature (bias, scale, soft cap, smoothing, z-loss, ignored rows) is on alone
and all are on together. A temperature below and above 1 meets each of the two paths that it takes, in the scale and
after a soft cap: 0.5 is a power of two, which rounds nothing, 3 is not. Scales below 0 turn the order of the
logits round and a scale of 0 makes them all equal: a row's tail, which no logit fills, must stay out of the
statistics then too, so both meet tails and full blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from slime_fused.backends.base import HeadTransform, TokenLoss

PLAIN_HEAD = HeadTransform()
NLL = TokenLoss()


@dataclass(frozen=True)
class RowCase:
    """One problem of the row kernels."""

    name: str
    rows: int = 5
    vocab: int = 37
    pitch: int = 0
    """Elements between rows; 0: no padding."""
    dtype: torch.dtype = torch.float32
    has_bias: bool = False
    head: HeadTransform = PLAIN_HEAD
    token_loss: TokenLoss = NLL
    ignored: tuple[int, ...] = ()
    spread: float = 3.0
    """Standard deviation of the logits."""


FEATURES = (
    RowCase("plain"),
    RowCase("bias", has_bias=True),
    RowCase("scale", head=HeadTransform(scale=0.25)),
    RowCase("softcap", head=HeadTransform(softcap=5.0)),
    RowCase("scale_softcap_bias", has_bias=True, head=HeadTransform(scale=2.0, softcap=10.0)),
    RowCase("temperature", head=HeadTransform(temperature=0.5)),
    RowCase("high_temperature_scale_bias", has_bias=True, head=HeadTransform(scale=-0.25, temperature=3.0)),
    RowCase("softcap_temperature", head=HeadTransform(softcap=5.0, temperature=0.5), ignored=(2,)),
    RowCase(
        "all_temperature",
        vocab=1000,
        pitch=1003,
        has_bias=True,
        head=HeadTransform(scale=2.0, softcap=10.0, temperature=3.0),
        token_loss=TokenLoss(0.2, 0.02),
    ),
    RowCase("smoothing", token_loss=TokenLoss(label_smoothing=0.1)),
    RowCase("z_loss", token_loss=TokenLoss(z_loss=0.01)),
    RowCase(
        "all",
        has_bias=True,
        head=HeadTransform(scale=0.5, softcap=8.0),
        token_loss=TokenLoss(0.2, 0.02),
        ignored=(0, 3),
    ),
    RowCase("ignored", ignored=(1, 4)),
    RowCase("likely_labels", spread=12.0),
)
SIZES = (
    RowCase("no_rows", rows=0),
    RowCase("one_column", vocab=1),
    RowCase("two_columns", vocab=2, rows=3),
    RowCase("unaligned_rows", vocab=1000, pitch=1003, rows=7),
    RowCase("aligned", vocab=4096, rows=3),
    RowCase("many_rows", vocab=64, rows=300),
)
EXTRAS = TokenLoss(0.2, 0.02)
SCALES = (
    RowCase("negative_scale", head=HeadTransform(scale=-0.7)),
    RowCase("zero_scale", head=HeadTransform(scale=0.0)),
    RowCase("negative_scale_aligned", vocab=4096, rows=3, head=HeadTransform(scale=-0.7), token_loss=EXTRAS),
    RowCase("zero_scale_aligned", vocab=4096, rows=3, head=HeadTransform(scale=0.0), token_loss=EXTRAS),
    RowCase(
        "negative_scale_unaligned",
        vocab=1000,
        pitch=1003,
        has_bias=True,
        head=HeadTransform(scale=-0.7),
        token_loss=EXTRAS,
        ignored=(2,),
    ),
    RowCase("zero_scale_bias", has_bias=True, head=HeadTransform(scale=0.0), token_loss=EXTRAS, ignored=(2,)),
    RowCase("negative_softcap", has_bias=True, head=HeadTransform(scale=-0.7, softcap=5.0), token_loss=EXTRAS),
    RowCase("zero_softcap", vocab=1000, head=HeadTransform(scale=0.0, softcap=5.0), token_loss=EXTRAS),
    RowCase("negative_one_column", vocab=1, head=HeadTransform(scale=-0.7)),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def row_cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[RowCase]:
    """Every feature, size and scale, in every dtype."""
    return [
        replace(c, dtype=d, name=f"{c.name}-{str(d)[6:]}") for d in dtypes for c in (*FEATURES, *SIZES, *SCALES)
    ]
