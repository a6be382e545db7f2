"""Losses of units in graphs: `torch.compile`, fake tensors, `make_fx`, `torch.export`; and your own functions."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import slime_fused as sf
from slime_fused.losses import DPO, Own
from tests.support import assert_as_exact_as_plain, make_batch, pack
from tests.unit_loss_cases import CASES, options_of, own_batch

LENGTHS = (4, 3, 5, 2)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CASES)
def test_one_graph(name):
    """Values of losses, and functions that were used before: a break of the graph is an error."""
    case, batch = CASES[name], pack(make_batch(LENGTHS, has_bias=True, dtype=torch.float32))
    compiled = torch.compile(case.fused, fullgraph=True, backend="aot_eager")
    assert case.value.key  # a function gets its name here, as by a call outside a graph
    options = {**options_of(case, batch), "logit_softcap": 9.0}
    how = {"workspace": 3000, "upstream": -1.5, "roundings": case.roundings}
    assert_as_exact_as_plain(compiled, case.plain, batch, options=options, **how)


def test_one_graph_holds_one_loss_at_a_time():
    """Another value of the same class is another graph, not the first one's numbers."""
    batch = make_batch(LENGTHS)
    compiled = torch.compile(sf.preference_loss, fullgraph=True, backend="aot_eager")
    for loss in (DPO(beta=0.1), DPO(beta=2.0), DPO(loss_type="ipo")):
        options = {"loss": loss, "ref_sum_logps": torch.linspace(-9, -6, 4)}
        assert_as_exact_as_plain(compiled, sf.reference.preference_loss, batch, options=options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "gspo"])
def test_inductor(name):
    case, batch = CASES[name], make_batch(LENGTHS, has_bias=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(case.fused, fullgraph=True)
        assert_as_exact_as_plain(compiled, case.plain, batch, options=options_of(case, batch))


def test_a_function_that_was_never_a_value_before():
    """A graph cannot name it: the graph breaks there, and the numbers are right."""
    batch = make_batch(LENGTHS)

    def fresh(pairs):
        return -pairs.chosen_mean_logps + pairs.rejected_mean_logps**2

    compiled = torch.compile(sf.preference_loss, backend="aot_eager")
    options = {"loss": fresh}
    assert_as_exact_as_plain(compiled, sf.reference.preference_loss, batch, options=options)


@pytest.mark.parametrize("name", CASES)
def test_fake_tensors(name):
    case, batch = CASES[name], make_batch(LENGTHS, has_bias=True, dtype=torch.bfloat16)
    real = batch.call(case.fused, **options_of(case, batch))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        leaves = batch.leaves()
        fakes = [mode.from_tensor(x) for x in (leaves.hidden, leaves.weight, leaves.labels, leaves.bias)]
        options = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in options_of(case, batch).items()
        }
        out = case.fused(*fakes[:3], bias=fakes[3], **options)
        gradients = torch.autograd.grad(out.loss, [fakes[0], fakes[1], fakes[3]])
    assert out.loss.shape == ()
    assert out.loss.dtype == real.loss.dtype
    assert out.mean_logps.shape == real.mean_logps.shape
    assert out.terms.keys() == real.terms.keys()
    assert out.metrics.keys() == real.metrics.keys()
    assert [g.shape for g in gradients] == [batch.hidden.shape, batch.weight.shape, batch.bias.shape]
    assert {g.dtype for g in gradients} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["dpo", "kto_batch", "sft", "grpo", "own_pairs"])
def test_make_fx(name):
    """One operator stands for the loss, and it runs with other numbers."""
    case, batch, other = CASES[name], make_batch(LENGTHS), make_batch(LENGTHS, seed=5)
    options = options_of(case, batch)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return case.fused(hidden, weight, labels, **options).loss

    graph = make_fx(loss)(batch.hidden, batch.weight, batch.labels)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("slime_fused.unit_loss.default") == 1
    got = graph(other.hidden, other.weight, other.labels)
    torch.testing.assert_close(got, loss(other.hidden, other.weight, other.labels), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["slime", "dpo", "kto", "grpo"])
def test_export(name):
    """A saved graph names a shipped loss so that another process finds it."""
    case, batch = CASES[name], make_batch(LENGTHS)

    class Step(torch.nn.Module):
        def forward(self, hidden, weight, labels, options):
            return case.fused(hidden, weight, labels, loss=case.loss, **options).loss

    options = {k: v for k, v in options_of(case, batch).items() if k != "loss"}
    args = (batch.hidden, batch.weight, batch.labels, options)
    exported = torch.export.export(Step(), args)
    torch.testing.assert_close(exported.module()(*args), Step()(*args), rtol=1e-12, atol=1e-12)
    assert type(case.loss).__name__ in str(exported.graph)


def test_an_own_loss_lives_as_long_as_its_value():
    batch, losses = make_batch(LENGTHS), [Own(own_batch, needs_batch=True)]
    inputs = (batch.hidden, batch.weight, batch.labels)
    graph = make_fx(lambda *x: sf.preference_loss(*x, loss=losses[0]).loss)(*inputs)
    graph(*inputs)
    losses.clear()
    gc.collect()
    with pytest.raises(ValueError, match="loss: expected the key of a loss"):
        graph(*inputs)
