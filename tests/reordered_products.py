"""Products that sum in another order: ``pytest -p tests.reordered_products``.

A library promises the bits of a product for the same operands in the same places, and no more: they may change with
a row's position, the sizes, the strides and the alignment, and do on some processors. This plugin puts products in
place of PyTorch's on the CPU whose bits change with all of these on every processor, so that a test which asks for
more than a library promises fails here and not on somebody else's machine. `make test` sets the libraries' own
switches too (`SWITCHES`); both are checked before the first test, so that this run cannot silently be the first one
again. Tests of memory are out of place here: these products copy their operands.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

SWITCHES = {
    "MKL_CBWR": "COMPATIBLE",  # float32 and float64 products: SSE2
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # bfloat16 products
    "ATEN_CPU_CAPABILITY": "default",  # PyTorch's own loops
    "SLIME_FUSED_CPU_ISA": "scalar",  # this package's kernels
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
LIBRARY = torch.library.Library("aten", "IMPL")
CHANGED = pytest.StashKey[list[str]]()


def turned(a: Tensor, b: Tensor) -> Tensor:
    """A rotation of the inner dimension that depends on the sizes, the strides and the alignment."""
    turn = sum(a.shape) + sum(b.shape)
    for operand in (a, b):
        turn += operand.stride(0) % 7 + operand.stride(1) % 5 + operand.data_ptr() % 64 // operand.element_size()
    depth = a.shape[1]
    return (torch.arange(depth) + turn) % max(1, depth)


def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) @ (K, N); every other row is summed from the other end."""
    order = turned(a, b)
    out = a.new_empty(a.shape[0], b.shape[1])
    for first, inner in ((0, order), (1, order.flip(0))):
        out[first::2] = torch.bmm(a[first::2, inner][None], b[inner][None])[0]  # the library's own
    return out


def sum_with_product(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta`` total + ``alpha`` a @ b; with ``beta`` 0 ``total`` may hold anything."""
    scaled = product(a, b) * alpha
    return scaled + beta * total if beta != 0 else scaled


def into(out: Tensor, value: Tensor) -> Tensor:
    """``out``, holding ``value``; resized where its caller left it empty, as the operators do."""
    return (out if out.shape == value.shape else out.resize_(value.shape)).copy_(value)


def replace_products() -> None:
    """The operators that a matrix product of two dimensions ends in."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        LIBRARY.impl("mm", product, "CPU")
        LIBRARY.impl("mm.out", lambda a, b, *, out: into(out, product(a, b)), "CPU")
        LIBRARY.impl("addmm", sum_with_product, "CPU")
        LIBRARY.impl("addmm.out", lambda t, a, b, *, out, **f: into(out, sum_with_product(t, a, b, **f)), "CPU")
        LIBRARY.impl("addmm_", lambda t, a, b, **f: t.copy_(sum_with_product(t, a, b, **f)), "CPU")


def digests() -> dict[str, str]:
    """The bits of a product in each dtype, and of the library's product that `product` is made of."""
    generator = torch.Generator().manual_seed(0)
    # float64: the switches change what PyTorch draws in float32.
    a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((200, 512), (512, 300)))
    results = {f"{str(dtype)[6:]} product": a.to(dtype) @ b.to(dtype) for dtype in DTYPES}
    results |= {f"{str(dtype)[6:]} library": torch.bmm(a.to(dtype)[None], b.to(dtype)[None]) for dtype in DTYPES}
    return {
        n: hashlib.sha256(bytes(x.view(torch.uint8).flatten().tolist())).hexdigest() for n, x in results.items()
    }


def pytest_configure(config: pytest.Config) -> None:
    """Replace the products, and make sure that their bits are no longer those of a process without all this."""
    replace_products()
    plain = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    command = [sys.executable, "-c", f"from {__name__} import digests; print(*digests().values())"]
    output = subprocess.run(command, env=plain, cwd=config.rootpath, capture_output=True, text=True, check=True)
    mine = digests()
    changed = [name for name, a, b in zip(mine, mine.values(), output.stdout.split(), strict=True) if a != b]
    config.stash[CHANGED] = changed
    missing = [f"{str(dtype)[6:]} product" for dtype in DTYPES if f"{str(dtype)[6:]} product" not in changed]
    if missing:
        raise pytest.UsageError(f"reordered_products: the bits are as without this plugin: {missing}")
    unset = [f"{name}={value}" for name, value in SWITCHES.items() if os.environ.get(name) != value]
    if unset:
        raise pytest.UsageError(f"reordered_products: expected in the environment: {' '.join(unset)}")


def pytest_report_header(config: pytest.Config) -> str:
    """Which bits differ from a plain run's on this machine: the libraries' switches do not work on all."""
    return f"other bits than in a plain run: {', '.join(config.stash[CHANGED])}"
