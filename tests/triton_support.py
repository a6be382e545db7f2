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


def exact_logits(raw, bias, head):
    """(M, V) products -> the logits of the softmax, in their dtype."""
    y = head.scale * (raw if bias is None else raw + bias)
    capped = y if head.softcap is None else head.softcap * torch.tanh(y / head.softcap)
    return capped / head.temperature


def exact_statistics(z, labels, col_offset=0):
    """What `logits_stats` writes for logits, each statistic as its definition says, in the dtype of the logits."""
    row_max = z.amax(1)
    distance = z - row_max.masked_fill(row_max == -torch.inf, 0)[:, None]
    exponential = distance.exp()
    local = labels - col_offset
    cols = torch.arange(z.shape[1], device=z.device)
    is_before = (cols < local[:, None]) & (labels >= 0)[:, None]
    is_label = (cols == local[:, None]) & (labels >= 0)[:, None]
    return {
        "row_max": row_max,
        "row_sum": exponential.sum(1),
        "label_logit": z.masked_fill(~is_label, 0).sum(1),
        "logit_sum": z.sum(1),
        # Where a logit is -inf the distance is, too, and 0 * -inf would be NaN.
        "centred_sum": (exponential * distance.clamp(min=-1e4)).sum(1),
        "square_sum": exponential.square().sum(1),
        "max_before": z.masked_fill(~is_before, -torch.inf).amax(1),
    }


def derived(stats):
    """What callers make of statistics: log-sum-exp, entropy, sum of p^2, and what is passed on as it is."""
    log_sum = stats["row_sum"].log()
    return {
        "lse": stats["row_max"] + log_sum,
        "entropy": log_sum - stats["centred_sum"] / stats["row_sum"],
        "square": stats["square_sum"] / stats["row_sum"].square(),
        "label_logit": stats["label_logit"],
        "max_before": stats["max_before"],
    }


def assert_derived_match(got, exact, plain, name, floor=2e-6):
    """Errors of at most twice what float32 PyTorch makes on the same rows; infinities and NaN where they belong.

    A maximum may pass a NaN over: what comes of a row's sums says that there is one.
    """
    has_nan = derived(exact)["lse"].isnan()
    for key, result in derived(got).items():
        rows = ~has_nan if key in ("label_logit", "max_before") else has_nan | True
        value, truth, reference = (x[rows].double() for x in (result, derived(exact)[key], derived(plain)[key]))
        usual = truth.isfinite()
        assert torch.equal(value[~usual].nan_to_num(nan=7.0), truth[~usual].nan_to_num(nan=7.0)), (name, key)
        error, allowed = (value - truth)[usual].abs(), 2 * (reference - truth)[usual].abs()
        worst = allowed.max() if allowed.numel() else 0.0
        limit = worst + floor * truth[usual].abs().clamp(min=1)
        assert (error <= limit).all(), f"{name}, {key}: {error.max():.2e} where {limit.min():.2e} is allowed"
