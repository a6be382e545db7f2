"""The CUDA kernels against the shared grid, on the CPU.

The sources of ``csrc/cuda`` are compiled by the host's compiler and run by the emulator (tests/cuda_emulator),
behind the package's own ``CudaBackend``. Numbers are checked here; the last tests run this file and one case of
``test_cuda_emulated_stats.py`` again with the kernels instrumented, where a read out of bounds, a misaligned vector
or a race ends the run. What a GPU alone can tell: approximate instructions, inline PTX, races between rows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import slime_fused.backends.cuda as cuda_backend
from slime_fused.backends.base import LogitsBlock, RowStats, SlimePairs, VocabStats
from tests import backend_grid as grid
from tests import moment_grid, token_grid
from tests.cuda_emulator.backend import MODULE_VARIABLE, emulated_backend, emulated_module
from tests.cuda_emulator.build import EmulatorUnavailable, Mode, build, sanitizer_environment
from tests.narrow_residual import CASES as NARROW_CASES
from tests.narrow_residual import HALVES, check_narrow_residual

pytestmark = pytest.mark.slow  # the first run compiles the kernels, about a minute for each of three builds

FILES = (__file__, str(Path(__file__).with_name("test_cuda_emulated_stats.py")))
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

WIDE = tuple(
    # Several blocks per row of residual_from_stats, a remainder in every loop, rows at four alignments.
    grid.RowCase(f"wide-{str(dtype)[6:]}", rows=4, vocab=20_003, pitch=20_005, dtype=dtype, has_bias=True)
    for dtype in DTYPES
)
ROW_CASES = [*grid.row_cases(DTYPES), *WIDE]


@pytest.fixture(scope="session")
def native() -> Any:
    return emulated_module()


@pytest.fixture
def backend(native):
    native.set_schedule("fixed")
    return emulated_backend(native)


@pytest.mark.parametrize("case", ROW_CASES, ids=lambda c: c.name)
def test_softmax_residual(backend, case):
    grid.check_softmax_residual(backend, case, CPU)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", ROW_CASES, ids=lambda c: c.name)
def test_stats_then_residual(backend, case, shards):
    grid.check_stats_then_residual(backend, case, CPU, shards)


@pytest.mark.parametrize("plan", [{"threads": 64, "shared_vectors": 4}, {"cluster": 2, "threads": 32}])
@pytest.mark.parametrize("scale", [-1.5, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_of_no_or_negative_sign(native, dtype, scale, plan):
    """The largest raw product is then not the largest logit; with a tail, a partial tile and an odd pitch."""
    native.set_schedule("fixed")
    backend = emulated_backend(native, plan=native.cuda.RowPlan(**plan))
    case = grid.RowCase("scale", rows=3, vocab=3001, pitch=3003, dtype=dtype, head=grid.HeadTransform(scale=scale))
    grid.check_softmax_residual(backend, case, CPU)
    grid.check_stats_then_residual(backend, case, CPU, 3)


@pytest.mark.parametrize("plan", ["registers", "some_held_some_read_again", "cluster_of_2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_and_elsewhere_give_the_same_bits(native, dtype, plan):
    """Also where the output is aligned otherwise than the logits, and where a row is ignored."""
    native.set_schedule("fixed")
    backend = emulated_backend(native, plan=make_plan(native, plan))
    data = grid.RowData(grid.RowCase("bits", rows=4, vocab=3001, pitch=3008, dtype=dtype, ignored=(2,)), CPU)
    results = []
    shifted = torch.full((4, 3011), torch.nan, dtype=dtype)[:, 1:3002]
    aligned, in_place = torch.full((2, 4, 3008), torch.nan, dtype=dtype)[:, :, :3001]
    in_place.copy_(data.raw)
    for logits, out in ((data.raw, aligned), (data.raw, shifted), (in_place, in_place)):
        stats = data.token_stats()
        backend.softmax_residual(LogitsBlock(logits, data.labels, None, grid.PLAIN_HEAD), out, grid.NLL, stats)
        results.append((out.clone(), torch.stack([*vars(stats).values()])))
    for out, stats in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(stats, results[0][1])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", NARROW_CASES, ids=lambda c: c.name)
def test_residual_of_fewer_bits(backend, case, dtype):
    check_narrow_residual(backend, case, dtype, CPU)


@pytest.mark.parametrize("plan", ["some_held_some_read_again", "cluster_of_2", "several_launches"])
def test_residual_of_fewer_bits_by_plan(native, plan):
    native.set_schedule("fixed")
    backend = emulated_backend(native, plan=make_plan(native, plan))
    for case in (PLAN_CASES[0], PLAN_CASES[4]):
        for dtype in HALVES:
            check_narrow_residual(backend, case, dtype, CPU)


def test_a_residual_of_fewer_bits_does_not_wait_in_registers(native):
    backend = emulated_backend(native, plan=make_plan(native, "registers"))
    with pytest.raises(ValueError, match="stage registers takes a residual of the dtype of the logits"):
        check_narrow_residual(backend, PLAN_CASES[0], torch.bfloat16, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(backend, dtype):
    grid.check_extreme_logits(backend, dtype, CPU)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scales(backend, dtype, softcap):
    grid.check_extreme_scales(backend, dtype, CPU, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_target_does_not_cancel(backend, dtype):
    grid.check_target_does_not_cancel(backend, dtype, CPU)


@pytest.mark.parametrize("case", moment_grid.moment_cases(DTYPES), ids=lambda c: c.name)
def test_moments(backend, case):
    moment_grid.check_moments(backend, case, CPU, 3)


@pytest.mark.parametrize("case", moment_grid.moment_cases(DTYPES), ids=lambda c: c.name)
def test_entropy_residual(backend, case):
    moment_grid.check_entropy_residual(backend, case, CPU, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_moments(backend, dtype):
    moment_grid.check_extreme_moments(backend, dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_label_rank(backend, dtype):
    moment_grid.check_label_rank(backend, dtype, CPU)


@pytest.mark.parametrize("lengths", token_grid.SEGMENTS, ids=lambda s: f"{len(s)}x{max(s)}")
def test_segment_sum(backend, lengths):
    token_grid.check_segment_sum(backend, lengths, torch.float32, CPU)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_slime_terms(backend, reduction):
    token_grid.check_slime_terms(backend, token_grid.WEIGHTS[reduction], torch.float32, CPU)


def test_margin_at_the_hinge(backend):
    token_grid.check_margin_at_the_hinge(backend, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(backend, dtype):
    token_grid.check_scale(backend, dtype, CPU)


# Each way a row can wait between its two visits, with rows that fill it, overflow it and leave most of it empty.
PLANS = {
    "one_warp_reads_all_again": {"threads": 32, "shared_vectors": 0},
    "some_held_some_read_again": {"threads": 64, "shared_vectors": 3},
    "more_room_than_row": {"threads": 512, "shared_vectors": 27},
    "registers": {"stage": "registers", "threads": 1024},
    "cluster_of_2": {"cluster": 2, "threads": 96, "shared_vectors": 2},
    "cluster_of_8_wider_than_row": {"cluster": 8, "threads": 128, "shared_vectors": 4},
    "largest_cluster": {"cluster": 16, "threads": 32, "shared_vectors": 1},
    "cluster_in_registers": {"stage": "registers", "cluster": 4, "threads": 64},
    "clusters_in_several_launches": {"cluster": 4, "threads": 32, "shared_vectors": 2, "max_blocks": 9},
    "several_launches": {"threads": 64, "shared_vectors": 4, "max_blocks": 2, "streaming": True, "pad_bytes": 4096},
}
PLAN_CASES = [
    replace(case, dtype=dtype, name=f"{case.name}-{str(dtype)[6:]}")
    for case in (
        grid.RowCase("unaligned", rows=5, vocab=3001, pitch=3003),
        grid.RowCase("short", rows=5, vocab=5),
        grid.RowCase("ignored", rows=5, vocab=512, ignored=(0, 4), has_bias=True),
    )
    for dtype in (torch.float32, torch.bfloat16)
]


def make_plan(native: Any, name: str) -> Any:
    fields = dict(PLANS[name])
    stage = native.cuda.RowStage.__members__[fields.pop("stage", "shared")]
    return native.cuda.RowPlan(stage=stage, **fields)


@pytest.mark.parametrize("case", PLAN_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_of_the_row_kernel(native, plan, case):
    native.set_schedule("fixed")
    backend = emulated_backend(native, plan=make_plan(native, plan))
    grid.check_softmax_residual(backend, case, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_candidate_to_measure_is_right(native, dtype):
    plans = native.cuda.row_plan_candidates(20_003, dtype.itemsize, 90)
    assert len({repr(plan) for plan in plans}) == len(plans) > 20
    assert {plan.cluster for plan in plans} >= {1, 2, 4}
    native.set_schedule("fixed")
    case = grid.RowCase("candidates", rows=1, vocab=20_003, pitch=20_008, dtype=dtype)
    for plan in plans:
        if plan.streaming:
            continue  # a hint to the cache, of which the emulator knows nothing
        grid.check_softmax_residual(emulated_backend(native, plan=plan), case, CPU)


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("elem_bytes", [2, 4])
def test_candidates_of_published_vocabularies(native, capability, elem_bytes):
    """The chosen plan comes first, no plan asks a device for what it lacks, and a row has few enough threads."""
    for cols in (1, 37, 32_000, 128_256, 151_936, 262_144):
        plans = native.cuda.row_plan_candidates(cols, elem_bytes, capability)
        chosen = native.cuda.choose_row_plan(cols, elem_bytes, capability)
        assert repr(plans[0]) == repr(chosen)
        assert all(plan.cluster == 1 or 90 <= capability < 120 for plan in plans)
        assert chosen.cluster * chosen.threads <= max(128, cols * elem_bytes / 16 / 7)


def test_chosen_plans_on_hopper(native):
    """Three blocks share a multiprocessor's 228 KB, 1 KB of each the system's; a thread has about 16 vectors."""
    for cols, cluster, threads in ((32_000, 1, 256), (128_256, 4, 256), (151_936, 4, 320), (262_144, 8, 256)):
        plan = native.cuda.choose_row_plan(cols, 2, 90)
        assert (plan.cluster, plan.threads) == (cluster, threads)
        assert plan.cluster * plan.threads * plan.shared_vectors * 8 >= cols
        assert 3 * (cols * 2 / cluster + 1024) < 228 * 1024


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threads": 0}, "threads must be a positive multiple of 32, got 0"),
        ({"threads": 48}, "threads must be a positive multiple of 32, got 48"),
        ({"threads": 1024}, "threads must be at most 512"),
        ({"cluster": 0}, "cluster must be between 1 and 16, got 0"),
        ({"cluster": 17}, "cluster must be between 1 and 16, got 17"),
        ({"shared_vectors": -1}, "shared_vectors must be small enough for 227 KB per block, got -1"),
        ({"shared_vectors": 2**28}, "shared_vectors must be small enough"),  # 2^41 bytes
        ({"shared_vectors": 28}, "shared_vectors must be small enough"),  # 224 KB of 227, plus the exchange
        ({"pad_bytes": 2**31 - 1}, "pad_bytes must be small enough"),
        ({"max_blocks": -1}, "max_blocks must be non-negative, got -1"),
    ],
)
def test_plans_that_no_device_runs_are_refused(native, fields, message):
    if fields == {"shared_vectors": 28}:
        fields = {"shared_vectors": 28, "cluster": 16}
    with pytest.raises(ValueError, match=message):
        native.cuda.RowPlan(**fields)


def test_a_plan_whose_registers_cannot_hold_the_row_is_refused(native):
    plan = native.cuda.RowPlan(stage=native.cuda.RowStage.registers, threads=32)
    case = grid.RowCase("long", rows=2, vocab=5000, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="stage registers must hold the 632 vectors of a block, got cluster=1"):
        grid.check_softmax_residual(emulated_backend(native, plan=plan), case, CPU)


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_plans_fit_each_device(native, dtype, capability):
    """The emulator refuses a block beyond 227 KB; smaller devices differ in how much of a long row they hold.

    On 9.0 and 10.0 these rows take clusters of 4 and 2 blocks.
    """
    native.set_schedule("fixed")
    case = grid.RowCase("long", rows=3, vocab=65_003, dtype=dtype, has_bias=True, ignored=(1,))
    grid.check_softmax_residual(emulated_backend(native, capability), case, CPU)


def test_a_build_for_older_devices_takes_no_clusters(native, monkeypatch):
    """PTX for 8.0 runs on 9.0 and sees clusters of one block: a plan with more would leave its rows."""
    assert native.cuda.row_kernel_capability(0) == 90
    native.set_compiled_for(80)
    try:
        assert native.cuda.row_kernel_capability(0) == 80
        backend = emulated_backend(native, plan=native.cuda.RowPlan(cluster=2, threads=64))
        with pytest.raises(ValueError, match="cluster must be 1 for kernels compiled for capability 80, got 2"):
            grid.check_softmax_residual(backend, grid.RowCase("short", rows=2, vocab=40), CPU)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
        monkeypatch.setattr("slime_fused.backends.cuda._native", lambda: native.cuda)
        monkeypatch.setattr("slime_fused.backends.cuda._on", lambda _device: nullcontext())
        assert cuda_backend._row_plan.__wrapped__(128_256, 2, 0).cluster == 1
    finally:
        native.set_compiled_for(90)
    assert cuda_backend._row_plan.__wrapped__(128_256, 2, 0).cluster == 4


def row_results(backend: Any, case: grid.RowCase) -> list[torch.Tensor]:
    """Everything the three row kernels and the token kernels write for one problem."""
    data = grid.RowData(case, CPU)
    block, stats, (*of_columns, d_logp) = data.block(), data.token_stats(), data.empty_rows(5)
    out, out_from_stats = torch.full_like(data.raw, torch.nan), torch.full_like(data.raw, torch.nan)
    backend.softmax_residual(block, out, case.token_loss, stats)
    backend.logits_stats(block, VocabStats(*of_columns))
    backend.residual_from_stats(block, out_from_stats, case.token_loss, stats)
    cu_seqlens = torch.tensor([0, 1, 3, 3, case.rows], dtype=torch.int32)
    sums = torch.full((4,), torch.nan)
    backend.segment_sum(stats.logp, cu_seqlens, sums, mean=True)
    terms = torch.full((5, 2), torch.nan)
    weights = token_grid.WEIGHTS["sequence"]
    backend.slime_terms(stats.logp, cu_seqlens, weights, SlimePairs(*terms.unbind()), d_logp)
    return [out, out_from_stats, *vars(stats).values(), *of_columns, d_logp, sums, terms]


@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_schedule_changes_a_bit(native, dtype, cluster):
    native.set_schedule("fixed")
    backend = emulated_backend(native, plan=native.cuda.RowPlan(cluster=cluster, threads=64, shared_vectors=4))
    case = grid.RowCase("schedules", rows=9, vocab=5003, dtype=dtype, token_loss=grid.TokenLoss(0.1, 0.01))
    expected = row_results(backend, case)
    schedules = [("reversed", 0), *(("random", seed) for seed in range(8))]
    for order, seed in schedules:
        native.set_schedule(order, seed)
        for got, want in zip(row_results(backend, case), expected, strict=True):
            assert torch.equal(got, want), f"{order} {seed}"


@pytest.mark.parametrize("kernel", ["softmax_residual", "residual_from_stats"])
def test_label_beyond_the_vocabulary_traps_and_is_named(backend, kernel, capfd):
    logits = torch.zeros(3, 8)
    labels = torch.tensor([1, 8, 2])
    block, stats = LogitsBlock(logits, labels, None, grid.PLAIN_HEAD), RowStats(*torch.zeros(3, 3).unbind())
    with pytest.raises(RuntimeError, match=r"__trap\(\)"):
        getattr(backend, kernel)(block, torch.empty_like(logits), grid.NLL, stats)
    assert "labels[1] = 8 is not in [0, 8)" in capfd.readouterr().out


def run_these_files(mode: Mode) -> subprocess.CompletedProcess[str]:
    """Run every other test of this file, and one case of its neighbour, in a process of its own, instrumented.

    The moments' cases here walk the same branches; what they lack is a 16-bit residual with entropy.
    """
    try:
        module = build("_C_emulated", mode)
    except EmulatorUnavailable as error:
        pytest.skip(str(error))
    environment = {
        **os.environ,
        **sanitizer_environment(mode),
        MODULE_VARIABLE: str(module),
        "OMP_NUM_THREADS": "1",  # PyTorch's own threads are not instrumented: one makes for no false report
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *FILES]
    return subprocess.run(
        [*command, "-k", "not sanitizer and (not emulated_stats or unaligned-float32)"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
    )


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_no_sanitizer_finds_anything(mode):
    """AddressSanitizer and UBSan, then ThreadSanitizer with one fiber per CUDA thread."""
    done = run_these_files(mode)
    assert done.returncode == 0, (
        f"{mode}: exit status {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    )
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
