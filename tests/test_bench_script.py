"""`bash bench/gpu.sh` without a GPU: its order, its seconds, its files and exit codes, on stand-in tools and parts.

One test runs the whole script at toy size; the others take its pieces, with parts that crash, hang or wait in vain.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench.gpu_run import __main__ as whole
from bench.gpu_run.parts import Part, all_parts, chosen, gpu_test_files, limit_of, with_budget
from bench.gpu_run.settings import STEPS, Settings, read_settings
from bench.gpu_run.supervise import FAILED, NOT_FINISHED, OK, SKIPPED, Outcome, run
from bench.gpu_run.wheels import split
from tests.test_bench_provision import make_wheel

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "gpu.sh"
ORDER = [
    "environment",
    "wheels",
    "machine",
    "build",
    "stream-tests",
    "headline",
    "row_kernels",
    "products",
    "profile",
    "ncu",
    "tests-alone",
    "tests",
    "tests-triton",
    "triton_kernels",
    "rows",
    "end_to_end",
    "sweep_rows",
    "sweep_triton",
    "memcheck",
    "racecheck",
]
FAKE_TOOLS = {
    "nvidia-smi": """
case "$*" in
  *query-gpu=name*) echo "Stand-in GPU";;
  *query-gpu=driver*) echo "580.0";;
  *query-gpu=compute_cap*) echo "9.0";;
  *"-l 1"*) while :; do echo "1980, 2619, 650.0, 700.0, 55, 0x4"; sleep 0.2; done;;
  *query-gpu*) echo "1980, 2619, 650.0, 700.0, 55, 0x4";;
esac""",
    "ncu": """
while [ "$1" != "${1#-}" ]; do
  case "$1" in --set|-c|--kernel-name|--clock-control) shift 2;; *) shift;; esac
done
exec "$@" """,
    # One tool hangs and the other finds something.
    "compute-sanitizer": 'case "$*" in *memcheck*) sleep 300;; *) echo "race"; exit 9;; esac',
}


def settings(tmp_path, **changes):
    plain = Settings(out=tmp_path / "out", archive=tmp_path / "all.tar.gz", env=tmp_path / "env")
    return replace(plain, **changes)


def shell_part(name, program, share, **options):
    return Part(name, "", ("bash", "-c", program), share, **options)


# --- order and seconds -------------------------------------------------------------------------------------------


def test_the_headline_comes_before_what_explains_it_and_sanitizers_come_last(tmp_path):
    assert [part.name for part in all_parts(settings(tmp_path))] == ORDER
    checks = {part.name for part in all_parts(settings(tmp_path)) if part.is_check}
    tests = {"stream-tests", "tests-alone", "tests", "tests-triton"}
    assert checks == {"environment", "build", "headline", "memcheck", "racecheck", *tests}


@pytest.mark.parametrize("limit", [100.0, 560.0])
def test_shares_add_up_to_the_limit_whatever_steps_are_chosen(tmp_path, limit):
    for steps in ((), STEPS, *((step,) for step in STEPS), STEPS[:4]):
        parts = chosen(settings(tmp_path, steps=steps, limit=limit))
        assert sum(part.share for part in parts) == pytest.approx(limit)
        assert all(part.share == 0 for part in parts if part.missing)


def test_every_part_keeps_its_share_even_if_all_before_it_use_theirs(tmp_path):
    parts = chosen(settings(tmp_path))
    left = 560.0
    for i, part in enumerate(parts):
        limit = limit_of(parts, i, left)
        assert limit == pytest.approx(part.share)
        left -= limit
    assert left == pytest.approx(0)
    shares = {part.name: part.share for part in parts}
    assert shares["headline"] >= 70
    assert shares["headline"] + shares["rows"] >= 140


def test_unused_seconds_flow_on_up_to_the_stretch(tmp_path):
    parts = chosen(settings(tmp_path))
    headline = ORDER.index("headline")
    later = sum(part.share for part in parts[headline + 1 :])
    assert limit_of(parts, headline, 530.0) == pytest.approx(
        min(530 - later, parts[headline].share * parts[headline].stretch)
    )
    assert limit_of(parts, headline, later - 1) == 0


def test_a_command_is_told_to_stop_before_it_is_stopped():
    assert with_budget(["x", "--time-budget", "{budget}"], 100.0) == ["x", "--time-budget", "80"]
    assert with_budget(["--seconds={budget}"], 10.0) == ["--seconds=6"]


def test_gpu_tests_are_found_by_their_marker():
    """Every file whose tests run on the device has it: the shared grid, Triton's own, and what only a GPU shows."""
    found = {path.name for path in gpu_test_files(ROOT / "tests")}
    for path in (ROOT / "tests").glob("test_*.py"):
        text = path.read_text()
        interpreted_alone = "if not INTERPRETING:\n    pytest.skip(" in text
        if re.search(r"^skip_unless_kernels_run\(\)", text, re.MULTILINE) and not interpreted_alone:
            assert path.name in found
    assert {"test_gpu.py", "test_triton_grid.py", "test_triton_linear.py", "test_triton_sweep.py"} <= found


