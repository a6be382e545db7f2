"""CUDA 12's compiler without its toolkit: NVRTC and ptxas as PyPI has them (the extra ``cuda12``).

NVRTC is the compiler's front end and optimiser for device code. To give it whole source files, what it does not
know is replaced as it reads: the host's headers by the few lines below, ``throw`` by a cast, and a launch by the
address of its kernel, so that the sources' own dispatch still says which kernels there are.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path

LAUNCH = "(kernel)<<<(grid), (block), (smem_bytes), (stream)>>>(__VA_ARGS__)"
HOST_HEADERS = (
    *("cuda_runtime.h", "cuda_runtime_api.h", "algorithm", "cstdint", "cstdio", "cstring"),
    *("mutex", "stdexcept", "string", "type_traits", "vector"),
)
HOST = """#pragma once
#define INFINITY __int_as_float(0x7f800000)
#define cudaGetLastError() cudaSuccess
#define cudaGetErrorString(error) ""
#define cudaFuncSetAttribute(kernel, attribute, value)
#define cudaFuncGetAttributes(attributes, kernel) cudaSuccess
#define cudaLaunchKernelEx(config, kernel, ...) keep(kernel)
template <class Kernel> void keep(Kernel* kernel) { [[maybe_unused]] Kernel* volatile address = kernel; }
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;
namespace std {
struct string {
  string(const char*) {}
  friend string operator+(const string& a, const string&) { return a; }
};
inline string to_string(long) { return ""; }
struct invalid_argument { invalid_argument(const string&) {} };
using runtime_error = invalid_argument;
struct mutex {};
template <class T> struct vector;
template <class Mutex> struct lock_guard { lock_guard(Mutex&) {} };
template <class T> const T& min(const T& a, const T& b) { return b < a ? b : a; }
template <class T> const T& max(const T& a, const T& b) { return a < b ? b : a; }
template <class T, T v> struct integral_constant { static constexpr T value = v; };
template <class T, class U> inline constexpr bool is_same_v = false;
template <class T> inline constexpr bool is_same_v<T, T> = true;
template <bool b, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool b, class T, class F> using conditional_t = typename conditional<b, T, F>::type;
}
"""


def _folder(package: str) -> Path | None:
    """Where the wheel of ``nvidia.<package>`` is installed."""
    if importlib.util.find_spec("nvidia") is None:
        return None
    spec = importlib.util.find_spec(f"nvidia.{package}")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def missing() -> str:
    """What is not installed, or ""."""
    absent = [name for name in ("cuda_nvrtc", "cuda_nvcc", "cuda_runtime") if _folder(name) is None]
    return ", ".join(f"nvidia.{name}" for name in absent)


def _path(package: str, pattern: str) -> Path:
    folder = _folder(package)
    assert folder is not None
    return next(folder.glob(pattern))


def architectures() -> set[str]:
    """What this ptxas assembles for: {"80", ...}."""
    done = subprocess.run([_path("cuda_nvcc", "bin/ptxas"), "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"'sm_(\d+)'", done.stdout))


def compile_ptx(source: Path, arch: str) -> bytes:
    """Every kernel of a .cu file as PTX. Raises RuntimeError with the compiler's log."""
    library = ctypes.CDLL(str(_path("cuda_nvrtc", "lib/libnvrtc.so.*")))
    launch = (source.parent / "launch.cuh").read_text()
    assert LAUNCH in launch
    headers = dict.fromkeys(HOST_HEADERS, "") | {
        "host.h": HOST,
        "launch.cuh": launch.replace(LAUNCH, "keep(kernel)"),
    }
    options = [
        f"-arch=compute_{arch}",
        "-std=c++20",
        "-default-device",
        "-Dthrow=(void)",
        "-diag-suppress=177",  # a launch's arguments are unused here
        "-include=host.h",
        f"-I{_path('cuda_runtime', 'include')}",
        f"-I{source.parent}",
    ]
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(
        ctypes.byref(program),
        source.read_bytes(),
        str(source).encode(),
        len(headers),
        _strings(list(headers.values())),
        _strings(list(headers)),
    )
    try:
        failed = library.nvrtcCompileProgram(program, len(options), _strings(options))
        what = "ProgramLog" if failed else "PTX"
        size = ctypes.c_size_t()
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, text)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(text.value.decode())
    return text.value


def assemble(ptx: bytes, arch: str, folder: Path) -> str:
    """What ptxas reports (`-v`) of its work on ``ptx``. Raises RuntimeError with its log."""
    (folder / "kernels.ptx").write_bytes(ptx)
    command = [_path("cuda_nvcc", "bin/ptxas"), "-v", f"-arch=sm_{arch}", folder / "kernels.ptx"]
    done = subprocess.run([*command, "-o", folder / "kernels.cubin"], capture_output=True, text=True)
    log = done.stdout + done.stderr
    if done.returncode != 0:
        raise RuntimeError(log)
    return log


def _strings(items: list[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(items))(*[item.encode() for item in items])
