"""`linear_logprobs`, `sequence_logprobs`, `linear_cross_entropy`: every dtype, backend, plan and feature."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import slime_fused as sf
from slime_fused import reference
from tests.support import (
    BACKENDS,
    DTYPES,
    Batch,
    assert_as_exact_as_plain,
    make_batch,
    pack,
    require_backend,
    run,
)

HEADS = {
    "plain": ({}, {}),
    "every_row_labelled": ({"lengths": (5, 5, 5), "prompt": 0, "padding": 0, "has_bias": True}, {}),
    "all": (
        {"has_bias": True, "ignore_index": 3},
        {"logit_scale": 1.5, "logit_softcap": 8.0, "shift": True},
    ),
}
LOSSES = {
    "logprobs": ("linear_logprobs", {}),
    "sum": ("sequence_logprobs", {"reduction": "sum"}),
    "mean": ("sequence_logprobs", {"reduction": "mean"}),
    "ce_mean": ("linear_cross_entropy", {"reduction": "mean"}),
    "ce_sum": ("linear_cross_entropy", {"reduction": "sum"}),
    "ce_none": ("linear_cross_entropy", {"reduction": "none"}),
    "ce_smooth": ("linear_cross_entropy", {"label_smoothing": 0.15}),
    "ce_z": ("linear_cross_entropy", {"z_loss": 0.01, "reduction": "sum"}),
    "ce_smooth_z_none": ("linear_cross_entropy", {"label_smoothing": 0.3, "z_loss": 0.02, "reduction": "none"}),
}
ROWS = {"one_chunk": 1000, "several_chunks": 7, "row_by_row": 1}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


def workspace_of(rows: int, batch: Batch, loss: str) -> int:
    return rows * batch.call(sf.explain_plan, loss=loss).problem.row_bytes


def upstream_like(shape: torch.Size) -> torch.Tensor:
    """One coefficient per output, of both signs and with a zero."""
    values = torch.linspace(-2, 3, max(shape.numel(), 1), dtype=torch.float64)[: shape.numel()].reshape(shape)
    return values.where(values.abs() > 0.05, 0)


def output_shape(name: str, options: dict, batch: Batch) -> torch.Size:
    if name == "sequence_logprobs":
        return torch.Size([len(batch.sequence_labels)])
    if options.get("reduction") == "none" or name == "linear_logprobs":
        return batch.labels.shape
    return torch.Size([])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("rows", "layout"),
    [*[(rows, "padded") for rows in ROWS], ("several_chunks", "packed"), ("one_chunk", "packed")],
)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients(loss, head, rows, layout, dtype, backend):
    name, loss_options = LOSSES[loss]
    batch_options, head_options = HEADS[head]
    batch = make_batch(**{"lengths": (4, 3, 5), "dtype": dtype, **batch_options})
    if layout == "packed":
        batch = pack(batch)
    assert_as_exact_as_plain(
        getattr(sf, name),
        getattr(reference, name),
        batch,
        options={**loss_options, **head_options},
        upstream=upstream_like(output_shape(name, loss_options, batch)),
        backend=backend,
        workspace=workspace_of(ROWS[rows], batch, "token"),
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows", ROWS)
def test_evaluation_agrees_with_training(rows, loss, backend):
    name, options = LOSSES[loss]
    batch = make_batch(has_bias=True)
    workspace = workspace_of(ROWS[rows], batch, "token")
    function = getattr(sf, name)
    trained = batch.leaves().call(function, backend=backend, workspace=workspace, **options)
    with torch.no_grad():
        evaluated = batch.leaves().call(function, backend=backend, workspace=workspace, **options)
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, trained.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss, rows, backend):
    name, options = LOSSES[loss]
    batch = make_batch((2, 3), hidden_size=3, vocab_size=5, has_bias=True, prompt=1).leaves()
    workspace = workspace_of(ROWS[rows], batch, "token")

    def function(hidden, weight, bias):
        return getattr(sf, name)(
            hidden,
            weight,
            batch.labels,
            bias=bias,
            logit_softcap=5.0,
            backend=backend,
            workspace=workspace,
            **options,
        )

    assert torch.autograd.gradcheck(function, (batch.hidden, batch.weight, batch.bias), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")], ids="+".join)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["linear_logprobs", "linear_cross_entropy"])
def test_frozen_inputs(name, rows, wanted, backend):
    batch = make_batch(has_bias=True)
    options = {"backend": backend, "workspace": workspace_of(ROWS[rows], batch, "token")}
    upstream = upstream_like(output_shape(name, {}, batch))
    everything = run(getattr(sf, name), batch, upstream=upstream, **options)
    some = run(getattr(sf, name), batch, upstream=upstream, wanted=wanted, **options)
    for leaf in wanted:
        torch.testing.assert_close(some.grads[leaf], everything.grads[leaf], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dims", [(9,), (6, 9), (2, 3, 9), (1, 1, 6, 9)])
def test_any_leading_shape(dims, backend):
    batch = make_batch((4, 3, 5, 2, 6, 3))
    count = torch.Size(dims).numel()
    hidden = batch.hidden.flatten(0, 1)[:count].reshape(*dims, -1)
    labels = batch.labels.reshape(-1)[:count].reshape(dims)
    got = sf.linear_logprobs(hidden, batch.weight, labels, backend=backend)
    expected = reference.linear_logprobs(hidden, batch.weight, labels)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    assert (got[labels == -100] == 0).all()
    sums = sf.sequence_logprobs(hidden, batch.weight, labels, backend=backend)
    torch.testing.assert_close(sums, expected.reshape(-1, dims[-1]).sum(1), rtol=1e-12, atol=1e-13)


def test_sequence_sums_are_the_sums_of_logprobs(backend):
    batch = pack(make_batch(dtype=torch.float32))
    logps = batch.call(sf.linear_logprobs, backend=backend).double()
    sums = batch.call(sf.sequence_logprobs, backend=backend)
    expected = torch.stack([p.sum() for p in logps.split((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist())])
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("empty", ["no_labels", "no_rows"])
def test_empty_sequences_are_zero(empty, reduction, backend):
    batch = pack(make_batch((4, 3, 5)))
    if empty == "no_labels":
        labels = batch.labels.clone()
        labels[batch.cu_seqlens[1] : batch.cu_seqlens[2]] = -100
        batch = replace(batch, labels=labels)
        row = 1
    else:
        bounds = batch.cu_seqlens.tolist()
        batch = replace(
            batch, cu_seqlens=torch.tensor([0, 0, bounds[1], bounds[2], bounds[2], bounds[3], bounds[3]])
        )
        row = 3
    got = run(sf.sequence_logprobs, batch, backend=backend, upstream=1.0, reduction=reduction)
    expected = run(reference.sequence_logprobs, batch, upstream=1.0, reduction=reduction)
    assert got.outputs["value"][row] == 0
    torch.testing.assert_close(got.outputs["value"], expected.outputs["value"], rtol=1e-12, atol=0)
    for name, grad in got.grads.items():
        torch.testing.assert_close(grad, expected.grads[name], rtol=1e-11, atol=1e-13)


def test_slime_loss_is_its_parts(backend):
    """slime_terms of linear_logprobs is slime_loss, gradients included."""
    batch = make_batch(has_bias=True)
    whole = run(sf.slime_loss, batch, backend=backend)

    def parts(hidden, weight, labels, *, bias, cu_seqlens):
        logps = sf.linear_logprobs(hidden, weight, labels, bias=bias, cu_seqlens=cu_seqlens, backend=backend)
        keep = labels != -100
        bounds = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int()
        return sf.slime_terms(logps[keep], bounds, backend=backend)

    pieces = run(parts, batch)
    for name, value in whole.outputs.items():
        torch.testing.assert_close(pieces.outputs[name], value, rtol=1e-13, atol=1e-14)
    for name, grad in whole.grads.items():
        torch.testing.assert_close(pieces.grads[name], grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("bounds_dtype", [torch.int32, torch.int64])
def test_slime_terms_takes_strided_arguments(bounds_dtype, backend):
    logp = -torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, 1, 4, 6, 8], dtype=bounds_dtype)
    expected = sf.slime_terms(logp, bounds, backend=backend).loss
    strided = torch.repeat_interleave(logp, 2)[::2], torch.repeat_interleave(bounds, 2)[::2]
    assert torch.equal(sf.slime_terms(*strided, backend=backend).loss, expected)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_gradcheck_of_slime_terms(reduction, backend):
    generator = torch.Generator().manual_seed(3)
    logp = (-3 * torch.rand(11, dtype=torch.float64, generator=generator)).requires_grad_()
    bounds = torch.tensor([0, 1, 4, 9, 11])
    config = sf.SlimeLossConfig(stabilizer_reduction=reduction)
    assert torch.autograd.gradcheck(lambda x: sf.slime_terms(x, bounds, config, backend=backend).loss, (logp,))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_label_dtypes(dtype, backend):
    batch = make_batch()
    expected = batch.call(sf.linear_cross_entropy, backend=backend)
    narrow = replace(batch, labels=batch.labels.to(dtype))
    assert torch.equal(narrow.call(sf.linear_cross_entropy, backend=backend), expected)
