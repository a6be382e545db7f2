"""One of four gloo processes that share losses; `test_distributed.py` starts them and reads what each found.

Every process builds the same whole batch, takes its part, and calls the loss with the group. Backward of taking a
part adds the parts' gradients up, so that each process ends with the gradients of the whole batch, and each judges
them by the same standard as a single process: no worse than plain PyTorch against float64.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import slime_fused as sf
from slime_fused import reference
from tests import distributed_units
from tests.distributed_stats import statistics_checks
from tests.support import Batch, assert_as_exact_as_plain, assert_close, make_batch, pack, run

PROCESSES = 4
VOCAB_BOUNDS = (0, 40, 41, 80, 103)
"""Rows of the head by process, unequal: one has a single row."""


class Part(torch.autograd.Function):
    """``whole[index]``; the gradients of all parts are added up."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, index: Any, group: dist.ProcessGroup) -> Tensor:
        ctx.index, ctx.group, ctx.like = index, group, whole
        return whole[index].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        whole = torch.zeros_like(ctx.like)
        whole[ctx.index] = grad
        dist.all_reduce(whole, group=ctx.group)
        return whole, None, None


def take(whole: Tensor | None, index: Any, group: dist.ProcessGroup) -> Tensor | None:
    return None if whole is None else Part.apply(whole, index, group)


