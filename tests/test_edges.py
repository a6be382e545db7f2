"""The edges: poisoned memory, ignored rows full of NaN, extreme logits, non-finite inputs, empty tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import slime_fused as sf
from slime_fused import reference
from tests.support import (
    BACKENDS,
    DTYPES,
    PLANS,
    Batch,
    assert_as_exact_as_plain,
    assert_close,
    floor_of,
    force_plan,
    make_batch,
    pack,
    require_backend,
    run,
)

FUNCTIONS = ("slime_loss", "linear_cross_entropy", "linear_logprobs", "sequence_logprobs")
OPERATIONS = dict(zip(FUNCTIONS, ("slime", "cross_entropy", "token", "token"), strict=True))


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


@pytest.fixture(params=FUNCTIONS)
def name(request) -> str:
    return request.param


def workspaces(batch: Batch, name: str) -> list[int]:
    """Room for everything, for a few rows, for one row."""
    problem = batch.call(sf.explain_plan, loss=OPERATIONS[name], workspace="1GiB").problem
    return [rows * problem.row_bytes for rows in (max(problem.rows, 1), 8, 1)]


@pytest.fixture
def poisoned_memory():
    """torch.empty is filled with NaN, so that what nobody wrote shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.isnan(torch.empty(5)).all()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_no_read_of_memory_that_nobody_wrote(dtype, vocab_size, name, backend):
    for packed in (False, True):
        batch = make_batch((4, 3, 5, 2), vocab_size=vocab_size, dtype=dtype, has_bias=True)
        batch = pack(batch) if packed else batch
        for workspace in workspaces(batch, name):
            assert_as_exact_as_plain(
                getattr(sf, name),
                getattr(reference, name),
                batch,
                options={"shift": packed},
                backend=backend,
                workspace=workspace,
            )


@pytest.mark.usefixtures("poisoned_memory")
def test_no_read_of_unwritten_memory_in_cross_entropy(backend):
    logits = torch.randn(6, 33, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([1, -100, 3, 32, -100, 0])
    loss = sf.cross_entropy(logits, labels, label_smoothing=0.1, z_loss=0.1, backend=backend)
    (grad,) = torch.autograd.grad(loss, [logits])
    expected = reference.cross_entropy(logits, labels, label_smoothing=0.1, z_loss=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, [logits])[0])


@pytest.mark.parametrize("prompt", [0, 2])
def test_inputs_stay_as_they_are(prompt, name, backend):
    """With no ignored row the kernels could be handed the caller's own memory."""
    batch = make_batch((5, 5, 5, 5), prompt=prompt, padding=0, dtype=torch.float32, has_bias=True)
    before = {key: x.clone() for key, x in batch.tensors().items()}
    labels = batch.labels.clone()
    for workspace in workspaces(batch, name):
        shared = replace(batch, **{key: x.detach().requires_grad_() for key, x in batch.tensors().items()})
        out = shared.call(getattr(sf, name), backend=backend, workspace=workspace)
        (out.loss if name == "slime_loss" else out.sum()).backward()
    assert all(torch.equal(x, before[key]) for key, x in batch.tensors().items())
    assert torch.equal(batch.labels, labels)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("packed", [False, True])
def test_ignored_rows_may_hold_anything(packed, value, name, backend):
    clean = make_batch(dtype=torch.float32, has_bias=True)
    clean = pack(clean) if packed else clean
    dirty = replace(clean, hidden=clean.hidden.clone())
    dirty.hidden[clean.labels == -100] = value
    for workspace in workspaces(clean, name):
        results = [run(getattr(sf, name), b, backend=backend, workspace=workspace) for b in (clean, dirty)]
        for key, expected in results[0].outputs.items():
            assert torch.equal(results[1].outputs[key], expected), key
        for key, expected in results[0].grads.items():
            assert torch.equal(results[1].grads[key], expected), f"d_{key}"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["hidden", "weight", "bias"])
def test_a_non_finite_input_makes_the_loss_non_finite(where, value, name, backend):
    batch = make_batch((3, 2, 4, 3), dtype=torch.float32, has_bias=True)
    tensor = batch.tensors()[where].clone()
    tensor[(1, 3, 0) if where == "hidden" else -1] = value
    batch = replace(batch, **{where: tensor})
    for workspace in workspaces(batch, name):
        leaves = batch.leaves()
        out = leaves.call(getattr(sf, name), backend=backend, workspace=workspace)
        loss = out.loss if name == "slime_loss" else out.sum()
        assert not torch.isfinite(loss)
        loss.backward()
        assert not torch.isfinite(leaves.hidden.grad).all()


