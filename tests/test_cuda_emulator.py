"""The instrument itself: does the CUDA emulator catch the bugs it is there to catch, and pass correct kernels?

Each kernel of ``cuda_emulator/planted_*.cu`` runs in a process of its own, in three builds. What a build misses
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


@pytest.mark.parametrize(
    "case",
    ["block_sum", "syncwarp", "atomic_count", "votes_and_shuffles", "bf16", "cluster_sum", "transaction_sum"],
)
def test_correct_kernels_pass_everywhere(programs, case):
    for schedule in ("fixed", "reversed", "random:0", "random:1", "random:2"):
        assert run(programs, "plain", case, schedule) == (RIGHT, "")
    assert run(programs, "asan", case) == (RIGHT, "")
    assert run(programs, "tsan", case) == (RIGHT, "")


def planted_lines(report: str, count: int) -> list[str]:
    """The first ``count`` lines with planted bugs that a sanitizer's report names."""
    folder = Path(__file__).parent / "cuda_emulator"
    places = re.findall(r"(planted_\w*bugs\.cu):(\d+)", report)
    lines = {name: (folder / name).read_text().splitlines() for name, _ in places}
    return [lines[name][int(number) - 1].strip() for name, number in dict.fromkeys(places)][:count]


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
        ("cluster_read_before_barrier", WRONG, "for (int r = 0; r < size; ++r) total += sums[r];"),
        ("transaction_read_before_wait", WRONG, "for (int r = 0; r < size; ++r) total += sums[r];"),
    ],
)
def test_races(programs, case, plain, line):
    """ThreadSanitizer names the line whatever the schedule; a plain run shows only what the schedule brings out."""
    assert run(programs, "plain", case)[0] == plain
    for schedule in ("fixed", "reversed"):
        status, output = run(programs, "tsan", case, schedule)
        assert status == REPORT_STATUS
        assert "data race" in output
        assert line in planted_lines(output, 3)  # two accesses, one of them through a helper


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
        ("shared_without_opting_in", r"65536 bytes of dynamic shared memory, the kernel opted in to 49152"),
        (
            "cluster_write_before_begin",
            r"no barrier has told this thread that block 1 of the cluster has begun",
        ),
        (
            "cluster_no_last_barrier",
            r"thread \(31, .*: the block ends with no barrier after the last write",
        ),
        ("cluster_write_to_exited", r"block \(0, 0, 0\): .*: block 1 of the cluster has exited"),
        ("cluster_write_beyond_cluster", r"distributed shared memory: block 2 of a cluster of 2"),
        ("cluster_write_beyond_memory", r"the address is not in this block's dynamic shared memory"),
        ("cluster_half_a_warp", r"thread \(16, .*: exited while lane 0 waits for it in a warp collective"),
        (
            "cluster_arrive_twice",
            r"arrives at a barrier of the cluster twice without waiting \(planted_cl",
        ),
        ("cluster_wait_without_arriving", r"waits for a barrier of the cluster without having arrived"),
        ("transaction_no_wait", r"(the block ends and no thread has waited|block \d of the cluster has exited)"),
        ("transaction_expects_more", r"deadlock: thread .* waits at a transaction barrier at planted_cl"),
        ("transaction_expects_less", r"transaction barrier: block \d expects 12 bytes, and got 16"),
        ("transaction_not_begun", r"transaction barrier: (that of block \d has not begun|waited for before)"),
        ("transaction_begun_twice", r"transaction barrier: begun twice"),
        ("cluster_too_large", r"clusters of 9 blocks in a grid of 18: .* at most 8"),
        ("cluster_does_not_divide_grid", r"clusters of 2 blocks in a grid of 3"),
    ],
)
def test_broken_rules_end_the_launch_and_name_the_thread(programs, mode, case, message):
    status, output = run(programs, mode, case)
    assert status == DEVICE_ERROR, output
    assert re.search(message, output), output


def test_a_block_that_ends_too_early_is_named_in_any_order(programs):
    """Whether it has ended before the write, or ends while the write may still be on its way."""
    messages = {run(programs, "plain", "cluster_no_last_barrier", order) for order in ("fixed", "reversed")}
    assert [status for status, _ in messages] == [DEVICE_ERROR] * 2
    assert any("block 1 of the cluster has exited" in message for _, message in messages)


def test_an_unknown_schedule_is_refused(programs):
    status, output = run(programs, "plain", "block_sum", "sideways")
    assert status not in (RIGHT, WRONG, DEVICE_ERROR)
    assert "expected fixed, reversed or random:SEED, got sideways" in output
