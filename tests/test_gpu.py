"""What only a GPU can show: the grid on the device, streams, graph capture, memory, several devices, bad labels."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import slime_fused as sf
from slime_fused import reference
from slime_fused.backends import get_backend
from slime_fused.backends.base import LogitsBlock, RowStats
from tests import backend_grid as grid
from tests import moment_grid, token_grid
from tests.narrow_residual import CASES as NARROW_CASES
from tests.narrow_residual import HALVES, check_narrow_residual

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda", 0)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    backend = get_backend(request.param)
    is_available, reason = backend.available()
    if not is_available:
        pytest.skip(f"{request.param}: {reason}")
    return backend


def problem(dtype=torch.bfloat16, pairs=3, length=33, hidden_size=64, vocab=1003, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * pairs, length, hidden_size, generator=generator).to(dtype)
    weight = (torch.randn(vocab, hidden_size, generator=generator) / hidden_size**0.5 * 2).to(dtype)
    labels = torch.randint(0, vocab, (2 * pairs, length), generator=generator)
    labels[:, : length // 3] = -100
    return hidden, weight, labels


def run(module, tensors, **options):
    hidden, weight, labels = tensors
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    output = module.slime_loss(hidden, weight, labels, **options)
    output.loss.backward()
    return output.loss.detach(), hidden.grad, weight.grad


def relative_error(got, truth):
    return ((got.cpu().double() - truth).norm() / truth.norm()).item()


def assert_same_but_for_rounding(got, expected):
    """Products of another stream or another card: cuBLAS promises their bits on neither."""
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b.cpu().double()) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("case", grid.row_cases(GPU_DTYPES), ids=lambda c: c.name)
def test_softmax_residual(backend, case):
    grid.check_softmax_residual(backend, case, DEVICE)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", grid.row_cases(GPU_DTYPES), ids=lambda c: c.name)
def test_stats_then_residual(backend, case, shards):
    grid.check_stats_then_residual(backend, case, DEVICE, shards)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", NARROW_CASES, ids=lambda c: c.name)
def test_residual_of_fewer_bits(backend, case, dtype):
    check_narrow_residual(backend, case, dtype, DEVICE)


@pytest.mark.parametrize("workspace", ["auto", "90KB", "16KB"])
@pytest.mark.parametrize("dtype", HALVES)
def test_float32_logits(backend, dtype, workspace):
    """Log-probs err by float32 arithmetic alone, and gradients no more than plain PyTorch's 16-bit ones do."""
    hidden, weight, labels = (x.to(DEVICE) for x in problem(dtype))
    weight = 15 * weight
    options = {"backend": backend.name, "workspace": workspace, "logits_dtype": torch.float32}
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    got = sf.linear_logprobs(hidden, weight, labels, **options)
    got.mean().backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = reference.linear_logprobs(*wide, labels)
    truth.mean().backward()
    assert (got.double() - truth).abs().max() <= 1e-6 * truth.abs().max()
    for ours, exact in zip((hidden, weight), wide, strict=True):
        assert relative_error(ours.grad, exact.grad.cpu()) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("vocab", [32000, 50257, 128256, 262144])
