"""Layouts and tile sizes that `bench.micro.sweep` compares, and how they are read from a file.

The kernels' own modules list them (`slime_fused._C.cuda.row_plan_candidates`, `ROW_CANDIDATES`, `STREAM_CANDIDATES`
and `LINEAR_CANDIDATES` of `triton_kernels/configs.py`); the list here is for a stand-in of the native module.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from bench.micro.row_bench import Case, native

SHARED_BYTES = 219 * 1024  # what a Hopper block can stage (csrc/cuda/row_plan.cpp)
PLAN_FIELDS = ("stage", "cluster", "threads", "shared_vectors", "pad_bytes", "streaming", "max_blocks")
# Kernel -> the keyword arguments that make one candidate of it.
Listed = dict[str, list[dict[str, Any]]]


def describe_plan(plan: Any) -> str:
    """A `RowPlan` as the assignments that differ from its defaults; "shipped" for None."""
    if plan is None:
        return "shipped"
    plain = native().RowPlan()
    stage = str(getattr(plan, "stage", "shared")).rpartition(".")[2]
    fields = [stage]
    for name in PLAN_FIELDS[1:]:
        value = getattr(plan, name, None)
        if value is not None and value != getattr(plain, name, None):
            fields.append(f"{name}={value}")
    return " ".join(fields)


def row_plans(case: Case, capability: int, listed: Listed) -> list[Any]:
    """Layouts of the CUDA `softmax_residual` for rows of this case; None is the shipped one."""
    module = native()
    if "rows" in listed:
        stages = {name: getattr(module.RowStage, name) for name in ("shared", "registers")}
        plans = [
            module.RowPlan(**{**entry, "stage": stages[entry.get("stage", "shared")]}) for entry in listed["rows"]
        ]
    elif hasattr(module, "row_plan_candidates"):
        plans = list(module.row_plan_candidates(case.vocab, case.dtype.itemsize, capability))
    else:
        plans = list(_built_row_plans(case, module))
    shipped = None
    if hasattr(module, "choose_row_plan"):
        shipped = describe_plan(module.choose_row_plan(case.vocab, case.dtype.itemsize, capability))
    return [None, *(plan for plan in plans if describe_plan(plan) != shipped)]


def _built_row_plans(case: Case, module: Any) -> list[Any]:
    """Rows staged in shared memory or registers by 1 to 16 blocks, and rows read twice through L2."""
    vectors = -(-case.vocab * case.dtype.itemsize // 16) + 1
    shared, registers = module.RowStage.shared, module.RowStage.registers
    layouts: list[dict[str, Any]] = []
    for cluster in (1, 2, 4, 8, 16):
        for threads in (128, 256, 384, 512):
            needed = -(-vectors // (cluster * threads))
            held = min(needed, SHARED_BYTES // (16 * threads))
            if needed < 2 or (held < needed and threads < 512):
                continue
            layout = {"stage": shared, "cluster": cluster, "threads": threads, "shared_vectors": held}
            layouts.append(layout)
            if threads >= 256 and cluster in (2, 4, 8):
                layouts.append({**layout, "streaming": True})
        threads = -(-vectors // (cluster * 8 * 32)) * 32
        if threads >= 64:
            layout = {"stage": registers, "cluster": cluster, "threads": threads}
            layouts += [layout, {**layout, "streaming": True}]
    # One, two and three blocks per multiprocessor.
    layouts += [{"stage": shared, "threads": 512, "pad_bytes": pad} for pad in (200 << 10, 100 << 10, 0)]
    plans = []
    for layout in layouts:
        with contextlib.suppress(ValueError):  # the kernel states its own limits
            plans.append(module.RowPlan(**layout))
    return plans


def triton_configs(kernel: str, configs: Any, listed: Listed) -> list[Any]:
    """Candidates of "triton-rows", "triton-stream" or "linear"; None is what the backend takes by itself."""
    kind = configs.LinearConfig if kernel == "linear" else configs.RowConfig
    name = {"triton-rows": "ROW", "triton-stream": "STREAM", "linear": "LINEAR"}[kernel]
    if kernel in listed:
        candidates = [kind(**entry) for entry in listed[kernel]]
    else:
        candidates = list(getattr(configs, f"{name}_CANDIDATES"))
    return [None, *dict.fromkeys(candidates)]


def read_listed(path: Path | None) -> Listed:
    """Candidates from a JSON object: kernel -> list of keyword arguments; SystemExit where one is not known."""
    if path is None:
        return {}
    listed: Listed = json.loads(path.read_text())
    known = ("rows", "triton-rows", "triton-stream", "linear")
    unknown = sorted(set(listed) - set(known))
    if unknown:
        raise SystemExit(f"{path}: expected the kernels {', '.join(known)}, got {', '.join(unknown)}")
    return listed
