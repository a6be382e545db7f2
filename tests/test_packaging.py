"""What is shipped: contents of the sdist and the wheel, what the module links to, and how the build fails.

The wheel is built from the unpacked sdist, so a file that the sdist forgets fails the build here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ["CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"]
FOLDERS = ["csrc", "slime_fused", "triton_kernels"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, ("g++", "cmake", "ninja"))), reason="needs g++, cmake and ninja"),
]


def run(command, *, cwd, ok=True, **env):
    """stdout and stderr of a command that is expected to succeed (or, with ``ok=False``, to fail)."""
    environment = {**os.environ, "SLIME_FUSED_CUDA": "OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "2", **env}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=550,
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def build_backend(hook, source, target):
    """Call a PEP 517 or 660 hook in ``source`` with this interpreter's packages; the path of what it made."""
    code = f"import setuptools.build_meta as b; print(b.{hook}({str(target)!r}))"
    return target / run([sys.executable, "-c", code], cwd=source).strip().splitlines()[-1]


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """A copy of what version control holds, so that builds leave nothing in the working tree."""
    tree = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, tree / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return tree


@pytest.fixture(scope="module")
def sdist(source_tree, tmp_path_factory):
    return build_backend("build_sdist", source_tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return build_backend("build_wheel", unpacked, folder)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel's files as an installer lays them out."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_sdist_holds_all_sources(sdist, source_tree):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        str(path.relative_to(source_tree))
        for folder in FOLDERS
        for path in (source_tree / folder).rglob("*")
        if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh", ".map"} or path.name == "CMakeLists.txt"
    }
    assert needed
    assert needed - names == set()
    assert set(SOURCES) - names == set()


