"""Drives CMake for the extension module and lays out the packages; the metadata is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds the extension with CMake, straight into where setuptools expects the file."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build; SLIME_FUSED_* variables are read by CMakeLists.txt itself."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSLIME_FUSED_OUTPUT_DIR={output}",
        ]
        jobs = str(self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


# `triton_kernels` lies at the top of the repository but installs inside the package: another project already
# installs a top-level package of that name.
triton_packages = ["triton_kernels", *(f"triton_kernels.{name}" for name in find_packages("triton_kernels"))]
setup(
    packages=[
        *find_packages(include=["slime_fused", "slime_fused.*"]),
        *(f"slime_fused.{name}" for name in triton_packages),
    ],
    package_dir={f"slime_fused.{name}": name.replace(".", "/") for name in triton_packages},
    package_data={"slime_fused": ["py.typed"]},
    include_package_data=False,
    ext_modules=[Extension("slime_fused._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
