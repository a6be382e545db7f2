"""Runs the CPU kernels of a sanitizer build on numpy buffers: ``python sanitized_run.py <folder of _C> <mode>``.

Every buffer is larger than 1 KiB, because numpy keeps smaller ones in a cache of its own, where no sanitizer sees
their ends, and is exactly as large as the call needs. Modes: ``clean`` runs everything; ``small_buffer`` passes an
output one row too short; ``shared_output`` lets two threads write one buffer at once.
"""

import sys
import threading

import numpy as np

sys.path.insert(0, sys.argv[1])
import _C

ROWS = 301
ITEM_TYPES = {0: np.float32, 1: np.uint16, 2: np.float16, 3: np.float64}  # bf16 as its bits


def address(array):
    """Address of a buffer, 0 for None."""
    return 0 if array is None else array.ctypes.data


def logits_buffer(dtype, rows, cols, seed):
    """Random logits with a few -inf among them."""
    values = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    values[::7, cols // 2] = -np.inf
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == 1 else values.astype(ITEM_TYPES[dtype])


def row_kernels(dtype, cols, softcap, threads, short_out=0, out_dtype=None):
    """All three logits kernels on one block: plain, or with bias, cap, temperature, z-loss and entropy."""
    out_dtype = dtype if out_dtype is None else out_dtype
    acc = np.float64 if dtype == 3 else np.float32
    logits = logits_buffer(dtype, ROWS, cols, cols)
    bias = logits_buffer(dtype, 1, max(cols, 1024), 1)[0, -cols:].copy() if softcap else None
    out = np.empty((ROWS - short_out) * cols, dtype=ITEM_TYPES[out_dtype])
    labels = np.random.default_rng(2).integers(-1, cols, ROWS)
    logp, loss, row_max, row_sum, label_logit, logit_sum = (np.ones(ROWS, dtype=acc) for _ in range(6))
    moments = {name: np.ones(ROWS, dtype=acc) for name in ("centred_sum", "square_sum", "max_before")}
    head = {
        "labels": address(labels), "bias": address(bias), "scale": 1.5 if softcap else 1.0, "softcap": softcap,
        "temperature": 0.7 if softcap else 1.0,
    }  # fmt: skip
    token_loss = {"label_smoothing": 0.1 if softcap else 0.0, "z_loss": 1e-3 if softcap else 0.0}
    block = {
        "logits": address(logits), "rows": ROWS, "cols": cols, "logits_stride": cols, "dtype": dtype, **head,
        "num_threads": threads,
    }  # fmt: skip
    written = {"out": address(out), "out_stride": cols, "out_dtype": out_dtype, **token_loss}
    stats = {"row_max": address(row_max), "row_sum": address(row_sum), "logp": address(logp)}
    _C.cpu.softmax_residual(**block, **written, **stats, loss=address(loss))
    for merge in (False, True):
        _C.cpu.logits_stats(
            **block, col_offset=0, merge=merge, row_max=stats["row_max"], row_sum=stats["row_sum"],
            label_logit=address(label_logit), logit_sum=address(logit_sum),
            **{name: address(array) if softcap else 0 for name, array in moments.items()},
        )  # fmt: skip
    _C.cpu.residual_from_stats(
        **block, **written, **stats, col_offset=0, vocab_size=cols, row_scale=address(loss),
        entropy=address(logit_sum) if softcap else 0, entropy_scale=address(loss) if softcap else 0,
    )  # fmt: skip


def segment_kernels(acc, dtype, threads):
    """Sums, their backward and the SLIME terms of 300 segments, some of them empty."""
    lengths = np.random.default_rng(3).integers(0, 40, 300)
    cu_seqlens = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    tokens = int(cu_seqlens[-1])
    logp, d_logp = -np.random.default_rng(4).random(tokens).astype(acc), np.empty(tokens, dtype=acc)
    sums = np.empty(300, dtype=acc)
    shared = {"cu_seqlens": address(cu_seqlens), "segments": 300, "tokens": tokens, "dtype": dtype}
    for mean in (False, True):
        options = {**shared, "mean": mean, "num_threads": threads}
        _C.cpu.segment_sum(values=address(logp), out=address(sums), **options)
        _C.cpu.segment_sum_backward(d_out=address(sums), d_values=address(d_logp), **options)
    outputs = {
        name: np.empty(150, dtype=np.float64)  # above 1 KiB also where only half of it is used
        for name in ("chosen_logps", "rejected_logps", "anchor", "margin_loss", "stabilizer")
    }
    _C.cpu.slime_terms(
        logp=address(logp), **shared, lambda_w=0.1, lambda_l=0.1, lambda_d=1.0, delta=1.25, margin_hard=1.5,
        margin_soft=1.0, kappa=2.5, power=2.5, pair_weight=1 / 150, token_weight=0.0, d_logp=address(d_logp),
        num_threads=threads, **{name: address(array) for name, array in outputs.items()},
    )  # fmt: skip


def scratch_buffers(number):
    """Buffers that come and go while other threads bound and empty the cache: each keeps what was written."""
    for step in range(50):
        size = 4096 * (1 + (number + step) % 3)
        buffer = np.frombuffer(_C.cpu.Scratch(size), dtype=np.uint8)
        assert buffer.shape == (size,)
        buffer.fill(number)
        _C.cpu.set_cache_limit(4096 * (step % 4))
        assert _C.cpu.cached_bytes() <= 4096 * 3
        if step % 10 == number:
            _C.cpu.empty_cache()
        assert (buffer == number).all()


def clean():
    """Everything, from three Python threads at once, each call on up to three native threads."""

    def work(number):
        scratch_buffers(number)
        for dtype in ITEM_TYPES:
            for cols, softcap in ((5, 0.0), (5, 8.0), (131, 8.0), (1003, 0.0), (1003, 8.0)):
                row_kernels(dtype, cols, softcap, threads=3)
                if dtype in (1, 2):
                    row_kernels(0, cols, softcap, threads=3, out_dtype=dtype)
        segment_kernels(np.float32, 0, threads=3)
        segment_kernels(np.float64, 3, threads=3)

    for isa in _C.cpu.runnable_isas():
        _C.cpu.use_isa(isa)
        callers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()


def small_buffer():
    """The fault an address sanitizer must find."""
    row_kernels(0, 131, 0.0, threads=1, short_out=1)


def shared_output():
    """The fault a thread sanitizer must find: two calls that overlap in time and write the same sums."""
    values, out = np.ones(2_000_000), np.empty(1000)
    cu_seqlens = np.arange(0, 2_000_001, 2000, dtype=np.int32)
    start = threading.Barrier(2)

    def work():
        start.wait()
        for _ in range(20):
            _C.cpu.segment_sum(address(values), address(cu_seqlens), 1000, 2_000_000, address(out), 3, False, 1)

    callers = [threading.Thread(target=work) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()


{"clean": clean, "small_buffer": small_buffer, "shared_output": shared_output}[sys.argv[2]]()
print(sys.argv[2], "done")
