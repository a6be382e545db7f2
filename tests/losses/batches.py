"""Batches of log-probs: made up, drawn by Hypothesis, and cut into what losses see."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from slime_fused.backends import get_backend
from slime_fused.engine.units import BatchCounts
from slime_fused.losses import Pairs, Sequences, Tokens

HOSTILE_VALUES = st.one_of(st.sampled_from((0.0, -1e-12, -1e-6, -1e3, -1e4)), st.floats(-20, 0))


@dataclass(frozen=True)
class Batch:
    """Sequences of log-probs, one after the other; the first half of them chosen where a loss takes pairs."""

    lengths: tuple[int, ...]
    logps: torch.Tensor
    """(n,) float64."""
    given: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def counts(self):
        half = sum(self.lengths[: len(self.lengths) // 2])
        return BatchCounts(float(len(self.lengths)), float(sum(self.lengths)), float(half))

    def split(self, values):
        return list(torch.split(values, list(self.lengths)))

    def with_given(self, **given):
        return Batch(self.lengths, self.logps, given)

    def units(self, unit, dtype=torch.float64):
        """The whole batch as a loss of that unit sees it."""
        logps = self.logps.to(dtype)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.given.items()}
        if unit == "token":
            lengths = torch.tensor(self.lengths)
            return Tokens(logps, lengths.repeat_interleave(lengths).to(dtype), self.counts, given)
        bounds = torch.tensor([0, *torch.tensor(self.lengths).cumsum(0).tolist()], dtype=torch.int32)
        return (Pairs if unit == "pair" else Sequences)(logps, self.lengths, bounds, self.counts, given)

    def select(self, sequences):
        """(these sequences alone, the places of their tokens)."""
        places = torch.cat([self.split(torch.arange(len(self.logps)))[i] for i in sequences])
        given = {}
        for key, values in self.given.items():
            index = places if values.shape == self.logps.shape else torch.tensor(sequences)
            given[key] = values if values.dim() == 0 else values[index]
        return Batch(tuple(self.lengths[i] for i in sequences), self.logps[places], given), places


def evaluate(loss, batch, dtype=torch.float64, *, backend="torch", wants_gradient=True):
    """(each unit's share of the loss and its terms, dL/dlogps)."""
    return loss.evaluate(batch.units(loss.unit, dtype), get_backend(backend), wants_gradient=wants_gradient)


def random_batch(lengths=(3, 1, 5, 2, 4, 2), seed=0):
    """Log-probs as a model has them, with everything that some loss may be given."""
    g = torch.Generator().manual_seed(seed)
    n, s = sum(lengths), len(lengths)
    logps = -3 * torch.rand(n, dtype=torch.float64, generator=g)
    noise = [0.3 * torch.randn(n, dtype=torch.float64, generator=g) for _ in range(2)]
    given = {
        "ref_token_logps": logps + noise[0],
        "old_logps": logps + noise[1],
        "desirable": torch.arange(s) % 3 != 1,
        "kl_baseline": torch.tensor(0.4, dtype=torch.float64),
        "advantages": torch.randn(s, dtype=torch.float64, generator=g),
    }
    return Batch(tuple(lengths), logps, given)


def given_for(loss, batch):
    """The batch with what the loss takes, and no more."""
    wanted = {"ref_token_logps" if key == "ref_logps" else key for key in (*loss.needs, *loss.takes)}
    given = {key: value for key, value in batch.given.items() if key in wanted}
    if loss.unit == "token" and "advantages" in given:
        given["advantages"] = given["advantages"].repeat_interleave(torch.tensor(batch.lengths))
    return batch.with_given(**given)


@st.composite
def batches(draw, values=HOSTILE_VALUES):
    """Up to three pairs of up to four tokens. Some references, old log-probs and responses equal the others."""
    pairs = draw(st.integers(1, 3))
    lengths = tuple(draw(st.lists(st.integers(1, 4), min_size=2 * pairs, max_size=2 * pairs)))

    def numbers(count, elements=values):
        return torch.tensor(draw(st.lists(elements, min_size=count, max_size=count)), dtype=torch.float64)

    n = sum(lengths)
    logps = numbers(n)
    if draw(st.booleans()):
        logps = torch.full_like(logps, draw(values))
    given = {
        "ref_token_logps": logps if draw(st.booleans()) else numbers(n),
        "old_logps": logps if draw(st.booleans()) else numbers(n),
        "desirable": torch.tensor(draw(st.lists(st.booleans(), min_size=2 * pairs, max_size=2 * pairs))),
        "kl_baseline": torch.tensor(draw(st.floats(-1, 5)), dtype=torch.float64),
        "advantages": numbers(2 * pairs, st.floats(-2, 2)),
    }
    return Batch(lengths, logps, given)