def test_toy_runs_try_triton_tests_in_the_interpreter(tmp_path):
    parts = {part.name: part for part in all_parts(settings(tmp_path, device="cpu"))}
    assert parts["tests-triton"].variables == {"TRITON_INTERPRET": "1"}
    assert all(part.must_show == "" for part in parts.values())
    on_gpu = {part.name: part for part in all_parts(settings(tmp_path))}
    assert on_gpu["tests-triton"].variables == {}
    assert on_gpu["tests-triton"].must_show == on_gpu["stream-tests"].must_show == r"\d+ passed"
    files = [word for word in on_gpu["tests-triton"].command if word.startswith("tests/")]
    assert "tests/test_triton_linear.py" in files
    assert "tests/test_gpu.py" not in files


# --- settings ----------------------------------------------------------------------------------------------------


def test_settings_are_read_from_the_environment(tmp_path):
    read = read_settings(
        {
            "OUT": str(tmp_path),
            "STEPS": "build bench",
            "LIMIT": "60",
            "WHEELS": f"{tmp_path}/a:{tmp_path}/b",
            "CASES": "x y",
            "DEVICE": "cpu",
        }
    )
    assert (read.out, read.archive) == (tmp_path, tmp_path / "results.tar.gz")
    assert read.steps == ("build", "bench")
    assert read.wheels == (tmp_path / "a", tmp_path / "b")
    assert read.cases == ("x", "y")
    assert (read.cuda, read.is_toy, read.limit) == (False, True, 60.0)
    assert read_settings({}).cuda
    assert read_settings({"DEVICE": "cpu"}).out == ROOT / "build" / "gpu-toy"  # never among committed results


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DEVICE", "tpu", "DEVICE: expected cuda or cpu, got 'tpu'"),
        ("STEPS", "build tset", "STEPS: expected some of machine .*, got tset"),
        ("LIMIT", "ten", "LIMIT: expected seconds, got 'ten'"),
        ("CUDA", "yes", "CUDA: expected ON or OFF, got 'yes'"),
    ],
)
def test_settings_that_cannot_be_read_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        read_settings({name: value})


# --- one part ----------------------------------------------------------------------------------------------------


def run_shell(tmp_path, program, limit=20.0, **options):
    command = ["bash", "-c", program]
    return run("part", command, limit, tmp_path / "part.log", cwd=tmp_path, env=dict(os.environ), **options)