def huge_logits(dtype: torch.dtype, magnitude: float) -> Batch:
    """Integer-valued logits up to ``magnitude``, exact in every dtype; labels certain and impossible by turns."""
    lengths = (4, 3, 5, 2)
    batch = make_batch(lengths, vocab_size=9, hidden_size=8)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.zeros(batch.hidden.shape, dtype=torch.float64)
    hidden[..., :8] = torch.randint(-1, 2, hidden.shape, generator=generator)
    weight = torch.zeros(9, 8, dtype=torch.float64)
    weight[:8] = torch.eye(8) * magnitude
    labels = batch.labels.clone()
    flat, best = labels.view(-1), (hidden @ weight.T).argmax(-1).view(-1)
    flat[:] = torch.where((flat != -100) & (torch.arange(len(flat)) % 2 == 0), best, flat)
    return Batch(hidden.to(dtype), weight.to(dtype), labels)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("magnitude", [100.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_extreme_logits(dtype, magnitude, softcap, name, backend):
    """Log-probs of 0 and of -1e4: no overflow, no NaN, gradients as exact as PyTorch's.

    One allowance: a saturated soft cap leaves 1 - (z / c)^2, a difference of rounded numbers, in front of a product
    as large as the head's weights.
    """
    batch = huge_logits(dtype, magnitude)
    options = {} if softcap is None else {"logit_softcap": softcap}
    if name == "slime_loss" and (softcap or dtype == torch.float16):
        # The stabilizer's coefficient is 700 at a log-prob of -200: beyond float16, and beyond the allowance above.
        options["config"] = sf.SlimeLossConfig(lambda_l=0.0)
    for workspace in workspaces(batch, name):
        plan = batch.leaves().call(sf.explain_plan, loss=OPERATIONS[name], workspace=workspace)
        assert_as_exact_as_plain(
            getattr(sf, name),
            getattr(reference, name),
            batch,
            options=options,
            roundings=softcap if softcap and plan.kind == "resweep" else 1.0,
            smallest_grad=magnitude if softcap else 0.0,
            backend=backend,
            workspace=workspace,
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_vocabulary_masked_by_minus_infinity(dtype, name, backend):
    """Padded rows of the head, switched off by a bias of -inf: probability 0, gradient 0, no NaN."""
    batch = make_batch(vocab_size=40, dtype=dtype, has_bias=True)
    labels = torch.where(batch.labels >= 32, batch.labels - 32, batch.labels)
    batch.bias[32:] = -torch.inf
    masked = replace(batch, labels=labels)
    short = replace(masked, weight=batch.weight[:32], bias=batch.bias[:32])
    plain, truth = (run(getattr(reference, name), b) for b in (short, short.to(torch.float64)))
    for workspace in workspaces(masked, name):
        got = run(getattr(sf, name), masked, backend=backend, workspace=workspace)
        for key, value in got.outputs.items():
            assert_close(key, value, plain.outputs[key], truth.outputs[key], floor_of(dtype), smallest=1.0)
        for key, grad in got.grads.items():
            if key != "hidden":
                assert (grad[32:] == 0).all(), f"d_{key}"
                grad = grad[:32]
            assert_close(f"d_{key}", grad, plain.grads[key], truth.grads[key], floor_of(dtype))


def test_impossible_label(backend):
    """A label whose logit is -inf: the loss is infinite as in PyTorch, and nothing crashes."""
    batch = make_batch(dtype=torch.float32, has_bias=True)
    batch.bias[int(batch.labels[0, 2])] = -torch.inf
    for name in FUNCTIONS:
        got = run(getattr(sf, name), batch, backend=backend, wanted=())
        expected = run(getattr(reference, name), batch, wanted=())
        first, truth = next(iter(got.outputs.values())), next(iter(expected.outputs.values()))
        assert torch.equal(torch.isfinite(first), torch.isfinite(truth)), name
        assert torch.equal(first[~torch.isfinite(first)], truth[~torch.isfinite(truth)]), name


@pytest.mark.parametrize("kind", PLANS)
def test_one_token_responses(kind, backend):
    batch = make_batch((1, 1, 1, 1), has_bias=True, prompt=0, padding=0)
    if kind != "resweep":
        workspace = force_plan(kind, batch.leaves())[0]
    else:
        workspace = batch.call(sf.explain_plan).problem.row_bytes
        assert batch.leaves().call(sf.explain_plan, workspace=workspace).kind == "resweep"
    assert_as_exact_as_plain(
        sf.slime_loss, reference.slime_loss, batch, options={}, backend=backend, workspace=workspace
    )


def test_very_unequal_pairs(backend):
    batch = make_batch((1, 200, 3, 150, 1, 90), dtype=torch.float32)
    for kind in PLANS:
        workspace, _ = force_plan(kind, batch.leaves())
        assert_as_exact_as_plain(
            sf.slime_loss, reference.slime_loss, batch, options={}, backend=backend, workspace=workspace
        )


EMPTY = {
    "all_ignored": lambda b: replace(b, labels=torch.full_like(b.labels, -100)),
    "no_positions": lambda b: replace(b, hidden=b.hidden[:, :0], labels=b.labels[:, :0]),
    "no_sequences": lambda b: replace(b, hidden=b.hidden[:0], labels=b.labels[:0]),
    "no_rows_packed": lambda b: Batch(
        b.hidden[0, :0], b.weight, b.labels[0, :0], cu_seqlens=torch.tensor([0, 0, 0], dtype=torch.int32)
    ),
    "no_sequences_packed": lambda b: Batch(
        b.hidden[0, :0], b.weight, b.labels[0, :0], cu_seqlens=torch.tensor([0], dtype=torch.int32)
    ),
}


def expected_of_empty(name: str, batch: Batch) -> Tensor:
    shape = batch.labels.shape if name == "linear_logprobs" else (len(batch.sequence_labels),)
    return torch.zeros(shape, dtype=torch.float32)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("case", EMPTY)
def test_nothing_to_do(case, shift, name, backend):
    """Per-token and per-sequence results are zeros, with zero gradients; a mean over nothing is refused."""
    batch = EMPTY[case](make_batch((3, 2), dtype=torch.float32)).leaves()
    if name in ("slime_loss", "linear_cross_entropy"):
        with pytest.raises(ValueError, match="labels: expected at least one"):
            batch.call(getattr(sf, name), backend=backend, shift=shift)
        return
    out = batch.call(getattr(sf, name), backend=backend, shift=shift)
    assert torch.equal(out, expected_of_empty(name, batch))
    out.sum().backward()
    assert torch.equal(batch.hidden.grad, torch.zeros_like(batch.hidden))
    assert torch.equal(batch.weight.grad, torch.zeros_like(batch.weight))


@pytest.mark.parametrize("case", EMPTY)
def test_sequence_means_of_nothing(case, backend):
    batch = EMPTY[case](make_batch((3, 2), dtype=torch.float32))
    out = batch.call(sf.sequence_logprobs, reduction="mean", backend=backend)
    assert torch.equal(out, expected_of_empty("sequence_logprobs", batch))


@pytest.mark.parametrize("case", EMPTY)
def test_per_token_cross_entropy_of_nothing(case, backend):
    batch = EMPTY[case](make_batch((3, 2), dtype=torch.float32))
    out = batch.call(sf.linear_cross_entropy, reduction="none", backend=backend)
    assert torch.equal(out, torch.zeros(batch.labels.shape))


@pytest.mark.parametrize("workspace", ["auto", 40 * 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", EMPTY)
def test_the_sum_over_nothing_is_zero(case, dtype, workspace, backend):
    """As in PyTorch, with zero gradients, and the same from logits; the mean over nothing is refused by both."""
    batch = EMPTY[case](make_batch((3, 2), dtype=dtype, has_bias=True)).leaves()
    if batch.bias is None:
        batch = replace(batch, bias=torch.zeros(37, dtype=dtype, requires_grad=True))
    logits = (batch.hidden.detach() @ batch.weight.detach().T).requires_grad_()
    loss = batch.call(sf.linear_cross_entropy, reduction="sum", backend=backend, workspace=workspace)
    assert loss == 0
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, grad in zip(batch.tensors(), torch.autograd.grad(loss, batch.tensors().values()), strict=True):
        assert torch.equal(grad, torch.zeros_like(getattr(batch, name))), f"d_{name}"
    loss = sf.cross_entropy(logits, batch.labels, reduction="sum", backend=backend)
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, [logits])[0], torch.zeros_like(logits))
    for call in (
        lambda: sf.cross_entropy(logits, batch.labels, backend=backend),
        lambda: batch.call(sf.linear_cross_entropy, backend=backend),
    ):
        with pytest.raises(
            ValueError, match="labels: expected at least one label that is not ignore_index, got none"
        ):
            call()


@pytest.mark.parametrize("excess", [-50.0, -21.0, 0.0, 19.9, 20.1, 25.0, 39.9, 40.1, 300.0])
def test_the_stabilizer_keeps_float64_s_digits(excess, backend):
    """softplus(x) = max(x, 0) + log1p(exp(-|x|)), also where PyTorch's returns x; the oracle is held to it too."""
    config = sf.SlimeLossConfig(lambda_w=0, lambda_d=0, lambda_l=1, power=1, delta=1.25)
    logp = torch.tensor([-1.0, -excess - config.delta], dtype=torch.float64)
    x = -logp[1] - config.delta
    expected = x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
    bounds = torch.tensor([0, 1, 2], dtype=torch.int32)
    for terms, options in ((sf.slime_terms, {"backend": backend}), (reference.slime_terms, {})):
        leaf = logp.clone().requires_grad_()
        out = terms(leaf, bounds, config, **options)
        (grad,) = torch.autograd.grad(out.loss, [leaf])
        torch.testing.assert_close(out.stabilizer, expected, rtol=4e-16, atol=0)
        torch.testing.assert_close(grad[1], -torch.sigmoid(x), rtol=4e-16, atol=0)


def test_float16_gradients_of_a_short_response_in_a_long_batch_do_not_overflow(backend):
    """What keeps small float16 gradients from underflow must not lift the largest ones out of range."""
    batch = make_batch((1, 1), prompt=4000, dtype=torch.float16, spread=4.0)
    batch = replace(batch, hidden=batch.hidden * 60, weight=batch.weight / 60)
    assert_as_exact_as_plain(sf.slime_loss, reference.slime_loss, batch, options={}, backend=backend)
