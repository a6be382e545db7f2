"""The CPU kernels of ``slime_fused._C``: each instruction set, tails, strides, threads and special values.

The shared grid of the backends is elsewhere; here is what only the native code can get wrong. Column counts are
chosen around the vector width (16 floats on AVX-512, 4 on the baseline) and the 8-vector step of the statistics:
below one vector, one step exactly, one step and a tail, many steps and a tail.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from slime_fused.backends.base import (
    HeadTransform,
    LogitsBlock,
    RowFactors,
    RowStats,
    TokenLoss,
    TokenStats,
    VocabStats,
    acc_dtype,
)
from slime_fused.backends.cpu import CpuBackend
from slime_fused.backends.native import _C

BACKEND = CpuBackend()
if not BACKEND.available()[0]:
    pytest.skip(BACKEND.available()[1], allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN_HEAD, PLAIN_LOSS = HeadTransform(), TokenLoss()
INF = float("inf")


@pytest.fixture(params=_C.cpu.runnable_isas())
def isa(request):
    _C.cpu.use_isa(request.param)
    yield request.param
    _C.cpu.use_isa("")


@pytest.fixture
def threads():
    """A setter of the number of threads that the test leaves as it found it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def residual(logits, labels, *, bias=None, head=PLAIN_HEAD, token_loss=PLAIN_LOSS, out=None):
    """(residual, lse, logp, loss) of the native kernel."""
    rows, acc = logits.shape[0], acc_dtype(logits.dtype)
    out = torch.full(logits.shape, 7.0, dtype=logits.dtype) if out is None else out
    stats = TokenStats(*(torch.full((rows,), 7.0, dtype=acc) for _ in range(4)))
    BACKEND.softmax_residual(LogitsBlock(logits, labels, bias, head), out, token_loss, stats)
    return out, stats.row_max + stats.row_sum.log(), stats.logp, stats.loss


def plain(logits, labels, *, bias=None, head=PLAIN_HEAD, token_loss=PLAIN_LOSS, dtype=torch.float64):
    """The same four in plain PyTorch in ``dtype``."""
    raw = logits.to(dtype).detach().clone().requires_grad_()
    z = head.scale * (raw if bias is None else raw + bias.to(dtype))
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    logprobs = torch.log_softmax(z, dim=1)
    lse = (z - logprobs)[torch.arange(len(labels)), z.argmax(dim=1)]
    logp = logprobs.gather(1, labels[:, None])[:, 0]
    eps = token_loss.label_smoothing
    loss = -(1 - eps) * logp + token_loss.z_loss * lse**2
    if eps:
        loss = loss - eps * logprobs.mean(dim=1)
    (grad,) = torch.autograd.grad(loss.sum(), raw)
    return grad, lse.detach(), logp.detach(), loss.detach()


def assert_as_good_as_plain(got, exact, rounded, name):
    """Elementwise: within the worst error of plain PyTorch in the same dtype plus 4 units of rounding."""
    worst = (rounded.double() - exact).abs().max()
    floor = 4 * torch.finfo(got.dtype).eps * exact.abs().clamp(min=torch.finfo(got.dtype).tiny)
    floor += 4 * torch.finfo(acc_dtype(got.dtype)).eps
    error = (got.double() - exact).abs()
    assert (error <= worst + floor).all(), f"{name}: error {error.max():.3g}, plain PyTorch {worst:.3g}"


HEADS = [
    (PLAIN_HEAD, PLAIN_LOSS, False),
    (HeadTransform(0.25), TokenLoss(z_loss=1e-3), True),
    (HeadTransform(1.5, 8.0), TokenLoss(0.1, 1e-3), True),
]


