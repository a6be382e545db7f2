"""The Triton kernels with a tile size of the caller's, behind the contracts that the micro-benchmarks call.

Importing this imports Triton. With TRITON_INTERPRET=1 the kernels take CPU tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from slime_fused.triton_kernels import configs, linear_stats, rows
from slime_fused.triton_kernels.configs import LinearConfig, RowConfig
from torch import Tensor

from bench.micro.common import first_line, synchronize, time_ms
from slime_fused.backends.base import HeadTransform, TokenLoss

CHECKED_ROWS = 64
# Rows of torch.mm's slices, the yardstick of the fused head: what a chunk of the engine has.
PRODUCT_ROWS = 2048


class TritonRows:
    """The row kernels of `Backend`, with ``plan`` a `RowConfig`; the shipped one where it is left out."""

    def softmax_residual(
        self,
        logits: Tensor,
        out: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadTransform,
        token_loss: TokenLoss,
        *,
        row_max: Tensor,
        row_sum: Tensor,
        logp: Tensor,
        loss: Tensor | None,
        plan: RowConfig | None = None,
    ) -> None:
        """See `Backend.softmax_residual`."""
        rows.softmax_residual(
            logits, out, labels, bias, row_max, row_sum, logp, loss, scale=head.scale, softcap=head.softcap,
            label_smoothing=token_loss.label_smoothing, z_loss=token_loss.z_loss, config=plan or _shipped(logits),
        )  # fmt: skip

    def logits_stats(
        self,
        logits: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadTransform,
        *,
        col_offset: int,
        row_max: Tensor,
        row_sum: Tensor,
        label_logit: Tensor,
        logit_sum: Tensor | None,
        merge: bool,
        plan: RowConfig | None = None,
    ) -> None:
        """See `Backend.logits_stats`."""
        rows.logits_stats(
            logits, labels, bias, row_max, row_sum, label_logit, logit_sum, scale=head.scale, softcap=head.softcap,
            col_offset=col_offset, merge=merge, config=plan or _shipped(logits),
        )  # fmt: skip

    def residual_from_stats(
        self,
        logits: Tensor,
        out: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadTransform,
        token_loss: TokenLoss,
        *,
        col_offset: int,
        vocab_size: int,
        row_max: Tensor,
        row_sum: Tensor,
        logp: Tensor,
        row_scale: Tensor | None,
        plan: RowConfig = configs.STREAM_CONFIG,
    ) -> None:
        """See `Backend.residual_from_stats`."""
        rows.residual_from_stats(
            logits, out, labels, bias, row_max, row_sum, logp, row_scale, scale=head.scale, softcap=head.softcap,
            label_smoothing=token_loss.label_smoothing, z_loss=token_loss.z_loss,
            col_offset=col_offset, vocab_size=vocab_size, config=plan,
        )  # fmt: skip


def _shipped(logits: Tensor) -> RowConfig:
    family = "small"
    if logits.is_cuda:
        major, minor = torch.cuda.get_device_capability(logits.device)
        family = configs.target_family("cuda", 10 * major + minor)
    return configs.row_config(family, logits.shape[1], logits.element_size())


def short(config: Any) -> str:
    """A configuration in a table's cell."""
    if isinstance(config, RowConfig):
        return f"block {config.block}, {config.num_warps} warps"
    if not isinstance(config, LinearConfig):
        return str(config)
    path = "tma" if config.uses_descriptors else "ptr"
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"{tile} w{config.num_warps} s{config.num_stages} g{config.group_m} {path}"


@dataclass(frozen=True)
class LinearResult:
    """One tile of the fused head, or torch.mm: its median time, rate, and share of torch.mm's rate."""

    shape: str
    kernel: str
    layout: str
    milliseconds: float | None
    spread: float
    tflops: float
    share_of_mm: float
    correct: bool | None
    note: str = ""


class LinearBench:
    """The operands of one (M, D, V), what is right, and the time of torch.mm on them."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, repeats: int) -> None:
        rows_, depth, vocab = self.shape = shape
        self.device, self.repeats = device, repeats
        generator = torch.Generator(device).manual_seed(depth)
        self.hidden = torch.randn(rows_, depth, device=device, generator=generator).to(dtype)
        weight = torch.randn(vocab, depth, device=device, generator=generator)
        self.weight = weight.mul_(2.5 * depth**-0.5).to(dtype)
        self.labels = torch.randint(0, vocab, (rows_,), device=device, generator=generator)
        self.out = [torch.empty(rows_, device=device) for _ in range(3)]
        sample = self.sample = torch.linspace(0, rows_ - 1, min(rows_, CHECKED_ROWS), device=device).long()
        # Rounded once to the dtype, as the kernel does.
        exact = (self.hidden[sample].float() @ self.weight.float().t()).to(dtype).double()
        self.exact_lse = exact.logsumexp(1)
        self.exact_label = exact.gather(1, self.labels[sample][:, None])[:, 0]
        self.product = self._measure_product(dtype)

    @property
    def name(self) -> str:
        """M x D x V."""
        return "x".join(map(str, self.shape))

    def _measure_product(self, dtype: torch.dtype) -> LinearResult:
        logits = torch.empty(min(PRODUCT_ROWS, self.shape[0]), self.shape[2], device=self.device, dtype=dtype)

        def product() -> None:
            for part in self.hidden.split(PRODUCT_ROWS):
                torch.mm(part, self.weight.t(), out=logits[: len(part)])

        ms, spread = time_ms(self.device, product, repeats=self.repeats)
        return LinearResult(self.name, "torch.mm", "", ms, spread, self._rate(ms), 1.0, True)

    def _rate(self, ms: float) -> float:
        count, depth, vocab = self.shape
        return 2 * count * depth * vocab / ms / 1e9

    def measure(self, config: LinearConfig) -> LinearResult:
        """Check and time one tile; one that cannot be launched says why."""
        count, _, vocab = self.shape
        try:
            partials = torch.empty(2, *linear_stats.partial_shape(count, vocab, config), device=self.device)

            def run() -> None:
                linear_stats.linear_stats(
                    self.hidden, self.weight, self.labels, None, *self.out, None, partials,
                    scale=1.0, softcap=None, col_offset=0, config=config,
                )  # fmt: skip

            run()
            lse = self.out[0].double() + self.out[1].double().log()
            error = float((lse[self.sample] - self.exact_lse).abs().max())
            error = max(error, float((self.out[2][self.sample].double() - self.exact_label).abs().max()))
            ms, spread = time_ms(self.device, run, repeats=self.repeats)
        except Exception as failure:
            synchronize(self.device)  # raises after a fault, which leaves nothing to go on with
            return LinearResult(self.name, "linear_stats", short(config), None, 0, 0, 0, None, first_line(failure))
        # An ulp of bfloat16 at 8: products are summed in other orders.
        is_right = error < 4e-2
        assert self.product.milliseconds is not None
        share = self.product.milliseconds / ms
        note = "" if is_right else f"off by {error:.1e}"
        return LinearResult(
            self.name, "linear_stats", short(config), ms, spread, self._rate(ms), share, is_right, note
        )