class Groups:
    """All four processes; and a grid of two by two."""

    def __init__(self) -> None:
        rank = dist.get_rank()
        self.all = dist.group.WORLD
        pairs = {
            name: [dist.new_group(ranks) for ranks in grid]
            for name, grid in (("rows", [(0, 1), (2, 3)]), ("columns", [(0, 2), (1, 3)]))
        }
        self.row, self.column = pairs["rows"][rank // 2], pairs["columns"][rank % 2]
        self.foreign = pairs["rows"][1 - rank // 2]


def shard_vocabulary(
    function: Callable[..., Any], group: dist.ProcessGroup, bounds: tuple[int, ...]
) -> Callable[..., Any]:
    """``function`` of a batch whose head the group holds together."""
    rank = dist.get_rank(group)
    own = slice(bounds[rank], bounds[rank + 1])

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, **options: Any) -> Any:
        return function(
            hidden, take(weight, own, group), labels, bias=take(bias, own, group), tp_group=group, **options
        )

    return call


def shard_tokens(function: Callable[..., Any], group: dist.ProcessGroup) -> Callable[..., Any]:
    """``function`` of a packed batch of whose sequences the group's first process holds about the first third."""
    rank = dist.get_rank(group)

    def call(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        cu_seqlens: Tensor,
        **options: Any,
    ) -> Any:
        bounds = cu_seqlens.tolist()
        parts, own_bounds = [], [0]
        for begin, end in pairwise(bounds):
            middle = begin + (end - begin) // 3
            parts.append(torch.arange(*((begin, middle) if rank == 0 else (middle, end))))
            own_bounds.append(own_bounds[-1] + parts[-1].numel())
        own = torch.cat(parts)
        return function(
            take(hidden, own, group),
            take(weight, slice(None), group),
            labels[own],
            bias=take(bias, slice(None), group),
            cu_seqlens=torch.tensor(own_bounds, dtype=torch.int32),
            cp_group=group,
            **options,
        )

    return call


def batch_of(dtype: torch.dtype, **options: Any) -> Batch:
    return make_batch(vocab_size=VOCAB_BOUNDS[-1], dtype=dtype, has_bias=True, **options)


def check_vocabulary(groups: Groups, function: str, dtype: torch.dtype, workspace: Any, **options: Any) -> None:
    fused = shard_vocabulary(getattr(sf, function), groups.all, VOCAB_BOUNDS)
    upstream = torch.linspace(-1, 2, 54).reshape(6, 9) if function == "linear_logprobs" else 1.0
    assert_as_exact_as_plain(
        fused,
        getattr(reference, function),
        batch_of(dtype),
        options=options,
        upstream=upstream,
        workspace=workspace,
    )


def check_float32_logits(groups: Groups) -> None:
    """Statistics are merged block by block; an error is that of float32, where rounded logits would err by 0.1."""
    batch = batch_of(torch.bfloat16, spread=30.0)
    fused = shard_vocabulary(sf.linear_logprobs, groups.all, VOCAB_BOUNDS)
    truth = run(reference.linear_logprobs, batch.to(torch.float64))
    plain = run(reference.linear_logprobs, batch, logits_dtype=torch.float32)
    for workspace in WORKSPACES.values():
        got = run(fused, batch, workspace=workspace, logits_dtype=torch.float32)
        exact = truth.outputs["value"]
        assert (got.outputs["value"].double() - exact).abs().max() <= 1e-6 * exact.abs().max()
        for name, grad in got.grads.items():
            assert_close(name, grad, plain.grads[name], truth.grads[name], torch.finfo(torch.bfloat16).eps)


def check_frozen_head(groups: Groups) -> None:
    fused = shard_vocabulary(sf.slime_loss, groups.all, VOCAB_BOUNDS)
    assert_as_exact_as_plain(
        fused, reference.slime_loss, batch_of(torch.float32), options={}, wanted=("hidden",), workspace="1KiB"
    )


def check_tokens(groups: Groups, dtype: torch.dtype, workspace: Any, reduction: str) -> None:
    fused = shard_tokens(sf.slime_loss, groups.row)
    config = sf.SlimeLossConfig(stabilizer_reduction=reduction)
    # The shortest response has two tokens and the padding is labelled too: the first process holds none of some.
    batch = pack(batch_of(dtype, prompt=0, padding=0, lengths=(2, 7, 5, 2, 6, 3)), drop=0)
    assert_as_exact_as_plain(fused, reference.slime_loss, batch, options={"config": config}, workspace=workspace)


def check_all_tokens_on_one_process(groups: Groups) -> None:
    """The others hold no row of any chunk, and still take part."""

    def call(
        hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor, cu_seqlens: Tensor, **options: Any
    ) -> Any:
        own = slice(None) if dist.get_rank(groups.row) == 0 else slice(0, 0)
        bounds = cu_seqlens if dist.get_rank(groups.row) == 0 else torch.zeros_like(cu_seqlens)
        whole = slice(None)
        return sf.slime_loss(
            take(hidden, own, groups.row),
            take(weight, whole, groups.row),
            labels[own],
            bias=take(bias, whole, groups.row),
            cu_seqlens=bounds,
            cp_group=groups.row,
            **options,
        )

    for workspace in WORKSPACES.values():
        batch = pack(batch_of(torch.float32))
        assert_as_exact_as_plain(call, reference.slime_loss, batch, options={}, workspace=workspace)


def check_vocabulary_and_tokens(groups: Groups) -> None:
    by_tokens = shard_tokens(sf.slime_loss, groups.column)
    fused = shard_vocabulary(by_tokens, groups.row, (0, 60, 103))
    batch = pack(batch_of(torch.float32, prompt=1))
    assert_as_exact_as_plain(fused, reference.slime_loss, batch, options={}, workspace="2KiB")


def check_batch(groups: Groups, reduction: str) -> None:
    """Process r holds r + 1 of ten pairs; the mean over the processes is the whole batch's loss and gradient."""
    lengths = tuple(2 + (3 * i) % 7 for i in range(20))
    whole = make_batch(lengths, dtype=torch.float64, vocab_size=31)
    config = sf.SlimeLossConfig(stabilizer_reduction=reduction)
    truth = run(reference.slime_loss, whole, config=config, wanted=("hidden", "weight"))
    rank = dist.get_rank()
    first = rank * (rank + 1) // 2
    rows = [side + i for side in (0, 10) for i in range(first, first + rank + 1)]
    leaves = whole.leaves(("hidden", "weight"))
    loss = sf.slime_loss(
        leaves.hidden[rows], leaves.weight, whole.labels[rows], config=config, dp_group=groups.all
    ).loss
    loss.backward()
    for got, expected in (
        (loss.detach(), truth.outputs["loss"]),
        (leaves.hidden.grad, truth.grads["hidden"]),
        (leaves.weight.grad, truth.grads["weight"]),
    ):
        dist.all_reduce(got)
        torch.testing.assert_close(got / PROCESSES, expected, rtol=1e-12, atol=1e-14)


def check_same_bits_on_every_process(groups: Groups) -> None:
    fused = shard_vocabulary(sf.slime_loss, groups.all, VOCAB_BOUNDS)
    got = run(fused, batch_of(torch.float32), wanted=("hidden",))
    for value in (*got.outputs.values(), *got.grads.values()):
        others = [torch.empty_like(value) for _ in range(PROCESSES)]
        dist.all_gather(others, value.contiguous())
        assert all(torch.equal(value, other) for other in others)


def check_documented_example(groups: Groups) -> None:
    """The code of docs/distributed.md on a mesh of two by two: both halves of the batch, both of the head."""
    text = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    whole = make_batch(dtype=torch.float64, vocab_size=31, lengths=(4, 3, 5, 2, 6, 3, 7, 4))
    truth = run(reference.slime_loss, whole, wanted=("hidden", "weight"))
    half = dist.get_rank() // 2
    rows = [side + 2 * half + i for side in (0, 4) for i in (0, 1)]
    hidden = whole.hidden[rows].requires_grad_()
    names: dict[str, Any] = {
        "device_type": "cpu",
        "hidden": hidden,
        "weight": whole.weight,
        "labels": whole.labels[rows],
    }
    exec(code, names)
    torch.testing.assert_close(hidden.grad, 2 * truth.grads["hidden"][rows])
    shard_grad = names["shard"].grad
    dist.all_reduce(shard_grad, group=groups.column)
    torch.testing.assert_close(shard_grad, 2 * truth.grads["weight"].chunk(2)[dist.get_rank() % 2])


def check_compiled(groups: Groups) -> None:
    """A compiled graph carries the group by name."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Tensor:
        return sf.slime_loss(hidden, weight, labels, bias=bias, tp_group=groups.all).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    own = slice(*VOCAB_BOUNDS[dist.get_rank() :][:2])
    results = []
    for function in (loss, compiled):
        leaves = batch_of(torch.float32).leaves()
        assert leaves.bias is not None
        value = function(leaves.hidden, leaves.weight[own], leaves.labels, leaves.bias[own])
        value.backward()
        results.append((value.detach(), leaves.hidden.grad, leaves.weight.grad, leaves.bias.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def raised(error: type[Exception], function: Callable[..., Any], batch: Batch, **options: Any) -> str:
    try:
        batch.call(function, **options)
    except error as caught:
        return str(caught)
    raise AssertionError(f"no {error.__name__}")


def check_refusals(groups: Groups) -> None:
    rank = dist.get_rank()
    batch = batch_of(torch.float32)
    message = raised(TypeError, sf.slime_loss, batch, tp_group="tensor")
    assert message.startswith("tp_group: expected a torch.distributed.ProcessGroup"), message
    message = raised(TypeError, sf.slime_loss, batch, dp_group=groups.foreign)
    assert message.startswith("dp_group: expected a torch.distributed.ProcessGroup that holds this process"), (
        message
    )
    message = raised(ValueError, sf.slime_loss, batch, cp_group=groups.row, shift=True)
    assert message.startswith("shift: expected False with cp_group"), message

    empty = Batch(batch.hidden, batch.weight[: 50 * (rank % 2)], batch.labels)
    message = raised(ValueError, sf.slime_loss, empty, tp_group=groups.row)
    assert message == "weight: expected at least one row on every process of tp_group, got [0, 50]", message
    shorter = batch_of(torch.float32, padding=1 + rank % 2)
    message = raised(ValueError, sf.slime_loss, shorter, tp_group=groups.row)
    assert message == "hidden: expected as many rows on every process of tp_group, got [54, 60]", message

    labels = batch.labels.clone()
    if rank % 2:
        labels[0, 3] = 1000
    bad = Batch(batch.hidden, batch.weight, labels)
    message = raised(ValueError, sf.slime_loss, bad, cp_group=groups.row)
    expected = "got 1000 at position (0, 3)" if rank % 2 else "process 1 of the group were refused there"
    assert expected in message, message

    fewer = batch if rank % 2 else Batch(batch.hidden[:4], batch.weight, batch.labels[:4])
    message = raised(ValueError, sf.slime_loss, fewer, cp_group=groups.row)
    assert message == "labels: expected as many sequences on every process of cp_group, got [4, 6]", message

    fewer = batch if rank % 2 else Batch(batch.hidden[:3], batch.weight, batch.labels[:3])
    message = raised(ValueError, sf.slime_loss, fewer, cp_group=groups.row)
    assert message == "labels: expected as many sequences on every process of cp_group, got [3, 6]", message

    wanted = batch.leaves(("hidden", "weight") if rank % 2 else ("weight",))
    for name in ("tp_group", "cp_group"):
        message = raised(ValueError, sf.slime_loss, wanted, **{name: groups.row})
        expected = "requires_grad: expected the same of hidden, weight and bias (bits 1, 2, 4) on every process of "
        assert message == f"{expected}{name}, got [2, 3]", message

    labels = batch.labels.clone()
    labels[2, 3] += rank % 2
    message = raised(ValueError, sf.slime_loss, Batch(batch.hidden, batch.weight, labels), tp_group=groups.row)
    assert message.startswith("labels: expected the same ones (a checksum) on every process of tp_group"), message

    # Each process may lack a response; that all of them lack it is an error.
    labels = batch.labels.clone()
    labels[1] = -100
    message = raised(ValueError, sf.slime_loss, Batch(batch.hidden, batch.weight, labels), cp_group=groups.row)
    assert "got none in row 1" in message, message


FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
WORKSPACES = {"one_chunk": "1MiB", "several": 30 * 104 * 4, "resweep": 4 * 104 * 4}
CHECKS: dict[str, Callable[[Groups], None]] = {
    **{
        f"vocabulary-{function}-{dtype}-{size}": (
            lambda groups, f=function, d=FLOATS[dtype], w=workspace, o=options: check_vocabulary(
                groups, f, d, w, **o
            )
        )
        for function, options in (
            ("slime_loss", {"logit_softcap": 5.0, "logit_scale": 1.5}),
            ("linear_logprobs", {}),
            ("linear_cross_entropy", {"label_smoothing": 0.1, "z_loss": 0.01}),
        )
        for dtype in FLOATS
        for size, workspace in WORKSPACES.items()
    },
    **statistics_checks(shard_vocabulary, VOCAB_BOUNDS, FLOATS, WORKSPACES),
    "vocabulary-frozen": check_frozen_head,
    "vocabulary-float32_logits": check_float32_logits,
    "vocabulary-same_bits": check_same_bits_on_every_process,
    "vocabulary-compiled": check_compiled,
    **{
        f"tokens-{reduction}-{dtype}-{size}": (
            lambda groups, r=reduction, d=FLOATS[dtype], w=workspace: check_tokens(groups, d, w, r)
        )
        for reduction in ("sequence", "token")
        for dtype in FLOATS
        for size, workspace in WORKSPACES.items()
    },
    "tokens-all_on_one": check_all_tokens_on_one_process,
    "vocabulary_and_tokens": check_vocabulary_and_tokens,
    "documented_example": check_documented_example,
    "batch-sequence": lambda groups: check_batch(groups, "sequence"),
    "batch-token": lambda groups: check_batch(groups, "token"),
    **distributed_units.checks(take, VOCAB_BOUNDS),
    "refusals": check_refusals,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups = Groups()
    findings: dict[str, str] = {}
    for name, check in CHECKS.items():
        try:
            check(groups)
            findings[name] = ""
        except Exception:
            findings[name] = traceback.format_exc()[-3000:]
        (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(findings))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # About one run in ten, gloo's process group waits for its threads forever in its destructor.
