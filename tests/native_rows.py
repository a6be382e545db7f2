"""The native CPU kernels on tensors, with every argument they take, and what plain PyTorch makes of the same."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from slime_fused.backends.base import acc_dtype
from slime_fused.backends.native import _C, DTYPE_CODES

INF = float("inf")
DTYPES = tuple(DTYPE_CODES)
MOMENTS = ("centred_sum", "square_sum", "max_before")
STATS = ("row_max", "row_sum", "label_logit", "logit_sum", *MOMENTS)


@dataclass(frozen=True)
class Head:
    """The transform of a head, as the native functions take it."""

    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0
    has_bias: bool = False

    def bias(self, cols, dtype):
        generator = torch.Generator().manual_seed(9)
        return torch.randn(cols, generator=generator).round().to(dtype) if self.has_bias else None

    def logits(self, raw, bias):
        """z of raw products, in their dtype."""
        y = self.scale * (raw if bias is None else raw + bias.to(raw.dtype))
        return (self.softcap * torch.tanh(y / self.softcap) if self.softcap else y) / self.temperature

    def args(self):
        return {"scale": self.scale, "softcap": self.softcap, "temperature": self.temperature}


HEADS = (
    Head(),
    Head(temperature=0.01),
    Head(temperature=100.0),
    Head(scale=-0.7, temperature=0.5, has_bias=True),
    Head(scale=0.0, temperature=2.0),
    Head(scale=1.5, softcap=8.0, temperature=0.7, has_bias=True),
    Head(scale=-2.0, softcap=3.0, temperature=0.01),
    Head(scale=0.5, softcap=30.0, temperature=100.0),
)


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def block_args(logits, labels, bias, head, threads):
    return {
        "logits": address(logits), "rows": logits.shape[0], "cols": logits.shape[1],
        "logits_stride": logits.stride(0), "dtype": DTYPE_CODES[logits.dtype], "labels": address(labels),
        "bias": address(bias), "num_threads": threads, **head.args(),
    }  # fmt: skip


def stats_of(logits, labels, bias=None, head=HEADS[0], *, bounds=None, names=STATS, threads=1):
    """The named statistics, from one block of columns or merged from those between ``bounds``."""
    out = {name: torch.full((logits.shape[0],), 7.0, dtype=acc_dtype(logits.dtype)) for name in names}
    for begin, end in pairwise(bounds or (0, logits.shape[1])):
        part = None if bias is None else bias[begin:end]
        _C.cpu.logits_stats(
            **block_args(logits[:, begin:end], labels, part, head, threads), col_offset=begin, merge=begin > 0,
            **{"logit_sum": 0, **{name: address(tensor) for name, tensor in out.items()}},
        )  # fmt: skip
    return out


def elementwise(logits, bias, head):
    """z as the kernels round it: the maximum of each row of one column."""
    nobody = torch.full((logits.shape[0],), -1)
    columns = [
        stats_of(logits[:, v : v + 1], nobody, None if bias is None else bias[v : v + 1], head)["row_max"]
        for v in range(logits.shape[1])
    ]
    return torch.stack(columns, 1)


def moments(z):
    """Entropy and sum p^2 of rows of logits, p log p being 0 where p is."""
    logp = torch.log_softmax(z, 1)
    return {"entropy": -(logp.exp() * logp.clamp(min=-1e4)).sum(1), "sum_p2": logp.exp().square().sum(1)}


def moments_of(stats):
    """The same from the kernel's statistics."""
    return {
        "entropy": stats["row_sum"].log() - stats["centred_sum"] / stats["row_sum"],
        "sum_p2": stats["square_sum"] / stats["row_sum"].square(),
    }


def assert_close(got, exact, rounded, name, spread):
    """Within the worst error of plain PyTorch in acc dtype plus 16 roundings; ``spread``: the largest |z|.

    A rounding of z moves all that is derived from it by |z| roundings, in whatever order it was formed.
    """
    worst = (rounded.double() - exact).abs().max()
    eps = torch.finfo(acc_dtype(got.dtype)).eps
    floor = 16 * eps * (1 + spread) * (1 + exact.abs()) + 4 * torch.finfo(got.dtype).eps * exact.abs()
    error = (got.double() - exact).abs()
    assert (error <= worst + floor).all(), f"{name}: error {error.max():.3g}, plain PyTorch {worst:.3g}"


def problem(cols, dtype, head, *, masked=True):
    """Seven rows off alignment: labels first, last, in between and none; some logits -inf, one row nearly all."""
    generator = torch.Generator().manual_seed(cols)
    logits = (torch.randn(7, cols + 3, generator=generator) * 4).to(dtype)[:, 1 : cols + 1]
    if masked and head.scale > 0:
        logits[1, ::3] = -INF
        logits[2, 1:] = -INF
        logits[1, cols // 2] = logits[2, 0] = 1.0
    labels = torch.tensor([0, cols // 2, 0, cols - 1, cols // 3, -100, 2 * cols // 3])
    return logits, labels, head.bias(cols, dtype)


def residual_of(logits, labels, bias, head, stats, *, out, eps=0.0, z_loss=0.0, bounds=None, **factors):
    """The residual from a row's statistics, written block by block."""
    logp = (stats["label_logit"] - stats["row_max"]) - stats["row_sum"].log()
    given = {name: stats[name] for name in ("row_max", "row_sum")} | {"logp": logp, **factors}
    for begin, end in pairwise(bounds or (0, logits.shape[1])):
        part = None if bias is None else bias[begin:end]
        here = out[:, begin:end]
        _C.cpu.residual_from_stats(
            **block_args(logits[:, begin:end], labels, part, head, 2), out=address(here), out_stride=here.stride(0),
            out_dtype=DTYPE_CODES[out.dtype], col_offset=begin, vocab_size=logits.shape[1], label_smoothing=eps,
            z_loss=z_loss, **{"row_scale": 0, **{name: address(tensor) for name, tensor in given.items()}},
        )  # fmt: skip
    return out


def plain_gradient(logits, labels, bias, head, eps, z_loss, row_scale, entropy_scale, dtype):
    """d(sum of row_scale * token loss + entropy_scale * entropy)/d(raw logits) by autograd in ``dtype``."""
    raw = logits.to(dtype).detach().clone().requires_grad_()
    z = head.logits(raw, bias)
    logprobs = torch.log_softmax(z, 1)
    label_logp = logprobs.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    loss = -(1 - eps) * label_logp + z_loss * z.logsumexp(1) ** 2
    if eps:
        loss = loss - eps * logprobs.mean(1)
    value = loss * row_scale.to(dtype)
    if entropy_scale is not None:
        is_possible = logprobs > -INF
        entropy = -(logprobs.exp() * logprobs.masked_fill(~is_possible, 0)).sum(1)
        value = value + entropy * entropy_scale.to(dtype)
    (grad,) = torch.autograd.grad(value[labels >= 0].sum(), raw)
    return grad
