"""`python -m bench.gpu_run.build`: the native module in the checkout, from an earlier run, prebuilt, or compiled.

A prebuilt one (PREBUILT) is used where this interpreter can import it, it has kernels for this GPU, and, as far as
its stamp says, it was compiled from these sources; else the reason is printed and the module is compiled. Where the
GPU kernels do not compile, the CPU's are, so that the Triton backend can still be tested and timed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.gpu_run.settings import ROOT, Settings, ask_gpu, read_settings

SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")


def digest(folders: Iterable[Path], root: Path = ROOT) -> str:
    """Of the names and contents of all source files of these files and folders."""
    made = hashlib.sha256()
    files = [path for folder in folders for path in (sorted(folder.rglob("*")) if folder.is_dir() else [folder])]
    for path in files:
        if path.is_file() and path.suffix not in (".so", ".pyc"):
            made.update(f"{path.relative_to(root)}\n".encode())
            made.update(path.read_bytes())
    return made.hexdigest()


def sources_hash() -> str:
    """Of everything that the native module is compiled from."""
    return digest([ROOT / "CMakeLists.txt", ROOT / "csrc"])


def architecture() -> str:
    """Compute capability 9.0 as "90"; empty without a GPU."""
    return ask_gpu("compute_cap").replace(".", "")


def stamp_of(module: Path) -> Path:
    """Where the stamp of a module lies: beside it."""
    return module.with_name(module.name + ".json")


def info_of(module: Path) -> dict[str, Any]:
    """`build_info()` of a module, asked in a process of its own; RuntimeError with what that process said."""
    program = (
        "import importlib.machinery as m, importlib.util as u, json, sys;"
        "loader = m.ExtensionFileLoader('_C', sys.argv[1]);"
        "module = u.module_from_spec(u.spec_from_loader('_C', loader)); loader.exec_module(module);"
        "print(json.dumps(module.build_info()))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(module)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    info: dict[str, Any] = json.loads(done.stdout)
    return info


def has_kernels_for(info: dict[str, Any], arch: str) -> bool:
    """Whether machine code of this architecture, or of an older one of the same generation, was compiled."""
    listed = re.findall(r"\d+", str(info.get("cuda_archs", "")))
    return any(found[:-1] == arch[:-1] and int(found) <= int(arch) for found in listed)


def refusal(module: Path, *, arch: str, wants_cuda: bool) -> str:
    """Why a prebuilt module is not used; empty where it is."""
    if not module.name.endswith(SUFFIX):
        return f"it is for another Python: {module.name} does not end in {SUFFIX}"
    try:
        info = info_of(module)
    except RuntimeError as error:
        return f"it cannot be imported: {error}"
    if wants_cuda and not info["cuda"]:
        return "it was built without CUDA kernels"
    if wants_cuda and arch and not has_kernels_for(info, arch):
        return f"it has kernels for {info.get('cuda_archs')}, this GPU needs {arch}"
    if not stamp_of(module).exists():
        print(f"{module.name} has no stamp: that it was built from these sources is not checked")
    elif json.loads(stamp_of(module).read_text()).get("sources") != sources_hash():
        return "it was built from other sources"
    return ""


def unpacked(prebuilt: Path, folder: Path) -> list[Path]:
    """The native modules of PREBUILT: a .so, those in a folder, or those in a wheel, unpacked into ``folder``."""
    if prebuilt.suffix != ".whl":
        return sorted(prebuilt.glob("_C.*.so")) if prebuilt.is_dir() else [prebuilt]
    with zipfile.ZipFile(prebuilt) as wheel:
        names = [name for name in wheel.namelist() if re.fullmatch(r"slime_fused/_C\.[^/]*\.so", name)]
        return [Path(wheel.extract(name, folder)) for name in names]


def place(module: Path, target: Path) -> None:
    """Copy the module, unless the same one is there: it may be in use."""
    if not target.exists() or target.read_bytes() != module.read_bytes():
        partial = target.with_name(target.name + ".partial")
        shutil.copy2(module, partial)
        partial.replace(target)


def use_prebuilt(prebuilt: Path, target: Path, *, arch: str, wants_cuda: bool) -> bool:
    """Put a prebuilt module in place; False, and the reasons printed, where none fits."""
    if not prebuilt.exists():
        print(f"PREBUILT: {prebuilt} is not there")
        return False
    with tempfile.TemporaryDirectory() as folder:
        modules = unpacked(prebuilt, Path(folder))
        if not modules:
            print(f"PREBUILT: {prebuilt} holds no slime_fused/_C.*.so")
        for module in modules:
            reason = refusal(module, arch=arch, wants_cuda=wants_cuda)
            if not reason:
                place(module, target)
                print(f"PREBUILT: {module.name} is used")
                return True
            print(f"PREBUILT: {module.name} is not used: {reason}")
    return False


def cmake(build: Path, output: Path, *, cuda: bool, archs: str, python: str = sys.executable) -> bool:
    """Configure and compile into ``output``; False where either fails."""
    pybind = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True)
    options = {
        "Python_EXECUTABLE": python,
        "SLIME_FUSED_CUDA": "ON" if cuda else "OFF",
        "SLIME_FUSED_CUDA_ARCHS": archs,
        "SLIME_FUSED_OUTPUT_DIR": str(output),
        **({"pybind11_DIR": pybind.stdout.strip()} if pybind.returncode == 0 else {}),
    }
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in options.items()]
    for command in (configure, ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)]):
        print("+", " ".join(command), flush=True)
        if subprocess.run(command, cwd=ROOT).returncode:
            return False
    return True


def provide(settings: Settings, target: Path) -> bool:
    """The module at ``target``: whether it is what was asked for."""
    arch = architecture() if settings.cuda else ""
    key = {"sources": sources_hash(), "suffix": SUFFIX, "cuda": settings.cuda, "arch": arch}
    record = settings.env / "build.json"
    try:
        earlier = json.loads(record.read_text())
    except (OSError, ValueError):
        earlier = None
    if target.exists() and earlier == {**key, "module": _hash(target)}:
        print(f"used again: {target}")
        return True
    prebuilt, wanted = settings.prebuilt, settings.cuda
    is_placed = prebuilt is not None and use_prebuilt(prebuilt, target, arch=arch, wants_cuda=wanted)
    if not is_placed and not cmake(settings.env / "cmake", target.parent, cuda=wanted, archs=arch):
        if wanted and cmake(settings.env / "cmake-cpu", target.parent, cuda=False, archs=""):
            print("the CUDA kernels did not compile: CPU kernels alone")
        return False
    record.write_text(json.dumps({**key, "module": _hash(target)}) + "\n")
    return True


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    """Provide the module and ask the package what it has."""
    settings = read_settings()
    is_there = provide(settings, ROOT / "slime_fused" / f"_C{SUFFIX}")
    program = (
        "import slime_fused, slime_fused.triton_kernels as t;"
        "print(slime_fused.__file__, t.__file__); print(slime_fused.build_info())"
    )
    works = subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
    return 0 if is_there and works else 1


if __name__ == "__main__":
    sys.exit(main())
