"""`slime_loss` against the float64 oracle: every dtype, backend, plan and layout, every feature of the head."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import slime_fused as sf
from slime_fused import reference
from tests.support import (
    BACKENDS,
    DTYPES,
    PLANS,
    Batch,
    assert_as_exact_as_plain,
    force_plan,
    make_batch,
    pack,
    require_backend,
    run,
)

# name -> (batch, options). Each feature alone, then all together.
FEATURES = {
    "plain": ({}, {}),
    "bias": ({"has_bias": True}, {}),
    "scale": ({}, {"logit_scale": 0.25}),
    "softcap": ({"spread": 6.0}, {"logit_softcap": 5.0}),
    "shift": ({"prompt": 0}, {"shift": True}),
    "every_row_labelled": ({"lengths": (5,) * 6, "prompt": 0, "padding": 0}, {}),
    "pad_token_is_ignored": ({"ignore_index": 5}, {}),
    "token_mean": ({}, {"config": sf.SlimeLossConfig.authors_code(triple=True)}),
    "all": (
        {"has_bias": True, "ignore_index": -1},
        {
            "logit_scale": 1.5,
            "logit_softcap": 8.0,
            "shift": True,
            "config": sf.SlimeLossConfig(kappa=1.0, power=1.0, margin_hard=20.0, stabilizer_reduction="token"),
        },
    ),
}


def plan_options(options: dict) -> dict:
    return {k: v for k, v in options.items() if k != "config"}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


@pytest.fixture(params=DTYPES, ids=lambda d: str(d)[6:])
def dtype(request) -> torch.dtype:
    return request.param


# Packed rows differ from padded ones only above the chunks, where one plan shows all.
@pytest.mark.parametrize(("kind", "layout"), [*[(kind, "padded") for kind in PLANS], ("stream_several", "packed")])
@pytest.mark.parametrize("feature", FEATURES)
def test_loss_and_gradients(feature, kind, layout, backend, dtype):
    batch_options, options = FEATURES[feature]
    batch = make_batch(dtype=dtype, **batch_options)
    if layout == "packed":
        batch = pack(batch)
    workspace, _ = force_plan(kind, batch.leaves(), **plan_options(options))
    assert_as_exact_as_plain(
        sf.slime_loss, reference.slime_loss, batch, options=options, backend=backend, workspace=workspace
    )


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", ["stream", "stream_several"])
def test_evaluation(feature, kind, backend, dtype):
    batch_options, options = FEATURES[feature]
    batch = make_batch(dtype=dtype, **batch_options)
    workspace, plan = force_plan(kind, batch, **plan_options(options))
    assert plan.kind == "eval"
    assert_as_exact_as_plain(
        sf.slime_loss, reference.slime_loss, batch, options=options, backend=backend, workspace=workspace, wanted=()
    )


WANTED = [
    names
    for size in product([False, True], repeat=3)
    if (names := tuple(n for n, on in zip(("hidden", "weight", "bias"), size, strict=True) if on))
]


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
def test_frozen_inputs_get_no_gradient_and_change_no_other(wanted, kind, backend):
    batch = make_batch(has_bias=True)
    workspace, _ = force_plan(kind, batch.leaves())
    everything = run(sf.slime_loss, batch, backend=backend, workspace=workspace)
    leaves = batch.leaves(wanted)
    leaves.call(sf.slime_loss, backend=backend, workspace=workspace).loss.backward()
    for name, leaf in leaves.tensors().items():
        if name not in wanted:
            assert leaf.grad is None, f"{name} is frozen"
        else:
            # Other products and buffers, so perhaps another order of summation.
            torch.testing.assert_close(leaf.grad, everything.grads[name], rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("kind", PLANS)
def test_gradcheck(kind, backend):
    batch = make_batch((3, 2, 2, 3), hidden_size=4, vocab_size=7, has_bias=True).leaves()
    workspace, _ = force_plan(kind, batch, logit_softcap=6.0)

    def loss(hidden, weight, bias):
        out = sf.slime_loss(
            hidden, weight, batch.labels, bias=bias, logit_softcap=6.0, backend=backend, workspace=workspace
        )
        return out.loss

    assert torch.autograd.gradcheck(loss, (batch.hidden, batch.weight, batch.bias), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", PLANS)
def test_the_same_call_gives_the_same_bits(kind, backend, dtype):
    batch = make_batch((40, 30, 35, 50), vocab_size=501, hidden_size=32, has_bias=True, dtype=dtype)
    workspace, _ = force_plan(kind, batch.leaves())
    first, second = (run(sf.slime_loss, batch, backend=backend, workspace=workspace) for _ in range(2))
    for name in first.outputs:
        assert torch.equal(first.outputs[name], second.outputs[name]), name
    for name in first.grads:
        assert torch.equal(first.grads[name], second.grads[name]), f"d_{name}"


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("kind", PLANS)
def test_any_number_of_threads_gives_the_same_logps(kind):
    """Integer-valued inputs, whose products are exact in any order: what remains are this package's kernels."""
    batch = make_batch((40, 30, 35, 50), vocab_size=1003, hidden_size=16, dtype=torch.float32)
    exact = Batch((batch.hidden * 2).round(), batch.weight.round(), batch.labels)
    workspace, _ = force_plan(kind, exact.leaves())
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(sf.slime_loss, exact, backend="cpu", workspace=workspace))
    for other in results[1:]:
        for name, value in results[0].outputs.items():
            assert torch.equal(value, other.outputs[name]), name


def test_workspace_changes_only_rounding(backend):
    batch = make_batch(has_bias=True)
    results = [
        run(sf.slime_loss, batch, backend=backend, workspace=force_plan(kind, batch.leaves())[0]) for kind in PLANS
    ]
    for other in results[1:]:
        for name, value in (*results[0].outputs.items(), *results[0].grads.items()):
            torch.testing.assert_close({**other.outputs, **other.grads}[name], value, rtol=1e-12, atol=1e-14)


def test_default_plan_of_a_small_batch_is_one_chunk(backend):
    batch = make_batch(has_bias=True, dtype=torch.float32)
    automatic = run(sf.slime_loss, batch, backend=backend)
    forced = run(sf.slime_loss, batch, backend=backend, workspace=force_plan("stream", batch.leaves())[0])
    plan = batch.leaves().call(sf.explain_plan)
    assert (plan.kind, len(plan.chunks)) == ("stream", 1)
    for name, grad in automatic.grads.items():
        torch.testing.assert_close(grad, forced.grads[name])


def test_ignored_rows_get_exactly_zero_gradient(backend):
    batch = make_batch(dtype=torch.float32)
    for kind in PLANS:
        workspace, _ = force_plan(kind, batch.leaves())
        grad = run(sf.slime_loss, batch, backend=backend, workspace=workspace).grads["hidden"]
        assert (grad[batch.labels == batch.ignore_index] == 0).all()
        assert (grad[batch.labels != batch.ignore_index] != 0).any(-1).all()
