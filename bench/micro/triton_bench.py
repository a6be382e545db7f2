"""The Triton kernels with a tile size of the caller's, through the backend as the engine calls it.

Importing this imports Triton. With TRITON_INTERPRET=1 the kernels take CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from slime_fused.triton_kernels import linear_stats, rows
from slime_fused.triton_kernels.configs import LinearConfig, RowConfig

from bench.micro.common import first_line, synchronize, time_ms
from bench.micro.row_bench import KERNELS, PLAIN_HEAD
from slime_fused.backends import get_backend
from slime_fused.backends.base import LinearBlock, VocabStats

CHECKED_ROWS = 64
# Rows of torch.mm's slices, the yardstick of the fused head: what a chunk of the engine has.
PRODUCT_ROWS = 2048


@contextmanager
def replaced(module: Any, name: str, substitute: Callable[..., Any]) -> Iterator[None]:
    """``module.name`` is ``substitute(original)`` inside the block."""
    original = getattr(module, name)
    setattr(module, name, substitute(original))
    try:
        yield
    finally:
        setattr(module, name, original)


class TritonRows:
    """The Triton backend, whose row kernels take a ``plan``: a `RowConfig` in place of the shipped one."""

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(get_backend("triton"), name)
        if name not in KERNELS:
            return kernel

        def run(*args: Any, plan: RowConfig | None = None, **kwargs: Any) -> None:
            if plan is None:
                kernel(*args, **kwargs)
                return

            def configured(launch: Callable[..., Any]) -> Callable[..., Any]:
                return lambda *a, **k: launch(*a, **{**k, "config": plan})

            with replaced(rows, name, configured):
                kernel(*args, **kwargs)

        return run


def short(config: Any) -> str:
    """A configuration in a table's cell; None is the shipped one."""
    if config is None:
        return "shipped"
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

    def measure(self, config: LinearConfig | None = None) -> LinearResult:
        """Check and time one tile (None: the shipped one); one that cannot be launched says why."""
        name = short(config)
        backend: Any = get_backend("triton")
        row_max, row_sum, label_logit = self.out

        def run() -> None:
            block = LinearBlock(self.hidden, self.weight, self.labels, None, PLAIN_HEAD)
            backend.linear_stats(block, VocabStats(row_max, row_sum, label_logit))

        def chosen(choose: Callable[..., Any]) -> Callable[..., Any]:
            return choose if config is None else lambda *arguments, **options: config

        try:
            with replaced(linear_stats, "choose_config", chosen):
                run()
                lse = row_max.double() + row_sum.double().log()
                error = float((lse[self.sample] - self.exact_lse).abs().max())
                error = max(error, float((label_logit[self.sample].double() - self.exact_label).abs().max()))
                ms, spread = time_ms(self.device, run, repeats=self.repeats)
        except Exception as failure:
            synchronize(self.device)  # raises after a fault, which leaves nothing to go on with
            return LinearResult(self.name, "linear_stats", name, None, 0, 0, 0, None, first_line(failure))
        # An ulp of bfloat16 at 8: products are summed in other orders.
        is_right = error < 4e-2
        assert self.product.milliseconds is not None
        share = self.product.milliseconds / ms
        note = "" if is_right else f"off by {error:.1e}"
        return LinearResult(self.name, "linear_stats", name, ms, spread, self._rate(ms), share, is_right, note)
