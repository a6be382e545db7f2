"""Imports point down only: the folders of the design, read off the source."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "slime_fused"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("slime_fused.trainer", "slime_fused.integrations"),
    ("slime_fused.model",),
    ("slime_fused",),
    ("slime_fused.modules",),
    ("slime_fused.functional", "slime_fused.reference", "slime_fused.info"),
    ("slime_fused.output",),
    ("slime_fused.autograd",),
    ("slime_fused.losses",),
    ("slime_fused.engine",),
    ("slime_fused.backends",),
    ("slime_fused.triton_kernels", "slime_fused._C"),
)
"""From the top, the way of the data: a module may import from its own folder and from the layers below it."""


def layer_of(module: str) -> int:
    """The layer of the longest listed name that is the module or a package around it."""
    listed = {name: i for i, names in enumerate(LAYERS) for name in names}
    candidates = [name for name in listed if module == name or module.startswith(f"{name}.")]
    # slime_fused itself stands for its own file alone: everything in it must be listed.
    candidates = [name for name in candidates if name != PACKAGE or module == PACKAGE]
    assert candidates, f"{module} has no layer: add it to LAYERS"
    return listed[max(candidates, key=len)]


def sources() -> dict[str, Path]:
    """Module name -> file. `triton_kernels/` installs as `slime_fused.triton_kernels`."""
    files = {}
    for folder, prefix in (("slime_fused", PACKAGE), ("triton_kernels", f"{PACKAGE}.triton_kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([prefix, *parts]).removesuffix(".__init__")] = path
    return files


SOURCES = sources()


def imported_modules(module: str, path: Path) -> set[str]:
    """Every module of the package that a file names in an import, at any depth, or in a string to import later."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(p for p in (base, node.module) if p)
            inside = {f"{source}.{alias.name}" for alias in node.names}
            known = {name for name in inside if name in SOURCES or name == "slime_fused._C"}
            names |= known or {source}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {node.value} if re.fullmatch(r"slime_fused(\.\w+)+", node.value) else set()
    return names


def test_the_walk_sees_the_modules():
    """A walk that finds nothing would pass everything."""
    assert len(SOURCES) > 40
    assert "slime_fused.autograd.token_losses" in imported_modules(
        "slime_fused.functional.tokens", SOURCES["slime_fused.functional.tokens"]
    )
    assert "slime_fused.backends.cpu" in imported_modules("slime_fused.backends", SOURCES["slime_fused.backends"])
    assert "slime_fused.backends.base" in imported_modules(
        "slime_fused.backends.native", SOURCES["slime_fused.backends.native"]
    )


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    own = layer_of(module)
    for name in imported_modules(module, SOURCES[module]):
        if name.split(".")[0] != PACKAGE:
            continue
        together = LAYERS[own] == LAYERS[layer_of(name)] and folder_of(module) == folder_of(name)
        assert together or layer_of(name) > own, f"{module} imports {name}, which is not below it"


def folder_of(module: str) -> str:
    """The part of the package that a module lies in: ``slime_fused.engine`` for ``slime_fused.engine.plan``."""
    return ".".join(module.split(".")[:2])


def test_no_folder_imports_in_circles():
    """Modules of one folder import each other freely, as long as there is an order in which to read them."""
    graph = {m: {n for n in imported_modules(m, p) if n in SOURCES and n != m} for m, p in SOURCES.items()}
    TopologicalSorter(graph).prepare()  # CycleError names a circle


@pytest.mark.parametrize("module", [m for m in SOURCES if m.startswith("slime_fused.triton_kernels")])
def test_triton_kernels_know_neither_torch_nor_the_package(module):
    names = imported_modules(module, SOURCES[module])
    assert not any(name.split(".")[0] == "torch" for name in names)
    assert all(name.startswith("slime_fused.triton_kernels") for name in names if name.startswith(PACKAGE))


PURE = (
    "slime_fused.engine.plan",
    "slime_fused.engine.problem",
    "slime_fused.losses.config",
    "slime_fused.losses.hyperparameters",
)


@pytest.mark.parametrize("module", PURE)
def test_the_planner_and_the_configuration_are_pure(module):
    names = imported_modules(module, SOURCES[module])
    impure = {"torch", PACKAGE, "os"}
    assert not any(name.split(".")[0] in impure for name in set(names) - set(PURE)), names


ON_TRANSFORMERS = ("slime_fused.trainer", "slime_fused.integrations", "slime_fused.model")


def test_nothing_below_the_trainers_needs_their_dependencies():
    heavy = {"transformers", "datasets", "peft", "accelerate", "gguf", "matplotlib", "rich", "typer", "yaml", "trl"}
    for module, path in SOURCES.items():
        if not module.startswith(ON_TRANSFORMERS):
            assert not {name.split(".")[0] for name in imported_modules(module, path)} & heavy, module


def test_native_sources_see_no_torch_header():
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h", ".hpp")]
    assert len(files) > 5
    for path in files:
        assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', path.read_text()), path


def test_cpu_kernels_see_no_cuda():
    for path in (ROOT / "csrc" / "cpu").rglob("*"):
        if path.suffix in (".cpp", ".h"):
            assert not re.search(r'#\s*include\s*[<"](cuda|\.\./cuda)', path.read_text()), path