@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        ("echo 3 passed", OK, ""),
        ("echo text; exit 7", FAILED, "exit code 7"),
        ("kill -SEGV $$", FAILED, "signal SIGSEGV"),
        ("echo rows left out; exit 3", NOT_FINISHED, "left something out for want of time"),
    ],
)
def test_how_a_part_ends(tmp_path, program, status, reason):
    outcome = run_shell(tmp_path, program)
    assert (outcome.status, outcome.reason) == (status, reason)
    assert outcome.seconds < 15


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    started = time.monotonic()
    program = "trap '' TERM; (sleep 300 & echo $! >child; wait) & echo before; wait; sleep 300"
    outcome = run_shell(tmp_path, program, limit=1.0)
    assert (outcome.status, outcome.reason) == (NOT_FINISHED, "ended after 1 s")
    assert time.monotonic() - started < 12
    assert (tmp_path / "part.log").read_text() == "before\n"
    state = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_tests_that_were_all_skipped_prove_nothing(tmp_path):
    outcome = run_shell(tmp_path, "echo 40 skipped", must_show=r"\d+ passed")
    assert outcome.status == FAILED
    assert "shows no" in outcome.reason


def test_a_command_that_is_not_there_is_a_failure(tmp_path):
    outcome = run("x", ["/no/such/program"], 5, tmp_path / "x.log", cwd=tmp_path, env={})
    assert outcome.status == FAILED
    assert "No such file" in outcome.reason


# --- all parts ---------------------------------------------------------------------------------------------------


def test_a_crash_and_a_hang_cost_their_own_results_only(tmp_path, capsys):
    """The archive is written after every part, so a run that is cut from outside leaves what it had."""
    out = tmp_path / "out"
    parts = [
        shell_part("first", f"echo 1 >{out}/first.json", 3),
        shell_part("crash", f"test -f {tmp_path}/all.tar.gz && kill -SEGV $$", 3, is_check=True),
        shell_part("hang", f"echo half >{out}/hang.json; sleep 300", 3, stretch=1),
        Part("absent", "", ("x",), 0, missing="it is not installed"),
        shell_part("last", f"echo 2 >{out}/last.json", 3),
    ]
    out.mkdir()
    outcomes = whole.run_parts(settings(tmp_path, limit=12.0), parts)
    assert [o.status for o in outcomes] == [OK, FAILED, NOT_FINISHED, SKIPPED, OK]
    assert outcomes[1].reason == "signal SIGSEGV"
    record = json.loads((out / "summary.json").read_text())
    assert [part["name"] for part in record["parts"]] == ["first", "crash", "hang", "absent", "last"]
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        names = archive.getnames()
    kept = {"first.json", "hang.json", "last.json", "summary.json", "summary.txt", "logs/hang.log"}
    assert {f"results/{name}" for name in kept} <= set(names)
    assert "== hang" in capsys.readouterr().out


def test_parts_behind_a_spent_limit_are_not_finished_and_the_limit_holds(tmp_path):
    parts = [shell_part("environment", "", 4), shell_part("long", "sleep 300", 3), shell_part("late", "", 1)]
    (tmp_path / "out").mkdir()
    begun = time.monotonic()
    outcomes = whole.run_parts(settings(tmp_path, limit=8.0), parts)
    assert [o.status for o in outcomes] == [OK, NOT_FINISHED, NOT_FINISHED]
    assert outcomes[2].reason == "no time left"
    assert time.monotonic() - begun < 15


def test_without_an_environment_nothing_else_is_tried(tmp_path):
    parts = [shell_part("environment", "exit 1", 30, is_check=True), shell_part("build", "touch built", 30)]
    (tmp_path / "out").mkdir()
    outcomes = whole.run_parts(settings(tmp_path, limit=60.0), parts)
    assert (outcomes[1].status, outcomes[1].reason) == (SKIPPED, "environment failed")


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ((OK, OK, SKIPPED), 0),
        ((FAILED, OK, OK), 1),
        ((NOT_FINISHED, OK, OK), 3),
        ((OK, FAILED, OK), 3),
        ((OK, NOT_FINISHED, OK), 3),
        ((FAILED, NOT_FINISHED, FAILED), 1),
    ],
)
def test_the_exit_code_tells_failures_of_checks_from_the_rest(statuses, code):
    parts = [shell_part("check", "", 1, is_check=True), shell_part("micro", "", 1), shell_part("more", "", 1)]
    outcomes = [Outcome(part.name, status) for part, status in zip(parts, statuses, strict=True)]
    assert whole.exit_code(parts, outcomes) == code


# --- the script --------------------------------------------------------------------------------------------------


