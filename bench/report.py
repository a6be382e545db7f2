"""Result files as markdown: `python -m bench.report` rewrites the tables between markers in README.md.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; NAME is `cpu`, `losses`, `gpu` or
`end_to_end`. Plots go to docs/ beside it. Only committed result files are read, so every number in a table has its
raw samples.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.cases import MIB, Case
from bench.results import OK, RESULTS, Row, Run, read_run

_ROOT = Path(__file__).parent.parent
_HEADINGS = (
    "case",
    "contestant",
    "time",
    "x products",
    "TFLOP/s",
    "peak memory",
    "dX error",
    "dW error",
)


def milliseconds(value: float | None) -> str:
    """A time with three significant digits."""
    if value is None:
        return ""
    return f"{value / 1e3:.2f} s" if value >= 1000 else f"{value:.3g} ms"


def mebibytes(value: int | None) -> str:
    """A size in MiB, or KiB below one."""
    if value is None:
        return ""
    return f"{value / MIB:,.0f} MiB" if value >= MIB else f"{value / 1024:,.0f} KiB"


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def tflops(row: Row, case: Case) -> float | None:
    """Rate over the FLOPs that the case needs (recomputation counts as time, not as work)."""
    if row.median_ms is None:
        return None
    return case.products * case.product_flops / (row.median_ms * 1e-3) / 1e12


def over_products(row: Row) -> str:
    """The median ratio to the bare products, and in brackets the lowest and highest of a round."""
    between = row.ratio_range
    spread = "" if between is None else f" ({between[0]:.3f}-{between[1]:.3f})"
    return _number(row.over_products, ".3f") + spread


def contestant(row: Row) -> str:
    """The contestant's name, and what makes the row something else than the name says."""
    return f"{row.contestant} [{row.warning}]" if row.warning else row.contestant


def cells(row: Row, case: Case) -> tuple[str, ...]:
    """The cells of one row, in the order of the headings."""
    if row.status != OK:
        return (row.case, contestant(row), f"{row.status}: {row.reason}", "", "", "", "", "")
    return (
        row.case,
        contestant(row),
        milliseconds(row.median_ms),
        over_products(row),
        _number(tflops(row, case), ".3g"),
        mebibytes(row.peak_bytes),
        _number(row.error_d_hidden, ".1e"),
        _number(row.error_d_weight, ".1e"),
    )


