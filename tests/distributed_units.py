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


def check_a_process_without_tokens(_: Any) -> None:
    """One process holds no label of the batch: its loss is 0, and the mean over the processes is the batch's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = make_batch((4, 3, 5, 2), prompt=0, padding=0)
    truth = run(sf.reference.preference_loss, whole, wanted=("hidden", "weight"), loss=sf.losses.SFT())
    leaves = whole.leaves(("hidden", "weight"))
    labels = whole.labels if rank == 0 else torch.full_like(whole.labels, -100)
    own = Batch(leaves.hidden, leaves.weight, labels)
    loss = own.call(sf.preference_loss, loss=sf.losses.SFT(), dp_group=dist.group.WORLD).loss
    loss.backward()
    for got, expected in (
        (loss.detach().clone(), truth.outputs["loss"]),
        (leaves.hidden.grad, truth.grads["hidden"]),
        (leaves.weight.grad, truth.grads["weight"]),
    ):
        dist.all_reduce(got)
        torch.testing.assert_close(got / world, expected, rtol=1e-12, atol=1e-13)


def check_shapes_that_tell_one_process_less(group: dist.ProcessGroup) -> None:
    """The first process holds as many rows as there are pairs, or sequences: what is given for these is theirs."""
    rank = dist.get_rank(group)

    def weighed(pairs: sf.losses.Pairs) -> Tensor:
        return (pairs.rejected_mean_logps - pairs.chosen_mean_logps) * pairs.given["per_pair"]

    def by_sequence(sequences: sf.losses.Sequences) -> Tensor:
        return -sequences.mean_over_tokens(sequences.logps * sequences.given["per_token"])

    batch = pack(make_batch((3, 2, 4, 3), prompt=0, padding=0), drop=0)
    bounds = batch.cu_seqlens.tolist()
    per_token = torch.linspace(0.5, 2, bounds[-1], dtype=torch.float64)
    numbers = torch.tensor([1.0, 5.0], dtype=torch.float64)
    whole_of = sf.losses.Own(by_sequence, unit="sequence")
    for held, loss, of_units, of_tokens in (
        ((1, 0, 1, 0), sf.losses.SimPO(), {"loss_weights": numbers}, {}),
        ((1, 0, 1, 0), sf.losses.Own(weighed), {"per_pair": numbers}, {}),
        ((1, 1, 1, 1), whole_of, {}, {"per_token": per_token}),
    ):
        parts = [
            range(begin, begin + held[s]) if rank == 0 else range(begin + held[s], end)
            for s, (begin, end) in enumerate(pairwise(bounds))
        ]
        own = torch.tensor([row for part in parts for row in part])
        own_bounds = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).to(torch.int32)
        options = {name: value for name, value in of_units.items() if name == "loss_weights"}
        extra = {name: value for name, value in of_units.items() if name != "loss_weights"}
        out = sf.preference_loss(
            batch.hidden[own],
            batch.weight,
            batch.labels[own],
            loss=loss,
            cu_seqlens=own_bounds,
            cp_group=group,
            extra={**extra, **{name: value[own] for name, value in of_tokens.items()}},
            **options,
        )
        expected = batch.call(sf.reference.preference_loss, loss=loss, extra={**extra, **of_tokens}, **options)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(out.mean_logps, expected.mean_logps, rtol=1e-12, atol=1e-13)


def checks(take: Any, bounds: tuple[int, ...]) -> dict[str, Callable[[Any], None]]:
    """By name; each is called with the worker's groups. ``take`` is the worker's: a part of a tensor."""
    return {
        **{
            f"vocabulary-{name}": lambda groups, n=name: check_units_by_vocabulary(n, groups.all, bounds, take)
            for name in NAMES
        },
        **{f"tokens-{name}": lambda groups, n=name: check_units_by_tokens(n, groups.row, take) for name in NAMES},
        "batch-without-tokens": check_a_process_without_tokens,
        "tokens-coinciding": lambda groups: check_shapes_that_tell_one_process_less(groups.row),
        # KTO's baseline of a batch is each process's own.
        **{f"batch-{name}": lambda _, n=name: check_units_by_pairs(n) for name in NAMES if name != "kto_batch"},
    }
