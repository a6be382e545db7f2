"""Losses of units, with what each is given: shared by the tests of `preference_loss` and `token_policy_loss`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import slime_fused as sf
from slime_fused.engine.plan import Plan
from slime_fused.losses import (
    CPO,
    DPO,
    KTO,
    ORPO,
    SFT,
    AlphaPO,
    Own,
    Pairs,
    PolicyGradient,
    Sequences,
    SimPO,
    Slime,
    Tokens,
    UnitTerms,
)
from tests.support import Batch


def own_pairs(pairs: Pairs) -> Tensor:
    """A hinge on the margin, with an offset of each pair's own."""
    margins = pairs.chosen_mean_logps - pairs.rejected_mean_logps
    return torch.relu(1 - margins - pairs.given["offset"]) - 0.1 * pairs.chosen_mean_logps * pairs.given["level"]


def own_batch(pairs: Pairs) -> Tensor:
    """Every pair against the mean of all."""
    margins = pairs.chosen_mean_logps - pairs.rejected_mean_logps
    return (margins - margins.mean()) ** 2 - margins


def own_tokens(tokens: Tokens) -> UnitTerms:
    """A number of the sequence and one of the token for each token."""
    first = -tokens.logps * tokens.given["per_sequence"] / tokens.sequence_lengths
    second = tokens.logps**2 * tokens.given["per_token"]
    return UnitTerms(first + second, {"first": first, "second": second}, {"length": tokens.sequence_lengths})


def own_sequences(sequences: Sequences) -> Tensor:
    """The mean and, by a number per token, a weighted sum."""
    return -sequences.mean_logps + sequences.sum_over_tokens(sequences.logps * sequences.given["per_token"])


@dataclass(frozen=True)
class Case:
    """A loss, by which function, and the names of what it is given."""

    loss: Any
    given: tuple[str, ...] = ()
    function: str = "preference_loss"

    is_steep: bool = False
    """Whether the derivative is a log-prob or a difference of some, not a bounded function of them."""

    @property
    def roundings(self) -> float:
        """For `assert_as_exact_as_plain`: what a derivative makes of an error of log-probs, that of a logit
        of magnitude 8 or so. The exponential of a policy's ratio hands it on as a relative one."""
        return 4.0 if self.function == "token_policy_loss" or self.is_steep else 2.0

    @property
    def value(self) -> Any:
        """The loss, where that is a function as a value."""
        return sf.losses.as_loss(self.loss)

    @property
    def fused(self) -> Callable[..., Any]:
        """The function under test."""
        return getattr(sf, self.function)

    @property
    def plain(self) -> Callable[..., Any]:
        """The oracle."""
        return getattr(sf.reference, self.function)

    def options(self, batch: Batch) -> dict[str, Any]:
        """The keyword arguments: numbers that depend on nothing but their shape."""
        named: dict[str, Any] = {"loss": self.loss}
        extra = {}
        for place, name in enumerate(self.given):
            value = _values(name, batch, place)
            if name in EXTRAS:
                extra[name] = value
            else:
                named[name] = value
        return {**named, "extra": extra} if extra else named


EXTRAS = ("offset", "level", "per_sequence", "per_token")


def _values(name: str, batch: Batch, place: int) -> Any:
    generator = torch.Generator().manual_seed(100 + place)
    sequences = len(batch.sequence_labels)
    shapes = {
        "ref_chosen_sum_logps": (sequences // 2,),
        "ref_rejected_sum_logps": (sequences // 2,),
        "offset": (sequences // 2,),
        "level": (),
        "kl_baseline": (),
        "pair_weights": (sequences // 2,),
    }
    per_token = ("ref_token_logps", "old_logps", "token_advantages", "token_weights", "per_token")
    shape = tuple(batch.labels.shape) if name in per_token else shapes.get(name, (sequences,))
    if name == "desirable":
        return torch.arange(sequences) % 3 != 1
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if "logps" in name:
        scale = 12.0 if "sum" in name else 3.5
        return noise * 0.3 - scale
    return noise.abs() + 0.2 if "weights" in name or name == "kl_baseline" else noise


PREFERENCE = {
    "slime": Case(Slime(stabilizer_reduction="token", margin_hard=6.0)),
    "dpo": Case(DPO(beta=0.3), ("ref_chosen_sum_logps", "ref_rejected_sum_logps")),
    "dpo_weighed": Case(DPO(beta=0.3, dpop=2.0), ("ref_sum_logps", "loss_weights")),
    "ipo": Case(DPO(loss_type="ipo"), ("ref_mean_logps",), is_steep=True),
    "ld_dpo": Case(DPO(ld_alpha=0.4, nll_weight=0.5, nll_reduction="token"), ("ref_token_logps",)),
    "simpo": Case(SimPO(nll_weight=0.2)),
    "cpo": Case(CPO()),
    "orpo": Case(ORPO()),
    "alphapo": Case(AlphaPO()),
    "kto": Case(KTO(), ("ref_sum_logps", "desirable", "kl_baseline")),
    "kto_token_references": Case(KTO(baseline="zero"), ("ref_token_logps", "desirable", "loss_weights")),
    "kto_batch": Case(KTO(baseline="batch"), ("ref_mean_logps", "desirable")),
    "sft": Case(SFT()),
    "own_pairs": Case(own_pairs, ("offset", "level")),
    "own_batch": Case(Own(own_batch, needs_batch=True), is_steep=True),
    "own_tokens": Case(
        Own(own_tokens, unit="token", term_names=("first", "second"), metric_names=("length",)),
        ("per_sequence", "per_token"),
        is_steep=True,
    ),
    "own_sequences": Case(Own(own_sequences, unit="sequence"), ("per_token",)),
}
POLICY = {
    "grpo": Case(
        PolicyGradient(beta=0.04, normalisation="sequence"), ("advantages", "old_logps", "ref_token_logps")
    ),
    "dapo": Case(PolicyGradient(epsilon_high=0.28, delta=3.0), ("advantages", "old_logps")),
    "on_policy": Case(PolicyGradient(normalisation="constant", max_length=9), ("advantages",)),
    "gspo": Case(
        PolicyGradient(level="sequence", normalisation="sequence", beta=0.1),
        ("advantages", "old_logps", "ref_token_logps"),
    ),
    "gspo_by_tokens": Case(PolicyGradient(level="sequence"), ("advantages", "old_logps", "loss_weights")),
}
POLICY = {name: Case(case.loss, case.given, "token_policy_loss") for name, case in POLICY.items()}
CASES = PREFERENCE | POLICY


def options_of(case: Case, batch: Batch) -> dict[str, Any]:
    """As `Case.options`, ``loss_weights`` in the shape that the loss's unit has."""
    options = case.options(batch)
    if "loss_weights" in options and case.value.unit == "pair":
        options["loss_weights"] = options["loss_weights"][: len(batch.sequence_labels) // 2]
    return options


def plan_of(kind: str, batch: Batch, loss: Any, **options: Any) -> tuple[int, Plan]:
    """(workspace, plan): "one" chunk, "several" of whole units where there are any, or "least" memory."""
    problem = batch.call(sf.explain_plan, loss=loss, workspace="1GiB", **options).problem
    largest = max(problem.unit_rows, default=problem.rows // 3)
    rows = {"one": problem.rows, "several": max(1, min(largest, problem.rows // 2)), "least": 1}[kind]
    workspace = rows * problem.row_bytes
    return workspace, batch.call(sf.explain_plan, loss=loss, workspace=workspace, **options)