def format_rows(rows: Iterable[Row], cases: Mapping[str, Case]) -> str:
    """Rows as aligned text, for the terminal."""
    table = [_HEADINGS, *(cells(row, cases[row.case]) for row in rows)]
    # A reason in place of a time may be long; it does not widen the column.
    widths = [max(len(line[i]) for line in table if len(line[i]) <= 32) for i in range(len(_HEADINGS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)


def markdown_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table; pipes inside cells are escaped."""
    rows = [list(headings), ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def run_markdown(run: Run) -> str:
    """One run: the machine in a sentence, then a table per case, fastest first."""
    machine = run.machine
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    parts = [f"{where}; torch {machine['torch']}, {machine['date']}, commit {machine['commit'][:10]}."]
    for name in run.cases:
        case = run.case(name)
        rows = [row for row in run.rows if row.case == name]
        rows.sort(key=lambda row: (row.median_ms is None, row.median_ms or 0.0))
        head = "frozen" if case.frozen_head else "trainable"
        parts.append(
            f"**{name}**: {case.tokens} tokens ({case.valid_tokens} with a label), D={case.hidden}, "
            f"V={case.vocab}, {case.dtype}, {head} head"
        )
        parts.append(markdown_table(_HEADINGS[1:], (cells(row, case)[1:] for row in rows)))
    return "\n\n".join(parts)


_SUMMARY_CASES = ("v32k-fp32", "v32k-bf16", "v32k-fp32-m50", "v152k-fp32", "v152k-bf16")
_SUMMARY_CONTESTANTS = ("slime_fused", "naive", "naive-compiled", "torch-linear-ce")


def summary_markdown(run: Run) -> str:
    """The README's first table: time over the bare products of the same run, and peak memory, in few columns."""
    lines = []
    for name in (n for n in _SUMMARY_CASES if n in run.cases):
        case = run.case(name)
        over = {row.contestant: _number(row.over_products, ".2f") for row in run.rows if row.case == name}
        size = f"{case.valid_tokens} of {case.tokens} tokens, D={case.hidden}, V={case.vocab}, {case.dtype}"
        lines.append((size, *(over.get(c, "") or "not run" for c in _SUMMARY_CONTESTANTS)))
    headings = ("forward + backward, time / bare matrix products", "slime_fused", "naive", "compiled", "torch")
    return markdown_table(headings, [*lines, *_summary_memory(run)])


def _summary_memory(run: Run) -> list[tuple[str, ...]]:
    """One line per case whose memory was measured: the peak above inputs and returned gradients."""
    lines = []
    for name in run.cases:
        case = run.case(name)
        peaks = {row.contestant: row.peak_bytes for row in run.rows if row.case == name and row.peak_bytes}
        if peaks:
            size = f"memory above gradients: {case.tokens} tokens, D={case.hidden}, V={case.vocab}, {case.dtype}"
            extra = (
                mebibytes(max(peaks[c] - case.gradient_bytes, 0)) if c in peaks else "not run"
                for c in _SUMMARY_CONTESTANTS
            )
            lines.append((size, *extra))
    return lines


def splice(text: str, name: str, content: str) -> str:
    """Replace what stands between the markers of ``name``; ValueError where they are missing."""
    pattern = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench:{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no markers <!-- bench:{name} --> ... <!-- /bench:{name} --> in the text")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def stored_runs(kind: str, results: Path = RESULTS) -> list[Run]:
    """All runs of a kind (`cpu` or `gpu`), newest first; a GPU benchmark that was tried on a CPU is none."""
    runs = [read_run(path) for path in sorted(results.glob(f"*/{kind}.json"))]
    runs = [run for run in runs if kind != "gpu" or run.machine.get("gpu")]
    return sorted(runs, key=lambda run: run.machine["date"], reverse=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the tables and plots, or print them."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=_ROOT / "README.md")
    parser.add_argument("--plots", type=Path, default=None, help="folder for PNG plots (default: none are drawn)")
    parser.add_argument("--print", action="store_true", help="print the tables and touch no file")
    args = parser.parse_args(argv)
    for kind in ("cpu", "losses", "gpu"):
        runs = stored_runs(kind, args.results)
        if not runs:
            continue
        content = "\n\n".join(run_markdown(run) for run in runs)
        if args.print:
            print(content)
            continue
        text = splice(args.readme.read_text(), kind, content)
        if kind == "cpu" and "<!-- bench:summary -->" in text:
            text = splice(text, "summary", summary_markdown(runs[0]))
        args.readme.write_text(text)
        if args.plots is not None and kind != "losses":
            from bench.plots import draw

            for path in draw(runs[0], kind, args.plots):
                print(f"wrote {path}")
    _report_steps(args)
    return 0


def _report_steps(args: argparse.Namespace) -> None:
    """Whole training steps; their place says what has not run, so it is written without a result file too."""
    from bench.steps.report import draw_steps, steps_markdown, stored_step_runs

    runs = stored_step_runs(args.results)
    content = steps_markdown(runs)
    if args.print:
        print(content)
        return
    text = args.readme.read_text()
    if "<!-- bench:end_to_end -->" in text:
        args.readme.write_text(splice(text, "end_to_end", content))
    if args.plots is not None:
        for kind_runs in ([r for r in runs if "gpu" in r.machine], [r for r in runs if "gpu" not in r.machine]):
            for path in draw_steps(kind_runs[0], args.plots) if kind_runs else ():
                print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
