"""Where the time of one step goes, by PyTorch's profiler: with one chunk, and with two.

    python -m bench.micro.profile_step --out profile.json

A warm step (forward and backward of `slime_loss`) of the headline case is profiled with the largest workspace that
gives one chunk, and the largest that gives two; where one chunk is always leaner than two, on twice the tokens.
Written are `profile.json` (the plan, every kernel's and every operator's time, the calls) and beside it
`profile.txt` (the tables).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import HEADLINE, QUICK_CASES, Case, make_data
from bench.contestants import Step, planned
from bench.micro.common import Report, parser, synchronize, within
from bench.observe import observed_backends, plan_record
from bench.registry import CONTESTANTS
from slime_fused.engine.plan import Plan

_SHOWN_ROWS = 40


@dataclass(frozen=True)
class Profiled:
    """A case whose workspace gives a plan of so many chunks."""

    case: Case
    plan: Plan


def with_chunks(case: Case, chunks: int, device: torch.device) -> Profiled | None:
    """The case at the largest workspace (of a few) whose plan has that many chunks; None where none has."""
    # A little more than the rows take, for their padding.
    whole = case.valid_tokens * (case.vocab + 8) * case.torch_dtype.itemsize
    # The planner looks at shapes and labels alone: no numbers are needed to ask it.
    data = make_data(case.but(hidden=1, vocab=2), device)
    hidden, weight = (
        torch.empty(1, dtype=case.torch_dtype, device=device).expand(rows, case.hidden).requires_grad_()
        for rows in (case.tokens, case.vocab)
    )
    for part in range(1, 7):
        sized = case.but(workspace=whole // part)
        plan = planned("slime", "auto", None)(sized, replace(data, hidden=hidden, weight=weight))
        if len(plan.chunks) == chunks and plan.kind == "stream":
            return Profiled(sized, plan)
    return None


def events_of(profiler: profile, device: torch.device) -> list[dict[str, Any]]:
    """Every kernel and operator of the profile: self time on the device and on the host, in microseconds."""
    events = []
    for event in profiler.key_averages():
        events.append(
            {
                "name": event.key,
                "calls": event.count,
                "device_us": event.self_device_time_total if device.type == "cuda" else 0.0,
                "host_us": event.self_cpu_time_total,
            }
        )
    events.sort(key=lambda event: -max(event["device_us"], event["host_us"]))
    return events


def profile_step(step: Step, device: torch.device) -> tuple[profile, set[str]]:
    """One profiled step after two that are not; and the backends that it ran on."""
    for _ in range(2):
        step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    synchronize(device)
    with observed_backends() as seen, profile(activities=activities, acc_events=True) as profiler:
        step()
        synchronize(device)
    return profiler, seen


def main(argv: Sequence[str] | None = None) -> int:
    """Profile both."""
    args = parser(__doc__).parse_args(argv)
    device = torch.device(args.device)
    case = HEADLINE if device.type == "cuda" else QUICK_CASES[0]
    report = Report(args.out, device)
    sort = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    texts = []
    for chunks in within(args.seconds, report, (1, 2)):
        twice = case.but(tokens=2 * case.tokens, pairs=2 * case.pairs)
        profiled = with_chunks(case, chunks, device) or with_chunks(twice, chunks, device)
        if profiled is None:
            report.add({"chunks": chunks, "note": f"no workspace gives {chunks} chunks"})
            continue
        data = make_data(profiled.case, device)
        profiler, seen = profile_step(CONTESTANTS["slime_fused"].prepare(profiled.case, data), device)
        report.add(
            {
                "chunks": chunks,
                "case": asdict(profiled.case),
                "backends": sorted(seen),
                "plan": plan_record(profiled.plan),
                "events": events_of(profiler, device),
            }
        )
        table = profiler.key_averages().table(sort_by=sort, row_limit=_SHOWN_ROWS, max_name_column_width=70)
        texts.append(f"== {chunks} chunks, on {', '.join(sorted(seen))}\n{profiled.plan}\n{table}")
        if args.out is not None:
            args.out.with_suffix(".txt").write_text("\n\n".join(texts) + "\n")
        print(texts[-1])
        del data
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
