"""A layout made once per batch: the bits of labels, no wait for the device, little before the first product."""

from __future__ import annotations

import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import slime_fused as sf
from slime_fused.backends.cpu import CpuBackend
from slime_fused.engine import products
from tests.support import BACKENDS, PLANS, Batch, force_plan, make_batch, pack, require_backend, run

FUNCTIONS = ("slime_loss", "linear_cross_entropy", "linear_logprobs", "sequence_logprobs")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


def with_layout(batch: Batch, **options) -> Batch:
    """The batch with its layout in the place of labels and boundaries."""
    layout = sf.token_layout(batch.labels, cu_seqlens=batch.cu_seqlens, **options)
    return replace(batch, labels=layout, cu_seqlens=None)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_bits_as_with_labels(name, kind, packed, shift, backend):
    """Prompt and padding or none, so that rows are gathered or taken as they are."""
    for batch in (make_batch(has_bias=True), make_batch((5, 5, 5, 5), prompt=0, padding=0)):
        batch = pack(batch, drop=0) if packed else batch
        workspace, _ = force_plan(kind, batch.leaves(), shift=shift)
        options = {"backend": backend, "workspace": workspace}
        if name == "sequence_logprobs":
            options["reduction"] = "mean"
        expected = run(getattr(sf, name), batch, shift=shift, **options)
        got = run(getattr(sf, name), with_layout(batch, shift=shift), **options)
        for key, value in (*expected.outputs.items(), *expected.grads.items()):
            assert torch.equal({**got.outputs, **got.grads}[key], value), key
            assert got.outputs.keys() == expected.outputs.keys()


def test_what_it_tells():
    layout = sf.token_layout(torch.tensor([[3, 5, -100, 7], [1, -100, -100, -100]]), shift=True)
    assert layout.lengths == (2, 0)
    assert layout.num_rows == 2
    assert layout.rows.tolist() == [0, 2]
    assert layout.labels.tolist() == [[5, -1, 7, -1], [-1, -1, -1, -1]]
    assert sf.token_layout(torch.tensor([[3, 5], [1, 2]])).rows is None
    again = pickle.loads(pickle.dumps(layout))
    assert again.lengths == layout.lengths
    assert torch.equal(again.targets, layout.targets)
    assert layout.to("cpu") is layout
    assert layout.to("meta").targets.is_meta


def test_it_keeps_its_own_boundaries():
    """A collator may use its buffer for the next batch, and may work in inference mode."""
    batch = pack(make_batch(dtype=torch.float32))
    expected = run(sf.sequence_logprobs, batch)
    bounds = batch.cu_seqlens.clone()
    with torch.inference_mode():
        layout = sf.token_layout(batch.labels, cu_seqlens=bounds.clone())
    again = sf.token_layout(batch.labels, cu_seqlens=bounds)
    bounds.zero_()
    for own in (layout, again):
        got = run(sf.sequence_logprobs, replace(batch, labels=own, cu_seqlens=None))
        assert torch.equal(got.outputs["value"], expected.outputs["value"])
        assert torch.equal(got.grads["weight"], expected.grads["weight"])


