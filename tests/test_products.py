"""The products that add into float32, as a GPU runs them: the operators' rules are those of its kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slime_fused.engine import products
from slime_fused.engine.plan import WEIGHT_GRAD_BLOCK_BYTES

ROWS, DEPTH, COLS = 70, 33, 2048
"""Wider than one block: 1024 rows of 2048 float32 values are one."""
VOCAB = 2 * WEIGHT_GRAD_BLOCK_BYTES // (4 * COLS) + 5


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU, and whose products take what PyTorch says it takes there."""

    adds_to_float32 = True
    calls: list[tuple[str, torch.Size]]

    @property
    def is_cuda(self) -> bool:
        return True

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func not in (torch.mm, torch.addmm):
                out = func(*args, **kwargs)
                return out.as_subclass(cls) if isinstance(out, Tensor) else out
            total, (a, b) = (args[0], args[1:]) if func is torch.addmm else (None, args)
            out_dtype, out = kwargs.pop("out_dtype"), kwargs.pop("out", None)
            assert not kwargs
            assert a.dtype == b.dtype == torch.bfloat16
            assert out_dtype == torch.float32
            if total is not None and total.dtype != b.dtype and not cls.adds_to_float32:
                raise RuntimeError(f"self and mat2 must have the same dtype, but got {total.dtype} and {b.dtype}")
            value = a.float() @ b.float() + (0 if total is None else total)
            cls.calls.append((func.__name__, value.shape))
            return value.as_subclass(cls) if out is None else out.copy_(value)


@pytest.fixture(params=[True, False], ids=["2.10", "2.8"])
def adds_to_float32(request, monkeypatch) -> bool:
    monkeypatch.setattr(OnGpu, "adds_to_float32", request.param)
    monkeypatch.setattr(OnGpu, "calls", [], raising=False)
    monkeypatch.setattr(products, "_ADDS_TO_FLOAT32", request.param)
    return request.param


def tensors(*shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16().as_subclass(OnGpu) for shape in shapes]


def assert_sum_of_products(total: Tensor, *factors: tuple[Tensor, Tensor]) -> None:
    plain, exact = (
        sum(a.as_subclass(Tensor).to(t) @ b.as_subclass(Tensor).to(t) for a, b in factors)
        for t in (torch.float32, torch.float64)
    )
    error, allowed = ((x.as_subclass(Tensor).double() - exact).abs().max() for x in (total, plain))
    assert error <= allowed + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_float32_logits_are_one_product(adds_to_float32):
    """Into rows of a padded buffer; the operands are not upcast."""
    hidden, weight = tensors((ROWS, DEPTH), (COLS + 1, DEPTH))
    out = torch.full((ROWS, COLS + 4), torch.nan).as_subclass(OnGpu)[:, : COLS + 1]
    products.write_logits(hidden, weight, out)
    assert_sum_of_products(out, (hidden, weight.t()))
    assert OnGpu.calls == [("mm", (ROWS, COLS + 1))]


def test_weight_gradient_over_two_chunks(adds_to_float32):
    residuals = tensors((ROWS, VOCAB), (ROWS, VOCAB))
    scaled = tensors((ROWS, COLS), (ROWS, COLS))
    d_weight = torch.full((VOCAB, COLS), torch.nan).as_subclass(OnGpu)
    for i in range(2):
        products.add_weight_grad(d_weight, residuals[i], scaled[i], is_first=i == 0)
    assert_sum_of_products(d_weight, *((r.t(), s) for r, s in zip(residuals, scaled, strict=True)))
    block = WEIGHT_GRAD_BLOCK_BYTES // (4 * COLS)
    assert OnGpu.calls[0] == ("mm", (VOCAB, COLS))
    if adds_to_float32:
        assert OnGpu.calls[1:] == [("addmm", (VOCAB, COLS))]
    else:
        assert OnGpu.calls[1:] == [("mm", (rows, COLS)) for rows in (block, block, 5)]


def test_hidden_gradient_by_blocks_of_the_vocabulary(adds_to_float32):
    residual, weight = tensors((ROWS, DEPTH), (DEPTH, COLS))
    total = torch.zeros(ROWS, COLS).as_subclass(OnGpu)
    for cols in (slice(0, 20), slice(20, DEPTH)):
        products.add_hidden_grad(total, residual[:, cols], weight[cols])
    assert_sum_of_products(total, (residual, weight))
