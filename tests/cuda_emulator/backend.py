"""The CUDA backend over the emulator: the package's own adapter, on CPU tensors."""

from __future__ import annotations

import importlib.util
import os
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import slime_fused.backends.cuda as cuda_backend
from slime_fused.backends.base import Backend
from tests.cuda_emulator.build import EmulatorUnavailable, build

MODULE_VARIABLE = "CUDA_EMULATED_MODULE"
"""Names a built module to use instead of the plain one: how the sanitized runs call the tests."""


@cache
def emulated_module() -> ModuleType:
    """The module ``_C_emulated``, once a process; skips the test that asks where it cannot be built."""
    if path := os.environ.get(MODULE_VARIABLE):
        return _load_module(Path(path))
    try:
        return _load_module(build("_C_emulated"))
    except EmulatorUnavailable as error:
        pytest.skip(str(error))


def _load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_C_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulated_backend(native: ModuleType, capability: int = 80, plan: Any = None) -> Backend:
    """``CudaBackend`` as the package ships it, over ``native``.

    It lives in a second copy of its module, so that the four functions that ask a GPU can be replaced without a
    trace in the first.

    Args:
        native: the module ``_C_emulated``.
        capability: 10 * major + minor of the device for which launch plans are chosen.
        plan: a ``RowPlan`` for every row, instead of the chosen one.
    """
    spec = importlib.util.spec_from_file_location("slime_fused.backends._emulated_cuda", cuda_backend.__file__)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._native = lambda: native.cuda
    module._placed = lambda *_tensors: (0, 0)
    module._on = lambda _device: nullcontext()
    module._row_plan = cache(
        lambda cols, elem_bytes, _device: plan or native.cuda.choose_row_plan(cols, elem_bytes, capability)
    )
    backend: Backend = module.CudaBackend()
    return backend
