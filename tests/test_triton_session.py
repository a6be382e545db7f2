"""Runs the Triton kernel tests in the interpreter, in a process of their own, and checks what importing costs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.triton_support import INTERPRETING, ROOT

KERNEL_TESTS = [
    "test_triton_grid.py",
    "test_triton_rows.py",
    "test_triton_statistics.py",
    "test_triton_segments.py",
    "test_triton_linear.py",
    "test_triton_fused.py",
    "test_triton_sweep.py",
]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="this is that session")
@pytest.mark.parametrize("module", KERNEL_TESTS)
def test_kernels_in_the_interpreter(module):
    pytest.importorskip("triton", minversion="3.8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{module}"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in summary
    assert "skipped" not in summary, "a skipped kernel test proves nothing here"


def test_importing_the_backend_does_not_import_triton():
    program = (
        "import sys; import slime_fused.backends.triton as backend; backend.TritonBackend().available();"
        "sys.exit(any(name.split('.')[0] == 'triton' for name in sys.modules if 'slime' not in name) * 3)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0