@pytest.mark.parametrize(("head", "token_loss", "with_bias"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 5, 128, 131, 1003])
def test_residual_on_tails_strides_and_alignments(isa, dtype, cols, head, token_loss, with_bias):
    generator = torch.Generator().manual_seed(cols)
    rows = 5
    wide = (torch.randn(rows, cols + 3, generator=generator) * 4).to(dtype)
    logits = wide[:, 1 : cols + 1]  # rows begin at an odd element and are cols + 3 apart
    labels = torch.randint(0, cols, (rows,), generator=generator)
    bias = torch.randn(cols, generator=generator).to(dtype) if with_bias else None
    args = {"bias": bias, "head": head, "token_loss": token_loss}
    before = wide.clone()

    padded = torch.full((rows, cols + 5), 3.0, dtype=dtype)
    got = residual(logits, labels, out=padded[:, 2 : cols + 2], **args)
    exact = plain(logits, labels, **args)
    rounded = plain(logits, labels, dtype=dtype, **args)
    for name, *values in zip(("residual", "lse", "logp", "loss"), got, exact, rounded, strict=True):
        assert_as_good_as_plain(*values, name)
    assert torch.equal(wide, before)
    assert (padded[:, :2] == 3).all()
    assert (padded[:, cols + 2 :] == 3).all()

    in_place = residual(logits, labels, out=logits, **args)
    assert all(map(torch.equal, in_place, got))
    assert torch.equal(wide[:, 0], before[:, 0])
    assert torch.equal(wide[:, cols + 1 :], before[:, cols + 1 :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_columns_merge_to_the_whole_row(isa, dtype):
    generator = torch.Generator().manual_seed(1)
    rows, cols = 6, 517
    head, token_loss = HeadTransform(0.5, 20.0), TokenLoss(0.1, 1e-3)
    logits = (torch.randn(rows, cols, generator=generator) * 6).to(dtype)
    labels = torch.tensor([0, 16, 200, 201, 516, -100])
    row_scale = torch.rand(rows, generator=generator).to(acc_dtype(dtype))
    stats = VocabStats(*(torch.zeros(rows, dtype=row_scale.dtype) for _ in range(4)))
    blocks = [
        LogitsBlock(logits[:, begin:end], labels, None, head, begin, cols)
        for begin, end in ((0, 17), (17, 201), (201, 517))
    ]
    for block in blocks:
        BACKEND.logits_stats(block, stats, merge=block.col_offset > 0)
    lse = stats.row_max + stats.row_sum.log()
    logp = stats.label_logit - stats.row_max - stats.row_sum.log()
    out, known = torch.full_like(logits, 7.0), RowStats(stats.row_max, stats.row_sum, logp)
    for block in blocks:
        part = out[:, block.col_offset :][:, : block.logits.shape[1]]
        BACKEND.residual_from_stats(block, part, token_loss, known, RowFactors(row_scale))

    safe, kept = labels.clamp(min=0), (labels >= 0)
    exact = plain(logits, safe, head=head, token_loss=token_loss)
    rounded = plain(logits, safe, head=head, token_loss=token_loss, dtype=dtype)
    factor = (row_scale * kept).double()[:, None]
    assert_as_good_as_plain(out, exact[0] * factor, rounded[0].double() * factor, "residual")
    assert_as_good_as_plain(lse, exact[1], rounded[1], "lse")
    assert_as_good_as_plain(logp[kept], exact[2][kept], rounded[2][kept], "logp")
    z = 20.0 * torch.tanh(logits.double() * 0.5 / 20.0)
    np.testing.assert_allclose(stats.logit_sum, z.sum(1), atol=z.abs().sum(1).max() * 2e-7)
    assert (out[5] == 0).all()
    assert stats.label_logit[5] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_any_number_of_threads(isa, dtype, threads):
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(77, 5003, generator=generator) * 4).to(dtype)
    labels = torch.randint(-1, 5003, (77,), generator=generator)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(residual(logits, labels, token_loss=TokenLoss(0.1, 1e-4)))
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_ignored_rows_are_zero_even_where_their_logits_are_nan(isa):
    logits = torch.full((2, 40), float("nan"))
    logits[0] = torch.arange(40.0)
    out, lse, logp, loss = residual(logits, torch.tensor([3, -100]))
    assert torch.isfinite(out[0]).all()
    assert (out[1] == 0).all()
    assert lse[1] == logp[1] == loss[1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_vocabulary_counts_as_probability_zero(isa, dtype):
    logits = torch.full((3, 300), -INF, dtype=dtype)
    logits[0, 140] = 2.5  # a single finite logit, behind a whole step of -inf
    logits[1, ::7] = 1.0
    logits[2, :3] = -30000.0  # large negative, finite in every dtype
    out, lse, logp, _ = residual(logits, torch.tensor([140, 7, 0]))
    exact, exact_lse, exact_logp, _ = plain(logits, torch.tensor([140, 7, 0]))
    assert torch.equal(out[0], torch.zeros(300, dtype=dtype))
    eps, acc_eps = torch.finfo(dtype).eps, torch.finfo(lse.dtype).eps
    assert ((out.double() - exact).abs() <= eps).all()
    np.testing.assert_allclose(lse, exact_lse, rtol=2 * acc_eps)
    np.testing.assert_allclose(logp, exact_logp, rtol=2 * acc_eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", ["all -inf", "nan first", "nan in a step", "nan in the tail", "+inf"])
def test_rows_without_a_softmax_give_nan_as_in_pytorch(isa, dtype, bad):
    logits = torch.linspace(-3, 3, 2 * 261).reshape(2, 261).to(dtype)
    if bad == "all -inf":
        logits[0] = -INF
    else:
        logits[0, {"nan first": 0, "nan in a step": 77, "nan in the tail": 260, "+inf": 5}[bad]] = (
            INF if bad == "+inf" else float("nan")
        )
    labels = torch.tensor([4, 4])
    out, _, logp, loss = residual(logits, labels)
    assert torch.log_softmax(logits[0].double(), 0).isnan().all()
    assert out[0].isnan().all()
    assert logp[0].isnan()
    assert loss[0].isnan()
    assert torch.isfinite(out[1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 3.0, 9.0, 40.0, 2e4])
def test_likely_and_impossible_labels(isa, dtype, gap):
    """The label's entry keeps its relative accuracy as p goes to 1, where p - 1 in the dtype has none left."""
    logits = torch.full((2, 200), -gap / 2, dtype=dtype)
    logits[:, 50] = gap / 2
    labels = torch.tensor([50, 51])
    out, _, logp, _ = residual(logits, labels)
    exact, _, exact_logp, _ = plain(logits, labels)
    acc_eps = torch.finfo(logp.dtype).eps
    floor = 16 * acc_eps  # log of a sum near 1 has the absolute accuracy of that sum of 200 terms
    np.testing.assert_allclose(logp, exact_logp, rtol=4 * acc_eps, atol=floor)
    assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + floor).all()


def test_large_logits_keep_full_relative_accuracy(isa):
    """At 1e4 one float32 ulp of the log-sum-exp is 1e-3: the kernel must not subtract it from the logits."""
    logits = 1e4 + torch.randn(4, 777, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 1, 2, 3])
    out, _, logp, _ = residual(logits, labels)
    exact, _, exact_logp, _ = plain(logits, labels)
    np.testing.assert_allclose(out, exact, rtol=2e-6)
    np.testing.assert_allclose(logp, exact_logp, rtol=1e-6)


def test_a_label_outside_the_vocabulary_is_named_before_anything_is_written():
    logits = torch.randn(4, 10)
    labels = torch.tensor([1, 2, 10, -100])
    out = torch.full((4, 10), 7.0)
    stats = RowStats(*(torch.full((4,), 7.0) for _ in range(3)))
    with pytest.raises(ValueError, match=r"labels: .* below the vocabulary size 10, got 10 at row 2"):
        BACKEND.softmax_residual(LogitsBlock(logits, labels, None, PLAIN_HEAD), out, PLAIN_LOSS, stats)
    block = LogitsBlock(logits[:, :4], labels, None, PLAIN_HEAD, col_offset=2, vocab_size=10)
    with pytest.raises(ValueError, match=r"below the vocabulary size 10, got 10 at row 2"):
        BACKEND.residual_from_stats(block, out[:, :4], PLAIN_LOSS, stats)
    assert all((tensor == 7).all() for tensor in (out, *vars(stats).values()))


NATIVE_ARGS = {
    "logits": 64, "out": 64, "rows": 2, "cols": 8, "logits_stride": 8, "out_stride": 8, "dtype": 0,
    "out_dtype": 0, "labels": 64, "bias": 0, "scale": 1.0, "softcap": 0.0, "label_smoothing": 0.0, "z_loss": 0.0,
    "row_max": 64, "row_sum": 64, "logp": 64, "loss": 0, "num_threads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": -1}, "rows: expected at least 0, got -1"),
        ({"cols": 0}, "cols: expected at least 1, got 0"),
        ({"logits_stride": 7}, "logits row stride: expected at least 8, got 7"),
        ({"out_stride": 7}, "out row stride: expected at least 8, got 7"),
        ({"out_stride": 9}, r"out: expected the row stride of logits \(8\) .* got 9"),
        ({"dtype": 4}, "dtype: expected .* got 4"),
        ({"dtype": 1, "out_dtype": 0}, r"out_dtype: expected that of the logits \(1\).* got 0"),
        ({"out_dtype": 3}, "out_dtype: expected .* got 3"),
        ({"out_dtype": 1}, "out: expected another buffer than logits of another dtype"),
        ({"logits": 0}, "logits: expected a buffer, got a null pointer"),
        ({"out": 0}, "out: expected a buffer"),
        ({"labels": 0}, "labels: expected a buffer"),
        ({"num_threads": 0}, "num_threads: expected at least 1, got 0"),
    ],
)
def test_the_native_function_refuses_what_it_can_see(change, message):
    with pytest.raises(ValueError, match=message):
        _C.cpu.softmax_residual(**NATIVE_ARGS | change)


