"""The "fused" plan on the Triton kernels, through the public functions: few cases, as the interpreter is slow.

`test_fused.py` has the grid; here the real statistics meet the real residuals, seams and tails included.
"""

from __future__ import annotations

import pytest
import torch

import slime_fused as sf
from slime_fused import reference
from slime_fused.engine.plan import FUSED_LEAST_COLS
from tests.statistics_support import assert_as_exact
from tests.support import assert_as_exact_as_plain, assert_close, floor_of, make_batch, pack, run
from tests.triton_support import INTERPRETING, skip_unless_kernels_run

skip_unless_kernels_run()
if not INTERPRETING:
    pytest.skip("these batches are on the CPU; on a GPU see test_gpu.py", allow_module_level=True)

SIMPO = sf.losses.SimPO()
CASES = {
    # name -> (function, options, operation, dtype, wanted, batch options)
    "slime_float32": ("slime_loss", {"shift": True}, "slime", torch.float32, ("hidden", "weight"), {}),
    "slime_bfloat16": (
        "slime_loss",
        {"logit_softcap": 8.0, "logit_scale": 1.5},
        "slime",
        torch.bfloat16,
        ("hidden", "weight", "bias"),
        {"has_bias": True},
    ),
    "cross_entropy_float16": (
        "linear_cross_entropy",
        {"label_smoothing": 0.1, "z_loss": 0.01},
        "cross_entropy",
        torch.float16,
        ("hidden", "weight"),
        {},
    ),
    "logprobs_bfloat16": ("linear_logprobs", {}, "token", torch.bfloat16, ("weight",), {"ignore_index": 3}),
    "negative_scale": (
        "slime_loss",
        {"logit_scale": -0.7},
        "slime",
        torch.float16,
        ("hidden", "weight", "bias"),
        {"has_bias": True},
    ),
    "zero_scale": (
        "linear_cross_entropy",
        {"logit_scale": 0.0, "label_smoothing": 0.1, "z_loss": 0.01},
        "cross_entropy",
        torch.bfloat16,
        ("hidden", "weight"),
        {},
    ),
    "simpo": ("preference_loss", {"loss": SIMPO}, SIMPO, torch.bfloat16, ("hidden", "weight"), {}),
    "evaluation": ("slime_loss", {}, "slime", torch.bfloat16, (), {"has_bias": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_public_functions(case):
    function, options, operation, dtype, wanted, batch_options = CASES[case]
    batch = make_batch(
        (5, 7, 8, 6), vocab_size=2 * FUSED_LEAST_COLS + 133, hidden_size=24, dtype=dtype, **batch_options
    )
    batch = pack(batch) if case == "slime_float32" else batch
    leaves = batch.leaves(wanted)
    how = {k: v for k, v in options.items() if k in ("shift", "logit_scale", "logit_softcap")}
    how |= {"loss": operation, "backend": "triton"}
    problem = leaves.call(sf.explain_plan, **how).problem
    workspace = max(problem.rows * FUSED_LEAST_COLS * problem.itemsize, problem.row_bytes)
    if not wanted:
        workspace //= 2
    plan = leaves.call(sf.explain_plan, workspace=workspace, **how)
    assert plan.kind == "fused", plan
    assert plan.blocks == (3 if wanted else 0)
    assert_as_exact_as_plain(
        getattr(sf, function),
        getattr(reference, function),
        batch,
        options=options,
        wanted=wanted,
        backend="triton",
        workspace=workspace,
        roundings=2,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_logits(dtype):
    """Log-probs err by float32 arithmetic alone; logits of about 100, rounded to 16 bits, would err by 0.01."""
    batch = make_batch(
        (5, 7, 8, 6), vocab_size=2 * FUSED_LEAST_COLS + 133, hidden_size=24, dtype=dtype, spread=30.0
    )
    leaves = batch.leaves(("hidden", "weight"))
    how = {"backend": "triton", "logits_dtype": torch.float32}
    problem = leaves.call(sf.explain_plan, loss="token", **how).problem
    workspace = 4 * problem.rows * FUSED_LEAST_COLS
    plan = leaves.call(sf.explain_plan, loss="token", workspace=workspace, **how)
    assert plan.kind == "fused", plan
    assert 1 < plan.logits_rows < problem.rows
    truth, plain, got = (
        run(function, batch.to(torch.float64) if i == 0 else batch, wanted=("hidden", "weight"), **options)
        for i, (function, options) in enumerate(
            (
                (reference.linear_logprobs, {}),
                (reference.linear_logprobs, {"logits_dtype": torch.float32}),
                (sf.linear_logprobs, {"workspace": workspace, **how}),
            )
        )
    )
    exact = truth.outputs["value"]
    assert (got.outputs["value"].double() - exact).abs().max() <= 1e-6 * exact.abs().max()
    for name, grad in got.grads.items():
        assert_close(name, grad, plain.grads[name], truth.grads[name], floor_of(dtype))


STATISTICS_CASES = {
    # name -> (function, options, dtype, plan)
    "float32-kept": ("linear_logprobs", {"logit_scale": 1.5, "temperature": 0.7}, torch.float32, "stream"),
    "bfloat16-again": ("linear_logprobs", {"logit_softcap": 6.0}, torch.bfloat16, "resweep"),
    "float16-fused": ("linear_logprobs", {"logit_softcap": 6.0, "temperature": 2.0}, torch.float16, "fused"),
    "smooth-fused": (
        "linear_cross_entropy",
        {"reduction": "none", "label_smoothing": 0.1, "z_loss": 0.01},
        torch.float32,
        "fused",
    ),
}


@pytest.mark.parametrize("case", STATISTICS_CASES)
def test_token_statistics(case):
    """What `return_stats` tells, and gradients of losses and entropies together."""
    function, options, dtype, kind = STATISTICS_CASES[case]
    batch = make_batch(
        (5, 7, 8, 6), vocab_size=2 * FUSED_LEAST_COLS + 133, hidden_size=24, dtype=dtype, has_bias=True
    )
    # With a frozen head a small workspace takes rows, not blocks of the vocabulary.
    wanted = ("hidden",) if kind == "resweep" else ("hidden", "weight", "bias")
    leaves, how = batch.leaves(wanted), {"loss": "token", "backend": "triton", "return_stats": ("entropy",)}
    problem = leaves.call(sf.explain_plan, **how).problem
    small = max(problem.rows * FUSED_LEAST_COLS * problem.itemsize, problem.row_bytes)
    workspace = problem.rows * problem.row_bytes if kind == "stream" else small
    plan = leaves.call(sf.explain_plan, workspace=workspace, **how)
    assert plan.kind == kind, plan
    assert_as_exact(
        batch,
        function=function,
        options=options,
        wanted=wanted,
        backend="triton",
        workspace=workspace,
        roundings=2,
    )
