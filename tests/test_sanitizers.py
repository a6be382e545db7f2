"""The native CPU module under AddressSanitizer + UndefinedBehaviorSanitizer and under ThreadSanitizer.

Each sanitizer must stay silent on the kernels and report a fault that is planted, so that its silence means
something. The kernels run on numpy buffers: importing PyTorch under a sanitizer takes longer than all of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "native" / "sanitized_run.py"
RUNTIMES = {"address,undefined": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, ("g++", "cmake", "ninja"))), reason="needs g++, cmake and ninja"),
]


def run(command, **env):
    """The finished process, its stdout and stderr in one string."""
    environment = {**os.environ, "SLIME_FUSED_CUDA": "OFF", **env}
    return subprocess.run(
        [str(part) for part in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",  # a build that was cut short must still show what it said
        timeout=550,
    )


def runtime_paths(sanitizer):
    """The sanitizer's shared libraries, which must be loaded before the interpreter's own."""
    paths = [run(["g++", f"-print-file-name={name}"]).stdout.strip() for name in RUNTIMES[sanitizer]]
    if not all(map(os.path.isabs, paths)):
        pytest.skip(f"g++ has no runtime for -fsanitize={sanitizer}")
    return " ".join(paths)


@pytest.fixture(scope="module", params=RUNTIMES)
def sanitized(request, tmp_path_factory):
    """(sanitizer, function that runs one mode of the script on a module built with that sanitizer)."""
    preload, build = runtime_paths(request.param), tmp_path_factory.mktemp("sanitizer")
    options = {
        "SLIME_FUSED_SANITIZE": request.param,
        "SLIME_FUSED_OUTPUT_DIR": build / "out",
        "Python_EXECUTABLE": sys.executable,
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    for command in (
        ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *definitions],
        ["cmake", "--build", build, "--parallel", "2"],
    ):
        done = run(command)
        assert done.returncode == 0, done.stdout

    def script(mode):
        # Leaks are not looked for: the interpreter frees little at exit.
        return run([sys.executable, SCRIPT, build / "out", mode], LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0")

    return request.param, script


@pytest.mark.timeout(580)
def test_the_kernels_are_clean(sanitized):
    _, script = sanitized
    done = script("clean")
    assert done.returncode == 0, done.stdout
    assert done.stdout == "clean done\n"


def test_a_planted_fault_is_reported(sanitized):
    sanitizer, script = sanitized
    mode, report, place = {
        "thread": ("shared_output", "ThreadSanitizer: data race", "segments.cpp"),
        "address,undefined": ("small_buffer", "heap-buffer-overflow", "simd.h"),
    }[sanitizer]
    done = script(mode)
    assert done.returncode != 0
    assert report in done.stdout
    assert place in done.stdout


@pytest.mark.parametrize("sanitizer", [None, *RUNTIMES])
def test_the_thread_pool_alone(sanitizer, tmp_path):
    program = tmp_path / "thread_pool"
    flags = ["-std=c++20", "-O1", "-g", "-pthread", f"-I{ROOT / 'csrc'}"]
    if sanitizer:
        runtime_paths(sanitizer)
        flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    sources = [ROOT / "tests" / "native" / "thread_pool_main.cpp", ROOT / "csrc" / "cpu" / "thread_pool.cpp"]
    built = run(["g++", *flags, *sources, "-o", program])
    assert built.returncode == 0, built.stdout
    # ThreadSanitizer refuses to start threads after a fork of a threaded process unless told otherwise.
    done = run([program], ASAN_OPTIONS="detect_leaks=0", TSAN_OPTIONS="die_after_fork=0")
    assert done.returncode == 0, done.stdout
    assert done.stdout == "thread pool done\n"