def test_tensors_of_the_wrong_shape_dtype_or_layout_are_named():
    logits, labels, good = torch.randn(4, 10), torch.zeros(4, dtype=torch.int64), torch.empty(4)
    for change, error, message in [
        ({"out": torch.empty(4, 9)}, ValueError, r"out: expected shape \(4, 10\), got \(4, 9\)"),
        ({"out": torch.empty(4, 10).double()}, TypeError, "out: expected dtype torch.float32, got torch.float64"),
        ({"out": torch.empty(10, 4).t()}, ValueError, "out: expected contiguous columns"),
        ({"labels": labels.int()}, TypeError, "labels: expected dtype torch.int64, got torch.int32"),
        ({"row_max": good.double()}, TypeError, "row_max: expected dtype torch.float32, got torch.float64"),
        ({"logp": torch.empty(8)[::2]}, ValueError, "logp: expected a contiguous tensor, got stride 2"),
    ]:
        args = {"out": torch.empty(4, 10), "labels": labels, "row_max": good, "logp": good.clone(), **change}
        block = LogitsBlock(logits, args["labels"], None, PLAIN_HEAD)
        stats = RowStats(args["row_max"], good.clone(), args["logp"])
        with pytest.raises(error, match=message):
            BACKEND.softmax_residual(block, args["out"], PLAIN_LOSS, stats)
    assert not BACKEND.supports(torch.device("cpu"), torch.int32)[0]
    assert not BACKEND.supports(torch.device("meta"), torch.float32)[0]


