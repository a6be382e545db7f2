"""`python -m bench.gpu_run.environment`: a virtual environment on top of the interpreter that holds PyTorch.

It sees everything of that interpreter's own, holds what is installed for a run, and imports the package from this
checkout. It is kept: a later run with the same interpreter and PyTorch finds it in a second.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.gpu_run.settings import ROOT, read_settings

STAMP = "slime_fused_environment.json"

# The top-level folder triton_kernels/ is the subpackage slime_fused.triton_kernels once it is installed.
_FINDER = """\
import importlib.util, os, sys
ROOT = {root!r}
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "slime_fused.triton_kernels":
            return None
        folder = os.path.join(ROOT, "triton_kernels")
        file = os.path.join(folder, "__init__.py")
        return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[folder])
sys.meta_path.insert(0, Finder)
"""


def stamp() -> dict[str, Any]:
    """What an environment must have been made for to be used again."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "not installed"
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "torch": torch,
        "root": str(ROOT),
    }


def read_stamp(env: Path) -> dict[str, Any] | None:
    """The stamp of an environment; None where there is none."""
    try:
        found: dict[str, Any] = json.loads((env / STAMP).read_text())
    except (OSError, ValueError):
        return None
    return found


def create(env: Path) -> None:
    """Make the environment anew. Refuses (SystemExit) to replace a folder that it did not make."""
    if env.exists() and any(env.iterdir()):
        if read_stamp(env) is None:
            raise SystemExit(f"ENV: {env} is no environment of this script and is not empty; name another folder")
        shutil.rmtree(env)
    env.mkdir(parents=True, exist_ok=True)
    (env / STAMP).write_text("{}\n")  # ours from now on, even if this is cut
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = env / "lib" / version / "site-packages"
    own = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    # addsitedir, since that interpreter's packages may come by .pth files in turn.
    lines = [f"import site; site.addsitedir({path!r})" for path in own]
    (packages / "base.pth").write_text("\n".join(lines) + "\n")
    (packages / "slime_fused_checkout.py").write_text(_FINDER.format(root=str(ROOT)))
    (packages / "slime_fused_checkout.pth").write_text(f"{ROOT}\nimport slime_fused_checkout\n")
    check = "import torch, pip; print('torch', torch.__version__, 'pip', pip.__version__)"
    subprocess.run([str(env / "bin" / "python"), "-c", check], check=True, cwd=ROOT)
    (env / STAMP).write_text(json.dumps(stamp()) + "\n")


def main() -> int:
    """Make it, or say that it is there."""
    env = read_settings().env
    if read_stamp(env) == stamp():
        print(f"used again: {env}")
        return 0
    create(env)
    print(f"made: {env}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
