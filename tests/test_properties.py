"""Properties that hold for any layout: random lengths, masks, vocabularies and workspaces (hypothesis)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import slime_fused as sf
from slime_fused import reference
from tests.support import Batch, Result, run

IGNORE = -100
relaxed = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Case:
    """A padded batch of ``masks`` (S, T), and what a call on it is given."""

    batch: Batch
    workspace: int
    backend: str
    softcap: float | None
    reduction: str

    @property
    def options(self) -> dict:
        return {"workspace": self.workspace, "backend": self.backend, "logit_softcap": self.softcap}

    @property
    def config(self) -> sf.SlimeLossConfig:
        return sf.SlimeLossConfig(stabilizer_reduction=self.reduction)


@st.composite
def cases(draw, *, pairs: bool = True) -> Case:
    """Labels anywhere, in gaps too; with ``pairs`` every sequence holds one and their number is even."""
    count = 2 * draw(st.integers(1, 4)) if pairs else draw(st.integers(1, 7))
    length = draw(st.one_of(st.just(1), st.integers(1, 9)))
    vocab = draw(st.sampled_from([1, 2, 3, 17, 33, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    mask = torch.rand(count, length, generator=generator) < density
    if pairs:
        mask[torch.arange(count), torch.randint(0, length, (count,), generator=generator)] = True
    hidden_size = draw(st.sampled_from([1, 3, 8]))
    labels = torch.randint(0, vocab, (count, length), generator=generator).masked_fill(~mask, IGNORE)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = Batch(
        normal(count, length, hidden_size),
        normal(vocab, hidden_size),
        labels,
        bias=normal(vocab) if draw(st.booleans()) else None,
    )
    row_bytes = batch.call(sf.explain_plan, loss="token").problem.row_bytes
    return Case(
        batch,
        workspace=row_bytes * draw(st.integers(1, count * length + 1)) + draw(st.integers(0, row_bytes - 1)),
        backend=draw(st.sampled_from(["cpu", "torch"])),
        softcap=draw(st.sampled_from([None, 4.0])),
        reduction=draw(st.sampled_from(["sequence", "token"])),
    )


def pack_rows(batch: Batch, lengths: list[int]) -> Batch:
    """The first ``lengths[s]`` positions of each sequence, one after the other."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return replace(
        batch,
        hidden=torch.cat([x[:n] for x, n in zip(batch.hidden, lengths, strict=True)]),
        labels=torch.cat([x[:n] for x, n in zip(batch.labels, lengths, strict=True)]),
        cu_seqlens=bounds,
    )


def used_lengths(batch: Batch, extra: int) -> list[int]:
    """Positions up to the last label of each sequence, and some padding."""
    length = batch.labels.shape[1]
    positions = torch.arange(1, length + 1) * (batch.labels != IGNORE)
    return [min(length, int(n) + extra) for n in positions.amax(1)]