@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_real_vocabularies(backend, vocab, dtype):
    case = grid.RowCase(f"vocab_{vocab}", rows=9, vocab=vocab, pitch=-(-vocab // 8) * 8, dtype=dtype)
    grid.check_softmax_residual(backend, case, DEVICE)
    grid.check_stats_then_residual(backend, case, DEVICE, 3)


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_extreme_logits(backend, dtype):
    grid.check_extreme_logits(backend, dtype, DEVICE)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_extreme_scales(backend, dtype, softcap):
    grid.check_extreme_scales(backend, dtype, DEVICE, softcap)


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_target_does_not_cancel(backend, dtype):
    grid.check_target_does_not_cancel(backend, dtype, DEVICE)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", moment_grid.moment_cases(GPU_DTYPES), ids=lambda c: c.name)
def test_moments(backend, case, shards):
    moment_grid.check_moments(backend, case, DEVICE, shards)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", moment_grid.moment_cases(GPU_DTYPES), ids=lambda c: c.name)
def test_entropy_residual(backend, case, shards):
    moment_grid.check_entropy_residual(backend, case, DEVICE, shards)


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_extreme_moments(backend, dtype):
    moment_grid.check_extreme_moments(backend, dtype, DEVICE)


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_label_rank(backend, dtype):
    moment_grid.check_label_rank(backend, dtype, DEVICE)


@pytest.mark.parametrize("lengths", token_grid.SEGMENTS, ids=lambda s: f"{len(s)}x{max(s)}")
def test_segment_sum(backend, lengths):
    token_grid.check_segment_sum(backend, lengths, torch.float32, DEVICE)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_slime_terms(backend, reduction):
    token_grid.check_slime_terms(backend, token_grid.WEIGHTS[reduction], torch.float32, DEVICE)


def test_margin_at_the_hinge(backend):
    token_grid.check_margin_at_the_hinge(backend, DEVICE)


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_scale(backend, dtype):
    token_grid.check_scale(backend, dtype, DEVICE)


@pytest.mark.parametrize("workspace", ["auto", "90KB", "16KB"])
@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_slime_loss_is_no_worse_than_plain_pytorch(backend, dtype, workspace):
    if dtype == torch.float32 and workspace == "16KB":
        workspace = "32KB"
    tensors = problem(dtype)
    on_device = [t.to(DEVICE) for t in tensors]
    truth = run(reference, (tensors[0].double(), tensors[1].double(), tensors[2]))
    plain = run(reference, on_device)
    ours = run(sf, on_device, backend=backend.name, workspace=workspace)
    for got, naive, true in zip(ours, plain, truth, strict=True):
        # float32 sums are in another order than PyTorch's; 16 bits round in the products and the residual alone.
        floor = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 0.25)
        assert relative_error(got, true) <= relative_error(naive, true) + floor


def test_stream_the_kernels_run_on_the_current_one(backend):
    """The inputs arrive on a busy side stream; a kernel on any other stream would read them too early."""
    tensors = [t.to(DEVICE) for t in problem()]
    expected = run(sf, tensors, backend=backend.name, workspace="90KB")
    late = [torch.zeros_like(t) for t in tensors]
    late[2].fill_(1)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, tensors, strict=True):
            target.copy_(source)
        got = run(sf, late, backend=backend.name, workspace="90KB")
    side.synchronize()
    assert_same_but_for_rounding(got, expected)


def test_stream_row_kernels_wait_for_their_own(backend):
    """The same for the kernels themselves, with no host wait in between."""
    case = grid.RowCase("stream", rows=64, vocab=1000, dtype=torch.bfloat16)
    data = grid.RowData(case, DEVICE)
    late = torch.zeros_like(data.raw)
    out = torch.empty_like(data.raw)
    block, stats = LogitsBlock(late, data.labels, None, case.head), RowStats(*data.empty_rows(3))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):  # a first launch may compile, for longer than the stream sleeps
            late.zero_()
            torch.cuda._sleep(50_000_000)
            late.copy_(data.raw)
            backend.softmax_residual(block, out, case.token_loss, stats)
    side.synchronize()
    data.check("residual", out)


