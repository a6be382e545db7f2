"""`python -m bench.gpu_run`: every part of a run, one after the other; `bash bench/gpu.sh` is this.

A part that fails or runs out of time does not stop the others. After each the summary and the archive of everything
so far are written again, so that a run which is cut from outside leaves what it had. Exit code: 1 where a check
failed (environment, build, a test, a headline row, a sanitizer), else 3 where a part failed otherwise or did not
finish, else 0; 2 for settings that cannot be read.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.gpu_run.parts import Part, chosen, limit_of, with_budget
from bench.gpu_run.settings import ROOT, Settings, ask_gpu, read_settings
from bench.gpu_run.supervise import FAILED, NOT_FINISHED, OK, SKIPPED, Outcome, run

# Less than this is not worth a start.
_LEAST_SECONDS = 2.0
_SHOWN_LINES = 15


def variables_of(settings: Settings, part: Part) -> dict[str, str]:
    """The environment of a part's process."""
    # cmake and ninja may live beside the interpreter only.
    path = os.pathsep.join(
        [str(settings.env / "bin"), os.path.dirname(settings.python), os.environ.get("PATH", "")]
    )
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "PYTHON": settings.python, **part.variables}


def run_parts(settings: Settings, parts: Sequence[Part]) -> list[Outcome]:
    """Run them in order within the limit of the whole."""
    begun = time.monotonic()
    outcomes: list[Outcome] = []
    for i, part in enumerate(parts):
        left = settings.limit - (time.monotonic() - begun)
        limit = limit_of(parts, i, left)
        print(f"== {part.name}", flush=True)
        if part.missing:
            outcome = Outcome(part.name, SKIPPED, reason=part.missing)
        elif outcomes and outcomes[0].status != OK:
            outcome = Outcome(part.name, SKIPPED, reason=f"{outcomes[0].name} {outcomes[0].status}")
        elif limit < _LEAST_SECONDS:
            outcome = Outcome(part.name, NOT_FINISHED, reason="no time left")
        else:
            log = settings.out / "logs" / f"{part.name}.log"
            outcome = run(
                part.name,
                with_budget(part.command, limit),
                limit,
                log,
                cwd=ROOT,
                env=variables_of(settings, part),
                must_show=part.must_show,
            )
            print("\n".join(log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]))
        print(outcome, flush=True)
        outcomes.append(outcome)
        write_summary(settings, outcomes, time.monotonic() - begun)
    return outcomes


def write_summary(settings: Settings, outcomes: Sequence[Outcome], seconds: float) -> None:
    """`summary.json` and `summary.txt` in OUT, and the archive of everything that lies there."""
    record = {
        "device": ask_gpu("name") or settings.device,
        "driver": ask_gpu("driver_version"),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": os.environ.get("BENCH_COMMIT", ""),
        "limit": settings.limit,
        "seconds": round(seconds, 1),
        "parts": [asdict(outcome) for outcome in outcomes],
    }
    (settings.out / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [f"device: {record['device']}", *map(str, outcomes), f"total {seconds:.0f} s"]
    (settings.out / "summary.txt").write_text("\n".join(lines) + "\n")
    settings.archive.parent.mkdir(parents=True, exist_ok=True)
    partial = settings.archive.with_name(settings.archive.name + ".partial")
    with tarfile.open(partial, "w:gz") as archive:
        for path in sorted(settings.out.rglob("*")):
            if path.is_file() and not path.name.endswith((".tar.gz", ".partial")):
                archive.add(path, arcname=str(Path("results") / path.relative_to(settings.out)))
    partial.replace(settings.archive)


def exit_code(parts: Sequence[Part], outcomes: Sequence[Outcome]) -> int:
    """1: a check failed; 3: something else failed or did not finish; 0: everything that could run is well."""
    checks = {part.name for part in parts if part.is_check}
    if any(outcome.status == FAILED and outcome.name in checks for outcome in outcomes):
        return 1
    return 3 if any(outcome.status not in (OK, SKIPPED) for outcome in outcomes) else 0


def dry_run(settings: Settings, parts: Sequence[Part]) -> int:
    """Print every command with its seconds, and import every Python module that they name."""
    for part in parts:
        command = shlex.join(with_budget(part.command, part.share))
        print(f"DRY_RUN {part.name} ({part.share:.0f} s): {part.missing or command}")
    modules = {word for part in parts for word in part.command if word.startswith("bench.")}
    for module in sorted(modules):
        importlib.import_module(module)
        print("imported", module)
    return 0


def main() -> int:
    """Run the parts that the environment variables choose."""
    try:
        settings = read_settings()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    parts = chosen(settings)
    if settings.dry_run:
        return dry_run(settings, parts)
    settings.out.mkdir(parents=True, exist_ok=True)
    outcomes = run_parts(settings, parts)
    print((settings.out / "summary.txt").read_text(), end="")
    return exit_code(parts, outcomes)


if __name__ == "__main__":
    sys.exit(main())