def test_no_rows_and_single_rows_of_any_stride_are_legal():
    out, lse, _, _ = residual(torch.empty(0, 10), torch.empty(0, dtype=torch.int64))
    assert out.shape == (0, 10)
    assert lse.shape == (0,)
    row = torch.randn(12).as_strided((1, 12), (1, 1))
    got = residual(row, torch.tensor([3]))
    assert_as_good_as_plain(got[0], plain(row, torch.tensor([3]))[0], plain(row, torch.tensor([3]))[0], "residual")


def test_callers_on_several_threads_do_not_disturb_each_other(threads):
    threads(2)
    logits = torch.randn(64, 4000, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(64)
    expected = residual(logits, labels)
    results = [[] for _ in range(4)]

    def work(mine):
        torch.set_num_threads(2)
        mine.extend(residual(logits, labels) for _ in range(10))

    callers = [threading.Thread(target=work, args=(mine,)) for mine in results]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [len(mine) for mine in results] == [10] * 4
    assert all(all(map(torch.equal, got, expected)) for mine in results for got in mine)


def test_a_forked_child_makes_its_own_threads(threads):
    threads(2)
    logits, labels = torch.randn(64, 4000), torch.arange(64)
    expected = residual(logits, labels)[0].numpy()
    # The child calls no large torch operation: the OpenMP threads of torch do not survive a fork.
    out = torch.empty(64, 4000)
    stats = RowStats(*(torch.empty(64) for _ in range(3)))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # a pool that waits for threads it does not have would hang
        BACKEND.softmax_residual(LogitsBlock(logits, labels, None, PLAIN_HEAD), out, PLAIN_LOSS, stats)
        os._exit(0 if np.array_equal(out.numpy(), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(residual(logits, labels)[0].numpy(), expected)


def test_an_unknown_instruction_set_is_refused_by_name():
    with pytest.raises(ValueError, match=r"expected one of scalar.* got 'mmx'"):
        _C.cpu.use_isa("mmx")
    assert _C.build_info()["cpu_isa"] in _C.cpu.runnable_isas()


@pytest.mark.parametrize("name", ["scalar", "mmx"])
def test_the_environment_names_the_instruction_set(name):
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(_C.__file__)!r}); import _C; print(_C.cpu.active_isa())"
    )
    environment = {**os.environ, "SLIME_FUSED_CPU_ISA": name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    if name == "scalar":
        assert done.stdout == "scalar\n"
    else:
        assert "SLIME_FUSED_CPU_ISA): expected one of scalar" in done.stderr