def test_same_call_same_bits(backend):
    tensors = [t.to(DEVICE) for t in problem(pairs=8, length=65, vocab=50257)]
    first = run(sf, tensors, backend=backend.name)
    for _ in range(3):
        again = run(sf, tensors, backend=backend.name)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_graph_capture_of_cross_entropy(backend):
    """Nothing in the loss on given logits waits for the device, so a CUDA graph can hold it."""
    logits = torch.randn(64, 1003, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.randint(0, 1003, (64,), device=DEVICE)
    static = logits.clone().requires_grad_()

    def step():
        static.grad = None
        loss = sf.cross_entropy(static, labels, backend=backend.name)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    static.data.copy_(torch.randn_like(static))
    graph.replay()
    expected_input = static.detach().clone().requires_grad_()
    expected = sf.cross_entropy(expected_input, labels, backend=backend.name)
    expected.backward()
    assert torch.equal(captured.detach(), expected.detach())
    assert torch.equal(static.grad, expected_input.grad)


@pytest.mark.alone
def test_peak_memory_is_what_the_plan_says():
    hidden, weight, labels = (t.to(DEVICE) for t in problem(pairs=8, length=513, hidden_size=256, vocab=32001))
    hidden.requires_grad_()
    weight.requires_grad_()
    plan = sf.explain_plan(hidden, weight, labels, workspace="64MiB")
    sf.slime_loss(hidden, weight, labels, workspace="64MiB").loss.backward()  # cuBLAS takes its own workspace once
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sf.slime_loss(hidden, weight, labels, workspace="64MiB").loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = hidden.numel() * 2 + weight.numel() * 2
    assert len(plan.chunks) > 1 or plan.kind == "fused"
    assert peak <= 1.05 * plan.workspace + plan.accumulator_bytes + gradients


@pytest.mark.alone
@pytest.mark.parametrize("has_head_gradient", [True, False])
def test_fused_plan(has_head_gradient):
    """Numbers as plain PyTorch, memory as the plan says: no (N x V) buffer and no float32 dW."""
    triton = get_backend("triton")
    if not triton.available()[0]:
        pytest.skip(triton.available()[1])
    hidden, weight, labels = (t.to(DEVICE) for t in problem(pairs=4, length=300, hidden_size=512, vocab=32003))
    options = {"backend": "triton", "workspace": "8MiB"}
    hidden.requires_grad_(has_head_gradient)
    weight.requires_grad_(has_head_gradient)

    def step():
        out = sf.slime_loss(hidden, weight, labels, **options)
        if has_head_gradient:
            out.loss.backward()
        gradients, hidden.grad, weight.grad = (hidden.grad, weight.grad), None, None
        return out.loss.detach(), gradients

    plan = sf.explain_plan(hidden, weight, labels, **options)
    assert plan.kind == "fused", plan
    step()  # cuBLAS takes its own workspace once, and Triton compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, gradients = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    wanted = (hidden, weight) if has_head_gradient else ()
    returned = sum(t.numel() * t.element_size() for t in wanted)
    # Vectors of rows, and the allocator's rounding of each.
    assert peak <= plan.workspace_bytes + plan.scratch_bytes + returned + (1 << 20), plan

    if not has_head_gradient:
        expected = reference.slime_loss(hidden, weight, labels).loss
        assert relative_error(loss, expected.cpu().double()) < torch.finfo(torch.bfloat16).eps
        return
    truth = run(reference, (hidden.double(), weight.double(), labels))
    plain = run(reference, (hidden, weight, labels))
    for got, naive, true in zip((loss, *gradients), plain, truth, strict=True):
        true = true.cpu()
        assert relative_error(got, true) <= relative_error(naive, true) + torch.finfo(torch.bfloat16).eps / 4


@pytest.mark.alone
def test_out_of_memory_leaves_everything_usable():
    tensors = [t.to(DEVICE) for t in problem(pairs=32, length=257, hidden_size=64, vocab=128256)]
    expected = run(sf, tensors, workspace="256MiB")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(max(free - (200 << 20), 1), dtype=torch.uint8, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        run(sf, tensors, workspace="2GiB")
    del hog
    torch.cuda.empty_cache()
    again = run(sf, tensors, workspace="256MiB")
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_half_precision_survives_a_loss_scaler():
    """fp16 gradients of a mean over many tokens: subnormal if formed before the scaler's factor reaches them."""
    tensors = problem(torch.float16, pairs=64, length=65)
    truth = run(reference, (tensors[0].double(), tensors[1].double(), tensors[2]))
    hidden, weight, labels = (t.to(DEVICE) for t in tensors)
    hidden.requires_grad_()
    weight.requires_grad_()
    (sf.slime_loss(hidden, weight, labels).loss * 4096).backward()
    assert relative_error(hidden.grad.double() / 4096, truth[1]) < 2 * torch.finfo(torch.float16).eps
    assert relative_error(weight.grad.double() / 4096, truth[2]) < 2 * torch.finfo(torch.float16).eps


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device(backend):
    tensors = problem()
    first = run(sf, [t.to("cuda:0") for t in tensors], backend=backend.name)
    second = run(sf, [t.to("cuda:1") for t in tensors], backend=backend.name)
    assert torch.cuda.current_device() == 0
    assert_same_but_for_rounding(second, first)


def test_label_out_of_range_is_a_device_assertion():
    """In a process of its own: a device assertion ends the CUDA context."""
    code = (
        "import torch, slime_fused as sf\n"
        "h = torch.randn(2, 4, 8, device='cuda'); w = torch.randn(16, 8, device='cuda')\n"
        "labels = torch.full((2, 4), 16, device='cuda')\n"
        "sf.slime_loss(h, w, labels)\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "assert" in done.stderr.lower()


def test_compiled_slime_loss():
    tensors = [t.to(DEVICE) for t in problem()]
    hidden, weight, labels = tensors
    expected = run(sf, tensors)

    @torch.compile(fullgraph=True)
    def loss(h, w):
        return sf.slime_loss(h, w, labels).loss

    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    value = loss(h, w)
    value.backward()
    assert relative_error(value, expected[0].cpu().double()) < 1e-6
    assert relative_error(h.grad, expected[1].cpu().double()) < 1e-6
    assert relative_error(w.grad, expected[2].cpu().double()) < 1e-6
