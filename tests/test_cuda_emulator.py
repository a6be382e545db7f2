"""The instrument itself: does the CUDA emulator catch the bugs it is there to catch, and pass correct kernels?

Each kernel of ``cuda_emulator/planted_bugs.cu`` runs in a process of its own, in three builds. What a build misses
is asserted too: it says which of the three a class of bugs needs.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda_emulator.build import REPORT_STATUS, EmulatorUnavailable, Mode, build, sanitizer_environment

pytestmark = pytest.mark.slow  # the first run compiles three programs, about 7 s each

RIGHT, WRONG, DEVICE_ERROR = 0, 1, 2
RANDOM_SEEDS = range(20)


@pytest.fixture(scope="session")
def programs() -> dict[str, Path]:
    try:
        return {mode: build("planted_bugs", mode) for mode in ("plain", "asan", "tsan")}
    except EmulatorUnavailable as error:
        pytest.skip(str(error))


def run(programs: dict[str, Path], mode: Mode, case: str, schedule: str = "fixed") -> tuple[int, str]:
    options = {key: value for key, value in sanitizer_environment(mode).items() if key != "LD_PRELOAD"}
    environment = {**os.environ, **options, "CUDA_EMULATOR_SCHEDULE": schedule}
    done = subprocess.run([programs[mode], case], capture_output=True, text=True, env=environment, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("case", ["block_sum", "syncwarp", "atomic_count", "votes_and_shuffles", "bf16"])
def test_correct_kernels_pass_everywhere(programs, case):
    for schedule in ("fixed", "reversed", "random:0", "random:1", "random:2"):
        assert run(programs, "plain", case, schedule) == (RIGHT, "")
    assert run(programs, "asan", case) == (RIGHT, "")
    assert run(programs, "tsan", case) == (RIGHT, "")


def planted_lines(report: str, count: int) -> list[str]:
    """The first ``count`` lines of planted_bugs.cu that a sanitizer's report names."""
    source = (Path(__file__).parent / "cuda_emulator" / "planted_bugs.cu").read_text().splitlines()
    numbers = [int(number) for number in re.findall(r"planted_bugs\.cu:(\d+)", report)]
    return [source[number - 1].strip() for number in dict.fromkeys(numbers)][:count]


@pytest.mark.parametrize(
    ("case", "plain", "line"),
    [
        (
            "missing_barrier_after_write",
            WRONG,
            "out[threadIdx.x] = shared[(threadIdx.x + kThreads / 2) % kThreads];",
        ),
        ("missing_barrier_before_reuse", RIGHT, "if (lane == 0) partial[warp] = sum;"),
        ("missing_syncwarp", WRONG, "out[threadIdx.x] = shared[threadIdx.x ^ 1];"),
        ("shuffle_for_syncwarp", RIGHT, "out[threadIdx.x] = shared[threadIdx.x ^ 1] + zero;"),
        ("non_atomic_count", RIGHT, "*out += 1;"),
    ],
)
def test_races(programs, case, plain, line):
    """ThreadSanitizer names the line whatever the schedule; a plain run shows only what the schedule brings out."""
    assert run(programs, "plain", case)[0] == plain
    for schedule in ("fixed", "reversed"):
        status, output = run(programs, "tsan", case, schedule)
        assert status == REPORT_STATUS
        assert "data race" in output
        assert line in planted_lines(output, 2)


def test_missing_barrier_before_reuse_needs_a_warp_that_runs_ahead(programs):
    in_order = [run(programs, "plain", "missing_barrier_before_reuse", order)[0] for order in ("fixed", "reversed")]
    at_random = [
        run(programs, "plain", "missing_barrier_before_reuse", f"random:{seed}")[0] for seed in RANDOM_SEEDS
    ]
    assert in_order == [RIGHT, RIGHT]
    assert WRONG in at_random


@pytest.mark.parametrize(
    ("case", "finding", "line"),
    [
        ("past_global", "heap-buffer-overflow", "if (threadIdx.x == kThreads - 1) out[threadIdx.x + 1] = 0;"),
        ("past_static_shared", "out of bounds", "shared[threadIdx.x + 1] = static_cast<int>(threadIdx.x) + 1;"),
        ("write_past_dynamic_shared", "heap-buffer-overflow", "shared[threadIdx.x + 1] = 0;"),
        ("read_past_dynamic_shared", "heap-buffer-overflow", "const int found = shared[threadIdx.x + 1];"),
        ("misaligned_vector", "misaligned address", "const float4 four = *reinterpret_cast<const float4*>("),
    ],
)
def test_bounds_and_alignment(programs, case, finding, line):
    status, output = run(programs, "asan", case)
    assert status == REPORT_STATUS
    assert finding in output
    assert planted_lines(output, 1)[0].startswith(line)


def test_write_past_dynamic_shared_memory_is_seen_without_a_sanitizer(programs):
    status, output = run(programs, "plain", "write_past_dynamic_shared")
    assert status == DEVICE_ERROR
    assert "block (0, 0, 0) wrote past the end of dynamic shared memory" in output


@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
def test_dynamic_shared_memory_begins_as_nan(programs, mode):
    assert run(programs, mode, "uninitialised_dynamic_shared")[0] == WRONG


@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "barrier_in_branch",
            r"thread \(64, 0, 0\) of block \(0, 0, 0\): exited while thread \(0, .* __syncthreads",
        ),
        ("barrier_in_both_branches", r"thread \(64, 0, 0\) .*: at another __syncthreads than thread \(0, 0, 0\)"),
        ("exit_before_barrier", r"thread \(9, 0, 0\) .*: exited while thread \(0, 0, 0\)"),
        ("lane_missing_from_shuffle", r"thread \(8, .*: __shfl_sync: the mask names thread \(7, 0, 0\)"),
        ("shuffle_outside_mask", r"lane 0 reads lane 20, which is not in the shuffle's mask"),
        ("different_masks", r"thread \(2, .*: a warp vote: lane 1 of the mask waits .* with another mask"),
        ("failed_assertion", r"thread \(50, 0, 0\) .*: assertion failed: threadIdx.x != 50"),
        ("trap", r"thread \(3, 0, 0\) of block \(1, 0, 0\): __trap\(\) \(planted_bugs.cu:\d+\)"),
        ("empty_grid", r"grid \(0, 1, 1\) is outside"),
    ],
)
def test_broken_rules_end_the_launch_and_name_the_thread(programs, mode, case, message):
    status, output = run(programs, mode, case)
    assert status == DEVICE_ERROR, output
    assert re.search(message, output), output


def test_an_unknown_schedule_is_refused(programs):
    status, output = run(programs, "plain", "block_sum", "sideways")
    assert status not in (RIGHT, WRONG, DEVICE_ERROR)
    assert "expected fixed, reversed or random:SEED, got sideways" in output
