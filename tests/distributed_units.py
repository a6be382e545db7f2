"""What `distributed_worker.py` checks of losses of units: DPO, a KTO batch, policies, over every kind of group."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import slime_fused as sf
from tests.support import Batch, assert_as_exact_as_plain, make_batch, outputs_of, pack, run
from tests.unit_loss_cases import CASES, options_of

NAMES = ("dpo", "ld_dpo", "kto", "kto_batch", "sft", "own_tokens", "grpo", "gspo")
WORKSPACES = ("1MiB", 3000, 1500)


def check_units_by_vocabulary(name: str, group: dist.ProcessGroup, bounds: tuple[int, ...], take: Any) -> None:
    """The head split: everything else is the same everywhere."""
    case, own = CASES[name], slice(*bounds[dist.get_rank(group) :][:2])

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor, **options: Any) -> Any:
        parts = {"bias": take(bias, own, group), "tp_group": group}
        return case.fused(hidden, take(weight, own, group), labels, **parts, **options)

    batch = make_batch(vocab_size=bounds[-1], has_bias=True, dtype=torch.float32)
    for workspace in WORKSPACES:
        how = {"workspace": workspace, "roundings": case.roundings}
        assert_as_exact_as_plain(call, case.plain, batch, options=options_of(case, batch), **how)


def check_units_by_tokens(name: str, group: dist.ProcessGroup, take: Any) -> None:
    """The tokens split, and with them what is given for tokens; what is given for sequences is the same."""
    case, rank = CASES[name], dist.get_rank(group)

    def call(
        hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor, cu_seqlens: Tensor, **options: Any
    ) -> Any:
        parts, own_bounds = [], [0]
        for begin, end in pairwise(cu_seqlens.tolist()):
            middle = begin + (end - begin) // 3
            parts.append(torch.arange(*((begin, middle) if rank == 0 else (middle, end))))
            own_bounds.append(own_bounds[-1] + parts[-1].numel())
        own = torch.cat(parts)

        def cut(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: cut(inner) for key, inner in value.items()}
            return value[own] if isinstance(value, Tensor) and value.shape == labels.shape else value

        out = case.fused(
            take(hidden, own, group),
            take(weight, slice(None), group),
            labels[own],
            bias=take(bias, slice(None), group),
            cu_seqlens=torch.tensor(own_bounds, dtype=torch.int32),
            cp_group=group,
            **{key: cut(value) for key, value in options.items()},
        )
        if not isinstance(out, sf.PolicyOutput):
            return out
        logps = torch.zeros(labels.shape, dtype=out.logps.dtype).index_copy_(0, own, out.logps)
        dist.all_reduce(logps, group=group)
        return sf.PolicyOutput(out.loss, out.terms, out.metrics, out.mean_logps, logps)

    batch = pack(make_batch((2, 7, 5, 2, 6, 3), prompt=0, padding=0, has_bias=True, dtype=torch.float32), drop=0)
    for workspace in WORKSPACES:
        how = {"workspace": workspace, "roundings": case.roundings}
        assert_as_exact_as_plain(call, case.plain, batch, options=options_of(case, batch), **how)


def check_units_by_pairs(name: str) -> None:
    """Process r holds r + 1 of ten pairs (of ten pairs of responses): means over the processes are the batch's."""
    case, rank, world = CASES[name], dist.get_rank(), dist.get_world_size()
    whole = make_batch(tuple(2 + (3 * i) % 7 for i in range(20)), vocab_size=31)
    options = options_of(case, whole)
    truth = run(case.plain, whole, wanted=("hidden", "weight"), **options)
    first = rank * (rank + 1) // 2
    pairs = torch.arange(first, first + rank + 1)
    rows = torch.cat([pairs, pairs + 10])

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(inner) for key, inner in value.items()}
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        return value[pairs] if value.shape[0] == 10 else value[rows]

    leaves = whole.leaves(("hidden", "weight"))
    own = Batch(leaves.hidden[rows], leaves.weight, whole.labels[rows])
    out = own.call(case.fused, dp_group=dist.group.WORLD, **{k: cut(v) for k, v in options.items()})
    out.loss.backward()
    outputs = outputs_of(out)
    for got, expected in (
        *((outputs[key].detach().clone(), truth.outputs[key]) for key in ("loss", *out.terms, *out.metrics)),
        (leaves.hidden.grad, truth.grads["hidden"]),
        (leaves.weight.grad, truth.grads["weight"]),
    ):
        dist.all_reduce(got)
        torch.testing.assert_close(got / world, expected, rtol=1e-12, atol=1e-13)


def checks(take: Any, bounds: tuple[int, ...]) -> dict[str, Callable[[Any], None]]:
    """By name; each is called with the worker's groups. ``take`` is the worker's: a part of a tensor."""
    return {
        **{
            f"vocabulary-{name}": lambda groups, n=name: check_units_by_vocabulary(n, groups.all, bounds, take)
            for name in NAMES
        },
        **{f"tokens-{name}": lambda groups, n=name: check_units_by_tokens(n, groups.row, take) for name in NAMES},
        # KTO's baseline of a batch is each process's own.
        **{f"batch-{name}": lambda _, n=name: check_units_by_pairs(n) for name in NAMES if name != "kto_batch"},
    }