def run_script(**environment):
    return subprocess.run(
        ["bash", str(SCRIPT)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_script_passes_shellcheck():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_script_refuses_what_it_cannot_read():
    done = run_script(STEPS="everything")
    assert done.returncode == 2
    assert "STEPS: expected some of" in done.stderr
    assert run_script(PYTHON="/bin/false").returncode == 1


@pytest.mark.slow
def test_dry_run_prints_every_command_and_imports_every_module(tmp_path):
    done = run_script(DRY_RUN="1", OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("DRY_RUN ")]
    assert [line[1] for line in lines] == ORDER
    imported = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("imported")}
    micro = {f"bench.micro.{path.stem}" for path in (ROOT / "bench" / "micro").glob("*.py")}
    commands = {name for name in micro if "def main(" in (ROOT / f"{name.replace('.', '/')}.py").read_text()}
    assert commands | {"bench.gpu", "bench.sanitize", "bench.gpu_run.build"} <= imported
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_script_at_toy_size(tmp_path):
    """Everything but the GPU: stand-ins for its tools, of which one hangs and one finds a race."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, program in FAKE_TOOLS.items():
        (tools / name).write_text(f"#!/bin/sh\n{program}\n")
        (tools / name).chmod(0o755)
    native = sorted((ROOT / "slime_fused").glob("_C.*.so"))
    out = tmp_path / "out"
    split(make_wheel(tmp_path / "whole"), 300, tmp_path / "pieces")
    done = run_script(
        PATH=f"{tools}:{os.environ['PATH']}",
        DEVICE="cpu",
        OUT=str(out),
        ENV=str(tmp_path / "env"),
        ARCHIVE=str(tmp_path / "all.tar.gz"),
        PREBUILT=str(native[0]) if native else "",
        WHEELS=str(tmp_path / "pieces"),
        STEPS="machine build bench micro sanitizer",
        # The parts take half a minute; the hanging one takes its share.
        LIMIT="220",
        BENCH_COMMIT="abc",
    )
    assert done.returncode == 1, done.stdout + done.stderr  # racecheck
    record = json.loads((out / "summary.json").read_text())
    parts = {part["name"]: part for part in record["parts"]}
    assert list(parts) == [name for name in ORDER if name in parts]
    expected = dict.fromkeys(parts, OK) | {"memcheck": NOT_FINISHED, "racecheck": FAILED}
    if not available_triton():
        expected["triton_kernels"] = FAILED
    assert {name: part["status"] for name, part in parts.items()} == expected, done.stdout
    assert (record["device"], record["driver"], record["commit"]) == ("Stand-in GPU", "580.0", "abc")
    assert record["seconds"] < 220
    assert parts["headline"]["clocks"]["held back by"] == {"software power cap": 1.0}

    gpu = json.loads((out / "gpu.json").read_text())
    assert gpu["machine"]["commit"] == "abc"
    rows = {(row["case"], row["contestant"]): row for row in gpu["rows"]}
    for case in ("quick-fp32", "quick-bf16-m50"):
        row = rows[case, "slime_fused"]
        assert (row["status"], len(row["ratios"]), row["ran"]["backends"]) == ("ok", 8, ["cpu"])
        assert row["ran"]["plan"]["kind"] == "stream"
        assert row["warning"] == ""
    assert (out / "logs" / "wheels.log").read_text().endswith("peer-1.0-py3-none-any.whl: installed\n")
    assert rows["quick-fp32", "naive"]["status"] == "ok"  # of the second stage, in the same file
    assert rows["quick-fp32", "ce-quack"]["status"] == "unsupported"
    for name in ("row_kernels", "products", "profile"):
        payload = json.loads((out / f"{name}.json").read_text())
        assert payload["finished"] is True
        assert payload["machine"]["commit"] == "abc"
        assert payload["results"]
    assert "== 2 chunks" in (out / "profile.txt").read_text()
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        assert {"results/gpu.json", "results/logs/headline.log", "results/summary.txt"} <= set(archive.getnames())


def available_triton():
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