def test_the_wheel_holds_the_package_and_nothing_else(wheel, source_tree):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"slime_fused"}
    suffixes = {Path(name).suffix for name in names if ".dist-info/" not in name}
    assert suffixes <= {".py", ".so", ".typed"}
    assert sum(name.endswith(".so") for name in names) == 1
    modules = {
        f"slime_fused/{path.relative_to(source_tree)}" for path in source_tree.glob("triton_kernels/**/*.py")
    }
    modules |= {str(path.relative_to(source_tree)) for path in source_tree.glob("slime_fused/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert any(name.endswith("LICENSE") for name in names)


def test_the_installed_wheel_imports_its_own_modules(installed):
    code = (
        "import slime_fused._C as native, slime_fused.triton_kernels as kernels;"
        "print(native.__file__, kernels.__file__, native.build_info()['cpu_isa'])"
    )
    native, kernels, isa = run([sys.executable, "-c", code], cwd=installed, PYTHONPATH=str(installed)).split()[-3:]
    assert Path(native).is_relative_to(installed / "slime_fused")
    assert Path(kernels) == installed / "slime_fused" / "triton_kernels" / "__init__.py"
    assert isa in {"scalar", "avx2", "avx512"}


def test_the_module_links_to_the_system_alone_and_exports_one_symbol(installed):
    (module,) = (installed / "slime_fused").glob("_C*.so")
    libraries = {line.split()[0].split(".so")[0] for line in run(["ldd", module], cwd=installed).splitlines()}
    libraries = {Path(name).name for name in libraries}
    assert {"libc", "libstdc++"} <= libraries
    assert libraries <= {"linux-vdso", "libc", "libm", "libstdc++", "libgcc_s", "libpthread"} | {
        name for name in libraries if name.startswith("ld-linux")
    }
    symbols = [line.split()[-1] for line in run(["nm", "-D", "--defined-only", module], cwd=installed).splitlines()]
    assert symbols == ["PyInit__C"]


def test_an_editable_install_finds_the_triton_kernels(source_tree, tmp_path):
    """They lie outside slime_fused/, so the editable finder has to map them into the package."""
    target = tmp_path / "site"
    with zipfile.ZipFile(build_backend("build_editable", source_tree, tmp_path)) as archive:
        archive.extractall(target)
    code = (
        f"import site, sys; site.addsitedir({str(target)!r}); sys.path.append({sysconfig.get_path('purelib')!r});"
        "import slime_fused._C as native, slime_fused.triton_kernels as kernels;"
        "print(native.__file__, kernels.__file__)"
    )
    # -S and an empty folder: no other installation and no working directory may lead to the sources.
    empty = tmp_path / "empty"
    empty.mkdir()
    native, kernels = run([sys.executable, "-S", "-c", code], cwd=empty, PYTHONPATH="").split()[-2:]
    assert Path(native).parent == source_tree / "slime_fused"
    assert Path(kernels) == source_tree / "triton_kernels" / "__init__.py"


@pytest.fixture
def without_nvcc(tmp_path):
    """Environment and CMake arguments of a machine with a compiler but no CUDA toolkit."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cmake", "ninja", "c++", "g++", "as", "ld", "ar", "ranlib"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    environment = {"PATH": str(tools), "CUDACXX": "", "CUDA_HOME": "", "CUDA_PATH": "", "CXX": "g++"}
    return environment, ["-DSLIME_FUSED_CUDA_ROOTS=", f"-DPython_EXECUTABLE={sys.executable}", "-G", "Ninja"]


@pytest.mark.parametrize(
    ("mode", "ok", "message"),
    [
        ("ON", False, "SLIME_FUSED_CUDA=ON: nvcc was not found on PATH"),
        ("AUTO", True, "CPU kernels only (SLIME_FUSED_CUDA=AUTO)"),
        ("MAYBE", False, "SLIME_FUSED_CUDA: expected AUTO, ON or OFF, got 'MAYBE'"),
    ],
)
def test_what_the_build_says_without_nvcc(without_nvcc, tmp_path, mode, ok, message):
    environment, arguments = without_nvcc
    configure = [shutil.which("cmake"), "-S", ROOT, "-B", tmp_path / "build", *arguments]
    output = run(configure, cwd=tmp_path, ok=ok, **{**environment, "SLIME_FUSED_CUDA": mode})
    assert message in " ".join(output.split())


def test_vector_code_stays_out_of_functions_that_others_share(tmp_path):
    """A weak symbol compiled for AVX-512 could be the copy the linker keeps for all: there must be none."""
    compiled = tmp_path / "row_kernels.o"
    flags = ["-std=c++20", "-O0", "-I", ROOT / "csrc" / "include", "-DSLIME_FUSED_ISA=probe"]
    source = tmp_path / "probe.cpp"
    declaration = "namespace slime_fused::cpu::probe { extern const RowKernels kRowKernels; }"
    source.write_text(
        f'#include "{ROOT}/csrc/cpu/row_kernels.h"\n{declaration}\n#include "{ROOT}/csrc/cpu/row_kernels.cpp"\n'
    )
    run(["g++", *flags, "-c", source, "-o", compiled], cwd=tmp_path)
    defined = [line.split() for line in run(["nm", "--defined-only", compiled], cwd=tmp_path).splitlines()]
    shared = [name for _, kind, name in defined if kind not in "tdrb"]
    assert len(defined) > 100
    assert shared == ["_ZN11slime_fused3cpu5probe11kRowKernelsE"]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_a_build_with_cuda_imports_without_a_driver(tmp_path):
    """Two architectures, since a list is what CMake and compilers disagree about; no GPU is needed."""
    options = {
        "SLIME_FUSED_CUDA_ARCHS": "80;90",
        "SLIME_FUSED_OUTPUT_DIR": tmp_path,
        "Python_EXECUTABLE": sys.executable,
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    build = tmp_path / "build"
    run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *definitions], cwd=tmp_path, SLIME_FUSED_CUDA="ON")
    run(["cmake", "--build", build, "--parallel", "2"], cwd=tmp_path)
    code = "import _C; info = _C.build_info(); print(info['cuda'], info['cuda_archs']); print(dir(_C.cuda))"
    first, functions = run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(tmp_path)).splitlines()
    assert first == "True 80-real 90"
    assert "'softmax_residual'" in functions
