"""Scratch that is kept between CPU calls: never two owners, never above its bound, given back on request.

Small buffers go past the cache; here its threshold is lowered, so that a few rows show what gigabytes would.
"""

from __future__ import annotations

import gc
import os
import threading

import pytest
import torch

import slime_fused as sf
from slime_fused.backends.native import _C
from slime_fused.engine import buffers

if _C is None:
    pytest.skip("the native module was not built", allow_module_level=True)

LIKE = torch.empty(0)
KIB = 1 << 10


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    """An empty cache of 1 MiB that takes buffers of any size."""
    gc.collect()
    before = _C.cpu.cache_limit()
    monkeypatch.setattr(buffers, "LEAST_BYTES", 0)
    sf.empty_cache()
    sf.set_cache_limit(KIB * KIB)
    yield
    sf.empty_cache()
    sf.set_cache_limit(before)


def scratch(kib):
    return buffers.new_scratch(LIKE, (kib, 256), torch.float32)


def head(rows=64, vocab=96, hidden=32, seed=0):
    """Hidden states, weight and labels of eight sequences; one in four rows is ignored."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, rows // 8, hidden, generator=generator).requires_grad_()
    w = torch.randn(vocab, hidden, generator=generator).requires_grad_()
    labels = torch.randint(0, vocab, (8, rows // 8), generator=generator)
    labels[:, ::4] = -100
    return x, w, labels


def exact(x, w, labels, upstream):
    """Gradients of sum(upstream * log-probs) in plain PyTorch, float64."""
    x, w = (t.detach().double().requires_grad_() for t in (x, w))
    (sf.reference.linear_logprobs(x, w, labels) * upstream.double()).sum().backward()
    return x.grad, w.grad


def assert_gradients(x, w, expected):
    # 1e-5 of values near 1: float32 products of 32 to 96 terms; a row of another loss would be wrong by 1.
    torch.testing.assert_close(x.grad.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), expected[1], rtol=1e-5, atol=1e-5)


def test_a_buffer_returns_when_its_last_view_dies_and_not_before():
    first = scratch(64)
    address, view = first.data_ptr(), first[3:5].t()
    del first
    assert buffers.cached_bytes() == 0
    other = scratch(64)
    assert other.data_ptr() != address
    view.fill_(7.0)
    del view
    assert scratch(64).data_ptr() == address
    assert scratch(32).data_ptr() == address, "a smaller one fits in it"


def test_what_does_not_serve_a_call_is_given_back_before_it_allocates():
    del [scratch(16)][0]
    assert buffers.cached_bytes() == 16 * KIB
    larger = scratch(64)
    assert buffers.cached_bytes() == 0
    del larger
    assert buffers.cached_bytes() == 64 * KIB


def test_the_bound_holds_for_all_idle_buffers_together():
    kept = [scratch(400), scratch(400), scratch(400)]
    addresses = [t.data_ptr() for t in kept]
    while kept:
        kept.pop(0)
        assert buffers.cached_bytes() <= KIB * KIB
    assert buffers.cached_bytes() == 800 * KIB
    assert scratch(400).data_ptr() in addresses[1:], "the oldest went"
    sf.set_cache_limit(500 * KIB)
    assert buffers.cached_bytes() == 400 * KIB
    del [scratch(501)][0]
    assert buffers.cached_bytes() == 400 * KIB, "a buffer above the bound is PyTorch's"
    sf.empty_cache()
    assert buffers.cached_bytes() == 0
    sf.set_cache_limit(0)
    del [scratch(1)][0]
    assert buffers.cached_bytes() == 0


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (1.5, TypeError), ("1GiB", TypeError), (True, TypeError)]
)
def test_a_bad_bound_is_refused(value, error):
    with pytest.raises(error, match="max_bytes: expected"):
        sf.set_cache_limit(value)


def test_a_buffer_larger_than_the_system_has_is_an_error():
    sf.set_cache_limit(2**62)
    with pytest.raises(MemoryError):
        buffers.new_scratch(LIKE, (2**50,), torch.float32)


def test_losses_alive_at_once_keep_their_own_residuals():
    """`linear_logprobs` keeps its residual in scratch until backward: three of them, used out of order."""
    losses = []
    for seed in range(3):
        x, w, labels = head(seed=seed)
        upstream = torch.randn(labels.shape, generator=torch.Generator().manual_seed(9 + seed))
        losses.append((x, w, exact(x, w, labels, upstream), (sf.linear_logprobs(x, w, labels) * upstream).sum()))
    for i in (1, 2, 0):
        losses[i][3].backward()
    for x, w, expected, _ in losses:
        assert_gradients(x, w, expected)
    del losses
    assert buffers.cached_bytes() >= 3 * 64 * 96 * 4 * 3 // 4


def test_a_kept_graph_can_be_walked_again_after_other_calls():
    x, w, labels = head()
    upstream = torch.ones(labels.shape)
    expected = exact(x, w, labels, upstream)
    loss = sf.linear_logprobs(x, w, labels).sum()
    loss.backward(retain_graph=True)
    x.grad = w.grad = None
    other = head(seed=5)
    sf.slime_loss(*other).loss.backward()
    loss.backward()
    assert_gradients(x, w, expected)


def test_several_chunks_of_bfloat16_sum_in_kept_scratch():
    """The float32 dW of the second call is the memory of the first: its first chunk must overwrite that."""
    x, w, labels = (t.detach() for t in head())
    x, w = (t.bfloat16().requires_grad_() for t in (x, w))
    grads = []
    for limit in (0, KIB * KIB, KIB * KIB):
        sf.set_cache_limit(limit)
        x.grad = w.grad = None
        sf.slime_loss(x, w, labels, workspace=24 * 96 * 2).loss.backward()
        grads.append((x.grad.clone(), w.grad.clone()))
    assert buffers.cached_bytes() >= 96 * 32 * 4
    for got in grads[1:]:
        torch.testing.assert_close(got, grads[0], rtol=1e-2, atol=1e-5)


def test_an_error_in_the_middle_loses_nothing(monkeypatch):
    x, w, labels = head()

    def fail(*args, **kwargs):
        raise RuntimeError("stop")

    with monkeypatch.context() as patch:
        patch.setattr("slime_fused.engine.products.residual_times_weight", fail)
        with pytest.raises(RuntimeError, match="stop"):
            sf.slime_loss(x, w, labels)
    gc.collect()
    assert buffers.cached_bytes() > 0, "the buffer of the failed call came back"
    out = sf.slime_loss(x, w, labels)
    out.loss.backward()
    plain = [t.detach().clone().requires_grad_() for t in (x, w)]
    sf.reference.slime_loss(*plain, labels).loss.backward()
    assert_gradients(x, w, (plain[0].grad.double(), plain[1].grad.double()))


def test_threads_never_share_a_buffer():
    """Each fills its own and looks again after the others had time to: 4 threads, sizes that serve one another."""
    wrong = []

    def work(number):
        for step in range(200):
            mine = scratch(8 + 8 * ((number + step) % 3)).fill_(number)
            view = mine[1:]
            del mine
            if not bool((view == number).all()):
                wrong.append((number, step))
            if step % 50 == number:
                sf.empty_cache()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert buffers.cached_bytes() <= KIB * KIB


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads: that is the case here
def test_a_forked_child_begins_with_an_empty_cache_and_the_same_bound():
    sf.set_cache_limit(300 * KIB)
    del [scratch(64)][0]
    pid = os.fork()
    if pid == 0:
        ok = buffers.cached_bytes() == 0 and _C.cpu.cache_limit() == 300 * KIB
        del [scratch(32)][0]
        os._exit(0 if ok and buffers.cached_bytes() == 32 * KIB else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert buffers.cached_bytes() == 64 * KIB


def test_a_small_buffer_does_not_take_a_large_mapping():
    """A residual that waits for backward would keep all of it."""
    del [scratch(400)][0]
    assert buffers.cached_bytes() == 400 * KIB
    small = scratch(100)
    assert buffers.cached_bytes() == 0, "given back, as it does not serve this call"
    del small
    assert buffers.cached_bytes() == 100 * KIB
    similar = scratch(90)
    assert buffers.cached_bytes() == 0
    del similar
    assert buffers.cached_bytes() == 100 * KIB


def test_setting_the_bound_tells_the_one_before():
    assert sf.set_cache_limit(5 * KIB) == KIB * KIB
    assert sf.set_cache_limit(KIB * KIB) == 5 * KIB
