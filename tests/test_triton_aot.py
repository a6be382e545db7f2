"""Every kernel with every shipped configuration, compiled for every target without a GPU.

A configuration that needs more shared memory or registers than a target has fails at its first launch, and one that
spills is slow without saying so: both show in the compiled binary. Read from it: registers and stack per thread
(`cuobjdump`, bundled with Triton), shared memory (Triton's metadata), and the tensor-core instructions by name.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests import sass
from tests.triton_support import INTERPRETING, import_kernels

pytest.importorskip("triton")
if INTERPRETING:
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
import_kernels()

import triton  # noqa: E402
from slime_fused.triton_kernels import configs, linear_stats, rows, segments  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.slow

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KIB = 1024
SHARED_MEMORY = {
    # The most that one program may take (CUDA programming guide, compute capabilities; CDNA ISA guides).
    80: 163 * KIB,
    86: 99 * KIB,
    89: 99 * KIB,
    90: 227 * KIB,
    100: 227 * KIB,
    120: 99 * KIB,
    "gfx942": 64 * KIB,
    "gfx90a": 64 * KIB,
}
TENSOR_CORES = {90: "wgmma.mma_async", 100: "tcgen05.mma", "gfx942": "v_mfma", "gfx90a": "v_mfma"}
REGISTERS = 65536
MAX_STACK = 16
"""Bytes per thread: the compiler keeps one or two values there in an epilogue; spilled loops take hundreds."""

POINTERS = {
    "labels": "*i64",
    "cu_seqlens": "*i32",
    **dict.fromkeys(
        (
            "row_max_in", "row_sum_in", "logp_in", "entropy_in", "entropy_scale", "row_scale",
            "row_max_out", "row_sum_out", "logp_out", "loss_out", "label_logit_out", "logit_sum_out",
            "centred_sum_out", "square_sum_out", "max_before_out", "partial_max", "partial_sum",
            "partial_logit_sum", "partial_centred", "partial_square", "partial_before",
            "row_max", "row_sum", "label_logit", "logit_sum", "centred_sum", "square_sum", "max_before",
            "logp", "chosen_logps", "rejected_logps", "anchor_out", "margin_out",
            "stabilizer_out", "d_logp", "d_out", "d_values", "factor",
        ),
        "*fp32",
    ),
}  # fmt: skip
INTEGERS = ("logits_stride", "out_stride", "hidden_stride", "weight_stride", "M", "V", "D", "T", "col_offset",
            "vocab_size", "pairs", "numel")  # fmt: skip
FEATURES = ("HAS_BIAS", "HAS_SCALE", "HAS_SOFTCAP", "HAS_EXTRAS", "HAS_LOSS", "HAS_LOGIT_SUM", "HAS_MOMENTS",
            "MERGE", "HAS_ROW_SCALE", "HAS_ENTROPY", "HAS_GRADIENT", "MEAN")  # fmt: skip


def make_target(arch):
    return GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)


@cache
def compile_kernel(
    kernel,
    arch,
    dtype,
    constants,
    num_warps,
    num_stages,
    checked=False,
    tiles=None,
    is_aligned=True,
    out_dtype=None,
):
    """`constants`: ((name, value), ...); others are on. `tiles`: block shapes of the two descriptors.

    `is_aligned`: the pitch of rows is a multiple of 16 elements, which a launch tells the compiler too.
    `out_dtype`: of the residual, where it is not ``dtype``.
    """
    multiples = ("V", "D", *(name for name in INTEGERS if name.endswith("stride") and is_aligned))
    names = kernel.arg_names
    fixed = {name: True for name in FEATURES if name in names} | dict(constants)
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in fixed:
            signature[name] = "constexpr"
            continue
        if tiles and name in tiles:
            signature[name] = f"tensordesc<{dtype}[{tiles[name][0]},{tiles[name][1]}]>"
            continue
        if name in INTEGERS:
            signature[name] = "i32"
        elif name in POINTERS:
            signature[name] = POINTERS[name]
        elif name == "out" and out_dtype is not None:
            signature[name] = f"*{out_dtype}"
        elif name in ("logits", "out", "bias", "hidden", "weight", "values", "tensor"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "fp32"
        if signature[name].startswith("*") or name in multiples:
            attributes[(i,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in fixed.items()}
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        **(configs.CHECKED_LAUNCH if checked else configs.LAUNCH),
    }
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=make_target(arch), options=options)


def register_use(compiled, arch):
    """(registers per thread, bytes of stack per thread); on AMD (0, spilled registers)."""
    if isinstance(arch, str):
        return 0, int(re.search(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])[1])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout).groups()
    return int(registers), int(stack)


def assert_fits(compiled, arch, num_warps, max_stack=MAX_STACK):
    registers, stack = register_use(compiled, arch)
    assert compiled.metadata.shared <= SHARED_MEMORY[arch]
    assert registers * 32 * num_warps <= REGISTERS
    assert stack <= (0 if isinstance(arch, str) else max_stack)


def row_configs(family, itemsize):
    """The distinct configurations of rows longer than a few KiB, whose threads take the same steps in less."""
    lengths = (int(most) // itemsize + 1 for most, _ in configs.ROW_CONFIGS[:-1])
    return list(dict.fromkeys(configs.row_config(family, length, itemsize) for length in lengths))


def row_kernels(family):
    stream, segment, scale = configs.STREAM_CONFIG, configs.SEGMENT_CONFIG, configs.SCALE_CONFIG
    # Statistics alone take no more than with the residual: the widest program shows it.
    shipped = row_configs(family, 4)
    return [
        *((rows.softmax_residual_kernel, row, True) for row in shipped),
        (rows.logits_stats_kernel, shipped[-1], False),
        (rows.residual_from_stats_kernel, stream, True),
        (segments.segment_sum_kernel, segment, False),
        (segments.segment_sum_backward_kernel, segment, False),
        (segments.slime_terms_kernel, segment, False),
        (segments.scale_kernel, scale, False),
    ]


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_row_and_segment_kernels_fit(arch):
    """With every feature on, which takes the most registers; float32 rows, which take the most per element."""
    for kernel, config, checked in row_kernels(configs.target_family(make_target(arch).backend, arch)):
        of_entropy = [name for name in ("HAS_MOMENTS", "HAS_ENTROPY") if name in kernel.arg_names]
        for off in ((), *(((name, False),) for name in of_entropy)):
            constants = (("BLOCK", config.block), *off)
            compiled = compile_kernel(kernel, arch, "fp32", constants, config.num_warps, 3, checked)
            assert_fits(compiled, arch, config.num_warps)


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_statistics_with_moments_fit(arch, dtype, itemsize):
    """Every shipped program: those of few warps hold the most lanes, each with six statistics."""
    for config in row_configs(configs.target_family(make_target(arch).backend, arch), itemsize):
        constants = (("BLOCK", config.block),)
        compiled = compile_kernel(rows.logits_stats_kernel, arch, dtype, constants, config.num_warps, 3)
        assert_fits(compiled, arch, config.num_warps)


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("is_aligned", [False, True])
@pytest.mark.parametrize("has_moments", [False, True])
def test_linear_stats_fits_and_uses_tensor_cores(arch, features, is_aligned, has_moments):
    """Aligned rows, which descriptors can address, and rows of any pitch."""
    family = configs.target_family(make_target(arch).backend, arch)
    config = configs.linear_config(family, 2, can_use_descriptors=is_aligned, has_moments=has_moments)
    compiled = compile_linear(
        config, arch, "bf16", features=features, is_aligned=is_aligned, has_moments=has_moments
    )
    assert_fits(compiled, arch, config.num_warps)
    assembly = compiled.asm["amdgcn" if isinstance(arch, str) else "ptx"]
    assert TENSOR_CORES.get(arch, "mma.sync") in assembly
    assert ("cp.async.bulk.tensor" in assembly) == config.uses_descriptors
    assert config.uses_descriptors == (is_aligned and family in ("sm90", "sm100"))


@pytest.mark.parametrize("family", ["sm90", "sm100"])
def test_moments_spill_in_the_tiles_of_the_plain_product(family):
    """Why they have tiles of their own; which belong to the table as long as this holds."""
    arch, config = int(family[2:]), configs.LINEAR_CONFIGS[family, 2]
    compiled = compile_linear(config, arch, "bf16", features=True, has_moments=True)
    assert register_use(compiled, arch)[1] > 10 * MAX_STACK
    assert configs.MOMENTS_CONFIGS[family, 2] != config


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("has_moments", [False, True])
def test_float32_linear_stats_and_merge_fit(arch, has_moments):
    family = configs.target_family(make_target(arch).backend, arch)
    config = configs.linear_config(family, 4, can_use_descriptors=True, has_moments=has_moments)
    compiled = compile_linear(config, arch, "fp32", features=True, has_moments=has_moments)
    assert_fits(compiled, arch, config.num_warps)
    merge = (
        ("BLOCK_M", configs.MERGE_ROWS), ("BLOCK_T", configs.MERGE_TILES), ("HAS_MOMENTS", has_moments)
    )  # fmt: skip
    assert_fits(compile_kernel(linear_stats.merge_partials_kernel, arch, "fp32", merge, 4, 3), arch, 4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_products_are_rounded_in_pairs(dtype):
    """One conversion for two elements of a thread's 128; none of them on the slow path of single ones."""
    config = configs.LINEAR_CONFIGS["sm90", 2]
    code = disassemble(compile_linear(config, 90, dtype, features=False)).code
    assert sum("F2FP" in line for line in code) == config.block_m * config.block_n // (32 * config.num_warps) // 2
    assert not any(re.search(r"\bF2F\b", line) for line in code)


