"""Another project installs a top-level package `triton_kernels`; ours is `slime_fused.triton_kernels` alone.

What a wheel holds is checked in test_packaging.py; here both are imported in one process.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys

from tests.triton_support import ROOT


def test_both_packages_of_that_name_live_in_one_process(tmp_path):
    """In either order, and with the other one first on the path."""
    other = tmp_path / "triton_kernels"
    other.mkdir()
    (other / "__init__.py").write_text("OWNER = 'another project'\n")
    (other / "configs.py").write_text("OWNER = 'another project'\n")
    imports = ["import triton_kernels.configs as theirs", "import slime_fused.triton_kernels.configs as ours"]
    for order in (imports, imports[::-1]):
        program = "; ".join(
            [
                "from tests.triton_support import import_kernels; import_kernels()",
                *order,
                "assert theirs.OWNER == 'another project'",
                "assert ours.ROW_CONFIGS and not hasattr(ours, 'OWNER')",
            ]
        )
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_the_package_setup_py_installs_has_no_such_top_level_name():
    """No entry of `packages` is `triton_kernels` itself, and the folder maps inside slime_fused."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup"]
    options = {k.arg: ast.unparse(k.value) for k in calls[0].keywords}
    assert "f'slime_fused.{name}': name" in options["package_dir"]
    assert "f'slime_fused.{name}'" in options["packages"]


def test_kernels_import_each_other_relatively():
    """An absolute import would find the other project's package."""
    files = sorted((ROOT / "triton_kernels").rglob("*.py"))
    assert len(files) >= 6
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            allowed = {"triton", "typing", "dataclasses", "functools", "__future__"}
            assert all(name.split(".")[0] in allowed for name in names), path