def assert_same(got: Result, expected: Result, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    for name, value in expected.outputs.items():
        torch.testing.assert_close(
            got.outputs[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, grad in expected.grads.items():
        torch.testing.assert_close(got.grads[name], grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"d_{n}: {m}")


@relaxed
@given(case=cases())
def test_slime_loss_is_the_reference(case):
    expected = run(reference.slime_loss, case.batch, config=case.config, logit_softcap=case.softcap)
    assert_same(run(sf.slime_loss, case.batch, config=case.config, **case.options), expected)


@relaxed
@given(case=cases(pairs=False), reduction=st.sampled_from(["sum", "mean"]), shift=st.booleans())
def test_sequence_logprobs_are_the_reference(case, reduction, shift):
    options = {"reduction": reduction, "shift": shift}
    expected = run(reference.sequence_logprobs, case.batch, logit_softcap=case.softcap, **options)
    assert_same(run(sf.sequence_logprobs, case.batch, **options, **case.options), expected)


@relaxed
@given(case=cases(), extra=st.integers(0, 2))
def test_packed_is_padded(case, extra):
    lengths = used_lengths(case.batch, extra)
    padded = run(sf.slime_loss, case.batch, config=case.config, **case.options)
    packed = run(sf.slime_loss, pack_rows(case.batch, lengths), config=case.config, **case.options)
    grads = {**padded.grads}
    grads["hidden"] = torch.cat([x[:n] for x, n in zip(grads["hidden"], lengths, strict=True)])
    assert_same(packed, Result(padded.outputs, grads))


@relaxed
@given(case=cases(), data=st.data())
def test_permuting_pairs_permutes_the_results(case, data):
    pairs = len(case.batch.labels) // 2
    order = torch.tensor(data.draw(st.permutations(range(pairs))))
    rows = torch.cat([order, order + pairs])
    permuted = replace(case.batch, hidden=case.batch.hidden[rows], labels=case.batch.labels[rows])
    before = run(sf.slime_loss, case.batch, config=case.config, **case.options)
    after = run(sf.slime_loss, permuted, config=case.config, **case.options)
    per_pair = ("chosen_logps", "rejected_logps", "margins")
    outputs = {name: x[order] if name in per_pair else x for name, x in before.outputs.items()}
    assert_same(after, Result(outputs, {**before.grads, "hidden": before.grads["hidden"][rows]}))


@relaxed
@given(case=cases(pairs=False), packed=st.booleans())
def test_shifting_by_hand_is_shift(case, packed):
    """Labels moved by one and the last position ignored; in a packed batch each sequence on its own."""
    by_hand = torch.nn.functional.pad(case.batch.labels[:, 1:], (0, 1), value=IGNORE)
    moved = replace(case.batch, labels=by_hand)
    batch = case.batch
    if packed:
        lengths = [batch.labels.shape[1] - s % 2 for s in range(len(batch.labels))]
        # A sequence that loses its last position has nothing to predict at the new last one.
        for s, n in enumerate(lengths):
            by_hand[s, n - 1 :] = IGNORE
        batch, moved = pack_rows(batch, lengths), pack_rows(moved, lengths)
    for name in ("linear_logprobs", "sequence_logprobs"):
        shifted = run(getattr(sf, name), batch, shift=True, **case.options)
        expected = run(getattr(sf, name), moved, **case.options)
        assert_same(shifted, expected, rtol=1e-13, atol=1e-13)


@relaxed
@given(case=cases(pairs=False), value=st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e300]))
def test_ignored_rows_do_not_matter(case, value):
    dirty = replace(case.batch, hidden=case.batch.hidden.clone())
    dirty.hidden[dirty.labels == IGNORE] = value
    for name in ("linear_logprobs", "sequence_logprobs"):
        clean_result = run(getattr(sf, name), case.batch, **case.options)
        dirty_result = run(getattr(sf, name), dirty, **case.options)
        assert_same(dirty_result, clean_result, rtol=0, atol=0)


@relaxed
@given(case=cases(pairs=False), reduction=st.sampled_from(["mean", "sum", "none"]), data=st.data())
def test_cross_entropy_is_the_reference(case, reduction, data):
    if not (case.batch.labels != IGNORE).any():
        reduction = "none"
    options = {
        "reduction": reduction,
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        "z_loss": data.draw(st.sampled_from([0.0, 0.01])),
    }
    expected = run(reference.linear_cross_entropy, case.batch, logit_softcap=case.softcap, **options)
    assert_same(run(sf.linear_cross_entropy, case.batch, **options, **case.options), expected)


@relaxed
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=12).filter(lambda x: len(x) % 2 == 0),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.01, 1.0, 20.0]),
    reduction=st.sampled_from(["sequence", "token"]),
    backend=st.sampled_from(["cpu", "torch"]),
)
def test_slime_terms_are_the_reference(lengths, seed, spread, reduction, backend):
    generator = torch.Generator().manual_seed(seed)
    logp = -spread * torch.rand(sum(lengths), dtype=torch.float64, generator=generator)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    config = sf.SlimeLossConfig(stabilizer_reduction=reduction)
    results = []
    for function, options in ((sf.slime_terms, {"backend": backend}), (reference.slime_terms, {})):
        leaf = logp.clone().requires_grad_()
        out = function(leaf, bounds, config, **options)
        out.loss.backward()
        results.append((out.loss.detach(), out.stabilizer, out.margin_loss, out.margins, leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-14)
