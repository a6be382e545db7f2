"""What the Triton tests share: where kernels run, a repaired interpreter, and kernels importable from a checkout.

Triton decides when a kernel is decorated whether it is compiled or interpreted, so one process cannot do both:
`test_triton_session.py` starts a second one with TRITON_INTERPRET=1 for the tests of what kernels compute.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETING else "cuda")


def import_kernels() -> None:
    """Make ``slime_fused.triton_kernels`` importable where the package is used without being installed."""
    name = "slime_fused.triton_kernels"
    if name in sys.modules:
        return
    if importlib.util.find_spec("slime_fused") is None:
        sys.path.insert(0, str(ROOT))
    if importlib.util.find_spec(name) is not None:
        return
    folder = ROOT / "triton_kernels"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def skip_unless_kernels_run() -> None:
    """Skip a whole module where kernels neither run on a GPU nor in the interpreter."""
    pytest.importorskip("triton")
    import_kernels()
    if INTERPRETING:
        repair_bfloat16()
    elif not torch.cuda.is_available():
        pytest.skip("kernels run on a GPU or in the session of test_triton_session.py", allow_module_level=True)


def repair_bfloat16() -> None:
    """Give the interpreter the hardware's bfloat16: round-to-nearest-even stores, and products of values.

    Triton 3.9's interpreter truncates float32 to bfloat16 and multiplies bfloat16 as the integers that hold it.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original_convert = interpreter._convert_float

    def widen(data):
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def convert(data, from_type, to_type, rounding_mode):
        data = np.ascontiguousarray(data)
        if (from_type, to_type) == (tl.bfloat16, tl.float32):
            return widen(data).view(np.uint32)
        if (from_type, to_type) == (tl.float32, tl.bfloat16):
            bits = data.view(np.uint32).astype(np.uint64)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return np.where(np.isnan(data.view(np.float32)), np.uint16(0x7FC0), rounded)
        return original_convert(data, from_type, to_type, rounding_mode)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = (widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
        product = np.matmul(left, right, dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = create_dot
