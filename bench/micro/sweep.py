"""Compare layouts of the CUDA row kernel and tile sizes of the Triton kernels, and write the winners as a table.

    python -m bench.micro.sweep --out sweep.json
    python -m bench.micro.sweep --kernels rows --vocab 128256 151936 --candidates mine.json --out sweep.json

Nothing is compiled again for a layout of the CUDA kernel, so a vocabulary takes seconds; a Triton tile takes its
compilation. Every candidate is compared with float64 before it is timed, and written at once. Beside the JSON file
goes `sweep.md`: per kernel and vocabulary the fastest right candidate against the shipped one, from which
`csrc/cuda/row_plan.cpp` and `triton_kernels/configs.py` can be edited, and per Triton kernel the one that is best
over all of them. `mine.json` holds {"rows": [{"cluster": 4, "threads": 256,
"shared_vectors": 16}], "triton-rows": [{"block": 8192, "num_warps": 16}]}, keyword arguments of `RowPlan`,
`RowConfig` and `LinearConfig`; without it the lists of `bench/micro/candidates.py` are compared.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.micro import candidates
from bench.micro.candidates import Listed
from bench.micro.common import GIB, Report, copy_rate, first_line, parser, within
from bench.micro.row_bench import Case, RowBench, native, row_backend
from bench.report import markdown_table
from slime_fused.backends import get_backend

KERNELS = ("rows", "triton-rows", "triton-stream", "linear")
VOCABULARIES = (128256, 151936, 131072, 32000, 262144)
LINEAR_SHAPES = ((8192, 4096, 128256), (16384, 2560, 262144))
TOY_VOCABULARIES = (1000, 300)
TOY_LINEAR_SHAPES = ((8, 32, 260),)
_ROW_KERNELS = {"triton-rows": "softmax_residual", "triton-stream": "residual_from_stats"}
# Toy sizes take as few candidates as show that the machinery works.
_TOY_CANDIDATES = 3
# The kernels whose tile sizes are constants of configs.py.
_TRITON = {"triton-rows": "RowConfig", "triton-stream": "RowConfig", "linear": "LinearConfig"}


class Sweep:
    """Runs candidates and puts each into the report."""

    def __init__(self, report: Report, device: torch.device, listed: Listed, copy_gb_s: float) -> None:
        self.report, self.device, self.listed, self.copy_gb_s = report, device, listed, copy_gb_s
        self.is_toy = device.type != "cuda"
        self.repeats = 2 if self.is_toy else 11

    def _add(self, sweep: str, case: str, result: Any, candidate: dict[str, Any], *, is_shipped: bool) -> None:
        self.report.add({"sweep": sweep, **asdict(result), "candidate": candidate, "is_shipped": is_shipped})
        ms = result.milliseconds
        mark = {True: "", False: " WRONG", None: " n/a"}[result.correct]
        shown = "       --" if ms is None else f"{ms:9.4f}"
        print(f"{sweep:14s} {case:20s} {shown} ms {result.layout}{mark} {result.note}", flush=True)

    def _shortened(self, found: list[Any]) -> list[Any]:
        return found[:_TOY_CANDIDATES] if self.is_toy else found

    def rows(self, vocab: int) -> None:
        """Every layout of the CUDA `softmax_residual` at one vocabulary, in bfloat16."""
        case = Case(vocab, vocab, torch.bfloat16, size=(1 << 16) if self.is_toy else GIB)
        capability = 90 if self.is_toy else native().row_kernel_capability(self.device.index or 0)
        bench = RowBench(case, self.copy_gb_s, row_backend(self.device), self.device, self.repeats)
        for plan in self._shortened(candidates.row_plans(case, capability, self.listed)):
            layout = plan or native().choose_row_plan(vocab, 2, capability)
            record = {name: _plain(getattr(layout, name, None)) for name in candidates.PLAN_FIELDS}
            result = bench.measure("softmax_residual", candidates.describe_plan(plan), plan)
            self._add("rows", case.name, result, record, is_shipped=plan is None)

    def triton_rows(self, sweep: str, vocab: int) -> None:
        """Every tile of one Triton row kernel at one vocabulary."""
        from slime_fused.triton_kernels import configs

        from bench.micro.triton_bench import TritonRows, short

        dtype = torch.float32 if self.is_toy else torch.bfloat16
        case = Case(vocab, vocab, dtype, size=16 * vocab if self.is_toy else GIB)
        bench = RowBench(case, self.copy_gb_s, TritonRows(), self.device, self.repeats, slack=4)
        for config in self._shortened(candidates.triton_configs(sweep, configs, self.listed)):
            result = bench.measure(_ROW_KERNELS[sweep], short(config), config)
            self._add(sweep, case.name, result, _record(config), is_shipped=config is None)

    def linear(self, shape: tuple[int, int, int]) -> None:
        """torch.mm and every tile of the fused head at one (M, D, V)."""
        from slime_fused.triton_kernels import configs

        from bench.micro.triton_bench import LinearBench

        bench = LinearBench(shape, self.device, torch.float32 if self.is_toy else torch.bfloat16, self.repeats)
        self._add("linear", bench.name, bench.product, {}, is_shipped=False)
        found = candidates.triton_configs("linear", configs, self.listed)
        if self.is_toy:  # what the interpreter runs in seconds
            found = [None, configs.LINEAR_CONFIGS["small", 4]]
        for config in found:
            self._add("linear", bench.name, bench.measure(config), _record(config), is_shipped=config is None)


def _record(config: Any) -> dict[str, Any]:
    return {"config": "as shipped"} if config is None else asdict(config)


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int)) else str(value).rpartition(".")[2]


# --- winners -----------------------------------------------------------------------------------------------------


def winners(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per kernel and case the fastest right candidate, and the shipped one's time (None where it failed)."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        if result["correct"] is not True or not result["candidate"]:
            continue
        key = (result["sweep"], result.get("case") or result["shape"])
        row = table.setdefault(key, {"sweep": key[0], "case": key[1], "best": result, "shipped_ms": None})
        if result["milliseconds"] < row["best"]["milliseconds"]:
            row["best"] = result
        if result["is_shipped"]:
            row["shipped_ms"] = result["milliseconds"]
    return list(table.values())


def best_over_cases(results: Sequence[dict[str, Any]], sweep: str) -> tuple[dict[str, Any], float] | None:
    """The candidate that ran right in every case with the least geometric mean of its time over the case's best.

    None where no candidate ran right everywhere.
    """
    best = {row["case"]: row["best"]["milliseconds"] for row in winners(results) if row["sweep"] == sweep}
    losses: dict[str, list[float]] = {}
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        if result["sweep"] == sweep and result["correct"] is True and result["candidate"]:
            case = result.get("case") or result["shape"]
            losses.setdefault(result["layout"], []).append(math.log(result["milliseconds"] / best[case]))
            found[result["layout"]] = result["candidate"]
    whole = {layout: sum(values) / len(values) for layout, values in losses.items() if len(values) == len(best)}
    if not whole:
        return None
    layout = min(whole, key=lambda name: whole[name])
    return found[layout], math.exp(whole[layout])


def winners_markdown(results: Sequence[dict[str, Any]]) -> str:
    """The winners per case, and for Triton the best of all cases."""
    lines = []
    for row in winners(results):
        best, shipped = row["best"], row["shipped_ms"]
        gain = "" if shipped is None else f"{shipped / best['milliseconds']:.3f}"
        values = ", ".join(f"{name}={value}" for name, value in best["candidate"].items() if value is not None)
        times = (f"{best['milliseconds']:.4f}", "failed" if shipped is None else f"{shipped:.4f}", gain)
        lines.append((row["sweep"], row["case"], values, *times))
    headings = ("kernel", "case", "fastest right candidate", "ms", "shipped, ms", "gain")
    parts = [markdown_table(headings, lines)]
    for sweep, kind in _TRITON.items():
        chosen = best_over_cases(results, sweep)
        if chosen is not None:
            values = ", ".join(f"{name}={value}" for name, value in chosen[0].items())
            parts.append(f"{sweep}, all cases: {kind}({values}), {chosen[1]:.3f} x the best of each")
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; the exit code says whether a candidate gave wrong numbers."""
    options = parser(__doc__)
    options.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    options.add_argument("--vocab", nargs="+", type=int, default=None, help="of the row kernels, first to last")
    options.add_argument("--candidates", type=Path, default=None, help="JSON file of candidates")
    args = options.parse_args(argv)
    device = torch.device(args.device)
    is_toy = device.type != "cuda"
    listed = candidates.read_listed(args.candidates)
    kernels = list(args.kernels)
    if "rows" in kernels:
        row_backend(device)
    available, reason = get_backend("triton").available()
    if not available and kernels != ["rows"]:
        print(f"the Triton kernels are left out: {reason}")
        kernels = [kernel for kernel in kernels if kernel == "rows"]

    rate = copy_rate(device, (1 << 20) if is_toy else GIB)
    report = Report(args.out, device, kernels=kernels, copy_gb_s=rate)
    sweep = Sweep(report, device, listed, rate)
    vocabularies = args.vocab or (TOY_VOCABULARIES if is_toy else VOCABULARIES)
    work: list[tuple[str, Callable[[], None]]] = []
    for kernel in kernels:
        if kernel == "rows":
            work += [(f"{kernel} {v}", lambda v=v: sweep.rows(v)) for v in vocabularies]  # type: ignore[misc]
        elif kernel == "linear":
            shapes = TOY_LINEAR_SHAPES if is_toy else LINEAR_SHAPES
            work += [(f"{kernel} {s}", lambda s=s: sweep.linear(s)) for s in shapes]  # type: ignore[misc]
        else:
            work += [
                (f"{kernel} {v}", lambda k=kernel, v=v: sweep.triton_rows(k, v))  # type: ignore[misc]
                for v in vocabularies
            ]
    for name, run in within(args.seconds, report, work):
        try:
            run()
        except torch.OutOfMemoryError as error:
            print(f"{name}: {first_line(error)}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if args.out is not None:
            args.out.with_suffix(".md").write_text(winners_markdown(report.results))
    print(winners_markdown(report.results))
    return report.finish(has_failed=any(result["correct"] is False for result in report.results))


if __name__ == "__main__":
    sys.exit(main())