class FrozenTiles(dict):
    """Hashable, so that compilations are remembered."""

    def __hash__(self):
        return hash(tuple(self.items()))


def compile_linear(config, arch, dtype, *, features, is_aligned=True, has_moments=False):
    """The fused head product; without features also without a tail in D."""
    constants = {
        "HAS_BIAS": features,
        "HAS_SOFTCAP": features,
        "HAS_LOGIT_SUM": features,
        "HAS_MOMENTS": has_moments,
        "HAS_PTX": not isinstance(arch, str),
        "ROUNDS_PRODUCT": True,
        "DESCRIPTORS": config.uses_descriptors,
        "EVEN_D": not features,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    shapes = {"hidden": (config.block_m, config.block_k), "weight": (config.block_n, config.block_k)}
    return compile_kernel(
        linear_stats.linear_stats_kernel,
        arch,
        dtype,
        tuple(constants.items()),
        config.num_warps,
        config.num_stages,
        tiles=FrozenTiles(shapes) if config.uses_descriptors else None,
        is_aligned=is_aligned,
    )


def test_candidates_fit():
    """What a sweep will time, as a plain bfloat16 head launches it, and the shipped row kernels among it."""
    assert set(row_configs("sm90", 2)) <= set(configs.ROW_CANDIDATES)
    for config in configs.ROW_CANDIDATES:
        assert_fits(compile_plain(rows.softmax_residual_kernel, config, checked=True), 90, config.num_warps)
    for config in configs.LINEAR_CANDIDATES:
        assert_fits(compile_linear(config, 90, "bf16", features=False), 90, config.num_warps)


def test_the_gate_sees_spills():
    """128 x 256 accumulators in one warpgroup take every register there is."""
    compiled = compile_linear(configs.LinearConfig(128, 256, 32, 8, 4, 2), 90, "bf16", features=False)
    assert register_use(compiled, 90)[1] > 10 * MAX_STACK
    with pytest.raises(AssertionError):
        assert_fits(compiled, 90, 4)


def test_the_gate_sees_too_much_shared_memory():
    """An H100's tile with two stages more than it can hold."""
    config = replace(configs.LINEAR_CONFIGS["sm90", 2], num_stages=5)
    compiled = compile_linear(config, 90, "bf16", features=False)
    assert register_use(compiled, 90)[1] <= MAX_STACK
    with pytest.raises(AssertionError):
        assert_fits(compiled, 90, config.num_warps)


@pytest.mark.parametrize("arch", [80, 90])
def test_labels_are_checked_on_the_device(arch):
    """Assertions survive in exactly the kernels that know the vocabulary's size."""
    for kernel, config, checked in row_kernels("sm90")[-7:-4]:
        compiled = compile_kernel(kernel, arch, "fp32", (("BLOCK", config.block),), config.num_warps, 3, checked)
        assert ("__assertfail" in compiled.asm["ptx"]) == checked


def compile_plain(kernel, config, *, checked=False, **features):
    """A row kernel as a plain bfloat16 head of an H100 launches it, with the named features alone."""
    off = {name: False for name in FEATURES if name in kernel.arg_names}
    constants = tuple({**off, **features, "BLOCK": config.block}.items())
    return compile_kernel(kernel, 90, "bf16", constants, config.num_warps, 3, checked)


def disassemble(compiled):
    """The machine code of a kernel for NVIDIA."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (kernel,) = sass.kernels(Path(file.name), TOOLS / "nvdisasm").values()
    return kernel


def exponential_loops(compiled):
    """The instructions of each innermost loop over exponentials, without those that a branch inside it skips."""
    kernel = disassemble(compiled)
    starts = [n for n, block in enumerate(kernel.blocks) if block.count("MUFU.EX2")]
    ways = [way for n in starts if (way := kernel.loop(n)) is not None]
    loops = {frozenset(way.blocks): way.blocks for way in ways}
    return [[line for n in blocks for line in kernel.blocks[n].code] for blocks in loops.values()]


@pytest.mark.parametrize("config", row_configs("sm90", 2), ids=lambda c: f"{c.block}x{c.num_warps}")
def test_row_loops_stay_short(config):
    """Per element 8.5 or less for the statistics and 8.6 for the residual (Triton 3.6, 3.9), and no barrier."""
    compiled = compile_plain(rows.softmax_residual_kernel, config, checked=True)
    statistics, residual = exponential_loops(compiled)
    elements = config.block / (32 * config.num_warps)
    assert not any("BAR" in line for line in statistics + residual)
    assert len(statistics) <= 9 * elements
    assert len(residual) <= 9 * elements
    assert sum("LDG.E" in line and ".128" in line for line in statistics) == elements / 8
    assert sum("STG.E" in line and ".128" in line for line in residual) == elements / 8


@pytest.mark.parametrize("config", row_configs("sm90", 2), ids=lambda c: f"{c.block}x{c.num_warps}")
def test_statistics_with_moments_stay_short(config):
    """14.5 or less per element (Triton 3.9): within the 20 that an H100 issues while 2 bytes come at 3 TB/s."""
    (loop,) = exponential_loops(compile_plain(rows.logits_stats_kernel, config, HAS_MOMENTS=True))
    assert not any("BAR" in line for line in loop)
    assert len(loop) <= 15 * config.block / (32 * config.num_warps)


@pytest.mark.parametrize("arch", [80, 90])
def test_rows_between_their_visits_fit_in_l2(arch):
    """Registers bound the programs of a multiprocessor, and a program holds half its row on average."""
    l2_bytes = {80: 40 * 1024 * KIB / 108, 90: 50 * 1024 * KIB / 132}[arch]
    for most, config in configs.ROW_CONFIGS[1:-1]:
        compiled = compile_plain(rows.softmax_residual_kernel, config, checked=True)
        registers = -(-register_use(compiled, 90)[0] // 8) * 8
        threads = 32 * config.num_warps
        programs = min(REGISTERS // (registers * threads), 2048 // threads)
        assert programs * most / 2 <= 0.85 * l2_bytes
    assert configs.ROW_CONFIGS[-1][1].num_warps == 32  # one program, as long as it needs more than 32 registers


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_residuals_of_float32_logits_are_packed(dtype, arch):
    """They fit the registers, and two numbers are rounded at a time."""
    config = configs.row_config(f"sm{arch}", 128256, 4)
    for kernel, block in (
        (rows.softmax_residual_kernel, config),
        (rows.residual_from_stats_kernel, configs.STREAM_CONFIG),
    ):
        constants = (("BLOCK", block.block),)
        compiled = compile_kernel(kernel, arch, "fp32", constants, block.num_warps, 3, True, out_dtype=dtype)
        assert_fits(compiled, arch, block.num_warps)
        packed = {"bf16": "bf16x2", "fp16": "f16x2"}[dtype]
        assert re.search(rf"cvt\.rn\.{packed}\.f32", compiled.asm["ptx"])


def test_loads_are_wide_where_rows_are_aligned():
    config = configs.row_config("sm90", 128256, 4)
    compiled = compile_kernel(
        rows.softmax_residual_kernel, 90, "fp32", (("BLOCK", config.block),), config.num_warps, 3, True
    )
    assert re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])
    assert re.search(r"st\.global\S*\.v4\.b32", compiled.asm["ptx"])
