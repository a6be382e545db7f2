"""In which order the GPU benchmark takes its rows: what a target is read off first, then what explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.cases import ALL_CASES, GPU_CASES, HEADLINE, HEADLINES, QUICK_CASES, Case
from bench.contestants import OURS_SMALL
from bench.results import OK, Row
from bench.runner import GPU_PROTOCOL, HEADLINE_PROTOCOL, Protocol

STAGES = ("headline", "rows")

_OURS = ("slime_fused", "slime_fused-auto")
_OURS_MORE = ("slime_fused-256MiB", "slime_fused-logps", "ce-slime_fused", "dpo-slime_fused", "simpo-slime_fused")
# The strongest first. Those that are not installed cost nothing: no process is started for them.
_PEERS_FAST = (
    "ce-quack",
    "ce-liger-sm90",
    "liger-scaled",
    "trl-fused-head",
    "unsloth-logps",
    "rl-kernel",
)
_PEERS_MORE = ("cce", "cce-exact", "liger-ce-none", "ce-liger")
# DPO and SimPO beside this package's: first the peers, then plain PyTorch.
_PREFERENCES = ("dpo-trl-fused-head", "dpo-liger", "simpo-liger", "simpo-trl-fused-head", "dpo-naive")
_PREFERENCES_MORE = ("simpo-naive", "dpo-naive-compiled", "simpo-naive-compiled")
_BASELINE = ("naive-no-upcast", "naive", "naive-cross-entropy", "torch-linear-ce", "ce-naive", "ce-torch-linear")
_BACKENDS = (
    "slime_fused-cuda",
    "slime_fused-triton",
    "slime_fused-torch",
    *(contestant.name for contestant in OURS_SMALL),
)
_SHORT = ("slime_fused", "slime_fused-auto", "naive", "trl-fused-head")
_PEERS_SHORT = ("cce", "liger-ce-none", "dpo-liger", "dpo-slime_fused", "simpo-liger", "simpo-slime_fused")


@dataclass(frozen=True)
class Heat:
    """Cases and contestants that are run next."""

    cases: tuple[Case, ...]
    contestants: tuple[str, ...]
    protocol: Protocol = GPU_PROTOCOL


def headline_heats() -> tuple[Heat, ...]:
    """This package and the bare products, on the shapes of published tables."""
    return (Heat(HEADLINES, _OURS, HEADLINE_PROTOCOL),)


def row_heats() -> tuple[Heat, ...]:
    """Every other row, most important first."""
    others = tuple(case for case in GPU_CASES if case not in HEADLINES)
    return (
        Heat((HEADLINE,), _OURS_MORE),
        Heat((HEADLINE,), _PEERS_FAST),
        Heat((HEADLINE,), _BASELINE),
        Heat(HEADLINES[1:3], ("ce-slime_fused", *_PEERS_FAST)),
        Heat((HEADLINE,), _PREFERENCES),
        Heat(others[:5], _OURS),
        Heat((HEADLINE,), _BACKENDS),
        Heat((HEADLINE,), (*_PEERS_MORE, "naive-compiled")),
        Heat(HEADLINES[3:], (*_PEERS_FAST[:4], "naive-no-upcast")),
        Heat(others[:5], _SHORT[2:]),
        Heat(others[5:], _SHORT),
        Heat(others[:5], _PEERS_SHORT),
        Heat((HEADLINE,), _PREFERENCES_MORE),
        Heat((HEADLINE,), ("ce-quack-tuned",)),
    )


def stage_heats(stage: str | None) -> tuple[Heat, ...]:
    """The heats of one stage, or of both."""
    if stage == "headline":
        return headline_heats()
    return row_heats() if stage == "rows" else (*headline_heats(), *row_heats())


def toy_heats(stage: str | None) -> tuple[Heat, ...]:
    """The same stages on problems of milliseconds, with few contestants: for a machine without a GPU."""
    heats = {
        "headline": (Heat(QUICK_CASES[:2], _OURS, replace(HEADLINE_PROTOCOL, memory=False)),),
        "rows": (Heat(QUICK_CASES[:1], ("naive", "ce-quack"), replace(GPU_PROTOCOL, memory=False)),),
    }
    return heats[stage] if stage else (*heats["headline"], *heats["rows"])


def selected(heats: Sequence[Heat], cases: Sequence[str], contestants: Sequence[str]) -> tuple[Heat, ...]:
    """The heats restricted to the names given; an empty selection restricts nothing."""
    if cases and contestants:
        return (Heat(tuple(ALL_CASES[name] for name in cases), tuple(contestants)),)
    kept = (
        replace(
            heat,
            cases=tuple(case for case in heat.cases if not cases or case.name in cases),
            contestants=tuple(name for name in heat.contestants if not contestants or name in contestants),
        )
        for heat in heats
    )
    return tuple(heat for heat in kept if heat.cases and heat.contestants)


def remaining(heats: Sequence[Heat], rows: Sequence[Row]) -> tuple[Heat, ...]:
    """The heats without the contestants and cases that earlier rows have measured throughout."""
    measured = {(row.case, row.contestant) for row in rows if row.status == OK}
    left = []
    for heat in heats:
        names = tuple(
            name for name in heat.contestants if any((case.name, name) not in measured for case in heat.cases)
        )
        cases = tuple(case for case in heat.cases if any((case.name, name) not in measured for name in names))
        if cases:
            left.append(replace(heat, cases=cases, contestants=names))
    return tuple(left)