def test_known_lengths_are_checked():
    labels = torch.tensor([[3, -100], [1, 2]])
    assert sf.token_layout(labels, lengths=[1, 2]).lengths == (1, 2)
    assert sf.token_layout(labels, lengths=torch.tensor([1, 2])).lengths == (1, 2)
    packed = {"cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32)}
    assert sf.token_layout(labels.flatten(), lengths=(1, 2), **packed).lengths == (1, 2)
    for arguments in ((labels, {}), (labels.flatten(), packed)):
        with pytest.raises(ValueError, match=r"lengths: .*got 2 for sequence 0, which has 1"):
            sf.token_layout(arguments[0], lengths=[2, 2], **arguments[1])


LABELS = torch.tensor([[3, -100], [1, 2]])
BAD = [
    ((None,), {}, TypeError, r"labels: expected a torch.Tensor, got NoneType"),
    ((LABELS.float(),), {}, TypeError, "labels: expected int64 or int32, got torch.float32"),
    ((LABELS[0, 0],), {}, ValueError, r"labels: expected \(S, T\).* got a scalar"),
    (
        (LABELS - 2,),
        {},
        ValueError,
        r"labels: expected ignore_index or a value of 0 .*got -102 at position \(0, 1\)",
    ),
    (
        (LABELS[0],),
        {"cu_seqlens": torch.tensor([0, 2**32 + 2])},
        ValueError,
        "end at 2 .*, got 0 and 2147483647",
    ),
    ((LABELS,), {"vocab_size": 3}, ValueError, r"in \[0, 3\), got 3 at position \(0, 0\)"),
    ((LABELS,), {"vocab_size": 0}, ValueError, "vocab_size: expected at least 1, got 0"),
    ((LABELS,), {"vocab_size": 3.0}, TypeError, "vocab_size: expected an int, got 3.0"),
    ((LABELS,), {"shift": "yes"}, TypeError, "shift: expected True or False, got 'yes'"),
    ((LABELS,), {"ignore_index": 1.5}, TypeError, "ignore_index: expected an int, got 1.5"),
    ((LABELS,), {"lengths": [1]}, ValueError, "lengths: expected one for each of 2 sequences, got 1"),
    ((LABELS,), {"lengths": [1, 2.0]}, TypeError, r"lengths\[1\]: expected an int, got 2.0"),
    ((LABELS,), {"lengths": [-1, 2]}, ValueError, r"lengths\[0\]: expected at least 0, got -1"),
    ((LABELS,), {"lengths": 3}, TypeError, "lengths: expected a sequence of ints, got 3"),
    ((LABELS,), {"cu_seqlens": torch.tensor([0, 4])}, ValueError, r"labels: expected \(N,\) together with"),
    ((LABELS[0],), {"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens: expected to begin at 0 and end"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        sf.token_layout(*arguments, **options)


@pytest.mark.parametrize("function", [sf.slime_loss, sf.linear_logprobs, sf.explain_plan])
def test_beside_a_layout(function):
    batch = make_batch(dtype=torch.float32, vocab_size=37)
    layout = with_layout(batch)
    for name, value in (("shift", True), ("ignore_index", 0), ("cu_seqlens", torch.tensor([0, 2]))):
        options = {"cu_seqlens": None, name: value}
        with pytest.raises(ValueError, match=f"{name}: expected none beside a TokenLayout"):
            function(layout.hidden, layout.weight, layout.labels, **options)
    with pytest.raises(ValueError, match=r"labels: expected shape \(6, 8\)"):
        function(layout.hidden[:, 1:], layout.weight, layout.labels)
    with pytest.raises(ValueError, match=r"labels: expected ignore_index or a value in \[0, 20\), got"):
        function(layout.hidden, layout.weight[:20], layout.labels)


def test_the_code_of_the_documentation():
    text = (Path(__file__).parent.parent / "docs" / "backends.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "token_layout" in block]
    batch = make_batch(dtype=torch.float32, prompt=3)
    scope = {"sf": sf, "hidden": batch.hidden, "weight": batch.weight, "labels": batch.labels}
    exec(code, scope)
    expected = sf.reference.slime_loss(batch.hidden, batch.weight, batch.labels, shift=True).loss
    torch.testing.assert_close(scope["loss"], expected)
    assert scope["logps"].shape == batch.labels.shape


class _Recorder(TorchDispatchMode):
    """Names of the operations up to the first matrix product, and of those that would wait for a device."""

    PRODUCTS = ("mm", "addmm")
    NO_LAUNCH = ("detach", "alias", "view", "t", "slice", "_unsafe_view", "unsqueeze", "new_empty", "empty")
    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.before: list[str] = []
        self.waits: list[str] = []
        self._has_begun = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self._has_begun |= name in self.PRODUCTS
        if not self._has_begun and name not in self.NO_LAUNCH:
            self.before.append(name)
        if name in self.WAITS:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prompt", [0, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_waits_and_little_runs_before_the_first_product(name, prompt, monkeypatch):
    """Operations stand for launches. With a layout there is the gathering of rows and targets, and zeros for dX.

    From labels there are the range check, the counts, the targets and the rows besides.
    """
    # The native kernel takes the factor as a number, which on the CPU is no wait.
    monkeypatch.setattr(CpuBackend, "scale_", lambda self, tensor, factor: tensor.mul_(factor))
    batch = make_batch((5, 5, 5, 5), prompt=prompt, padding=0, dtype=torch.bfloat16)
    layout = with_layout(batch, vocab_size=37)

    def record(batch: Batch) -> _Recorder:
        leaves = batch.leaves(("hidden", "weight"))
        with _Recorder() as seen:
            out = leaves.call(getattr(sf, name), backend="cpu")
            (out.loss if name == "slime_loss" else out.sum()).backward()
        return seen

    record(layout)  # the chunks' boundaries are taken to the device once
    seen = record(layout)
    assert not seen.waits
    padding = ["zero_"]  # of the buffer's columns beyond an odd vocabulary
    assert sorted(seen.before) == sorted([*padding, *(["index_select"] * 2 + ["new_zeros"] if prompt else [])])
    assert len(record(batch).before) <= len(seen.before) + 14


@pytest.mark.parametrize("name", FUNCTIONS)
def test_little_python_runs_before_the_first_product(name, monkeypatch):
    """Calls of this package's functions stand for time, about a microsecond each, which a test should not take."""
    batch = with_layout(make_batch((5, 5, 5, 5), dtype=torch.bfloat16), vocab_size=37).leaves(("hidden", "weight"))
    package = str(Path(sf.__file__).parent)
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(package)

    def stop(hidden, weight, out):
        sys.setprofile(None)
        write_logits(hidden, weight, out)

    write_logits = products.write_logits
    monkeypatch.setattr(products, "write_logits", stop)
    batch.call(getattr(sf, name), backend="cpu")  # plan and boundaries are kept from here on
    calls = 0
    sys.setprofile(count)
    batch.call(getattr(sf, name), backend="cpu")
    assert 0 < calls <= 120, calls


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_whole_pass_is_captured_in_a_cuda_graph(name):
    batch = make_batch((40, 30, 35, 50), vocab_size=1003, hidden_size=64, dtype=torch.bfloat16)
    on_gpu = replace(batch, **{k: x.cuda() for k, x in batch.tensors().items()})
    layout = sf.token_layout(batch.labels, vocab_size=1003).to("cuda")
    leaves = replace(on_gpu, labels=layout).leaves(("hidden", "weight"))

    def step() -> torch.Tensor:
        leaves.hidden.grad = leaves.weight.grad = None
        out = leaves.call(getattr(sf, name))
        loss = out.loss if name == "slime_loss" else out.sum()
        loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        leaves.hidden.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    expected = run(getattr(sf, name), replace(leaves, labels=layout), wanted=("hidden", "weight"))
    grads = {"hidden": leaves.hidden.grad, "weight": leaves.weight.grad}
    torch.testing.assert_close(loss, next(iter(expected.outputs.values())).sum())
    for key, grad in expected.grads.items():
        torch.testing.assert_close(grads[key], grad)
