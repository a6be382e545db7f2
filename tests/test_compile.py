"""`torch.compile` holds every loss in one graph, and the operators under it keep the rules of `torch.library`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import slime_fused as sf
from slime_fused import reference
from slime_fused.autograd import operators, token_operators
from slime_fused.backends.base import HeadTransform
from slime_fused.engine.calls import HeadOptions, LabelledRows, LinearRequest, Wants
from slime_fused.functional import given as given_module
from slime_fused.functional import tokens
from slime_fused.losses import DPO, KTO, PolicyGradient, Slime
from tests.support import IGNORE, Batch, assert_as_exact_as_plain, make_batch, pack, run

LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "slime_loss": ("slime_loss", {"config": sf.SlimeLossConfig(stabilizer_reduction="token")}),
    "linear_logprobs": ("linear_logprobs", {}),
    "linear_cross_entropy": ("linear_cross_entropy", {"label_smoothing": 0.1, "z_loss": 0.01}),
    "cross_entropy_none": ("linear_cross_entropy", {"reduction": "none"}),
    "sequence_logprobs": ("sequence_logprobs", {"reduction": "mean"}),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(name: str, compiler: str = "aot_eager", **compile_options: Any) -> Callable[..., Any]:
    """The public function in one graph: a break is an error."""
    return torch.compile(getattr(sf, name), fullgraph=True, backend=compiler, **compile_options)


def check(name: str, function: Callable[..., Any], batch: Batch, options: dict[str, Any], **how: Any) -> None:
    both = {**options, **{k: v for k, v in how.items() if k not in ("wanted", "upstream", "workspace")}}
    plain = getattr(reference, name)
    only = {k: how[k] for k in ("wanted", "upstream", "workspace") if k in how}
    assert_as_exact_as_plain(function, plain, batch, options=both, **only)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_graph(loss, layout, compiler):
    name, options = LOSSES[loss]
    batch = make_batch((4, 3, 5, 2), has_bias=True, ignore_index=3)
    batch = pack(batch) if layout == "packed" else batch
    check(name, compiled(name, compiler), batch, options, shift=True, logit_softcap=9.0, upstream=-1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("loss", LOSSES)
def test_dtypes(loss, dtype):
    name, options = LOSSES[loss]
    check(name, compiled(name), make_batch((4, 3, 5, 2), dtype=dtype), options, upstream=65536.0 / 2048)


@pytest.mark.parametrize("loss", LOSSES)
def test_frozen_inputs(loss):
    name, options = LOSSES[loss]
    batch = make_batch((4, 3, 5, 2), has_bias=True)
    for wanted in [("hidden",), ("weight", "bias"), ()]:
        check(name, compiled(name), batch, options, wanted=wanted)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_grad(loss):
    name, options = LOSSES[loss]
    leaves = make_batch((4, 3, 5, 2)).leaves()
    with torch.no_grad():
        out = leaves.call(compiled(name), **options)
        expected = leaves.call(getattr(sf, name), **options)
    out, expected = (x.loss if isinstance(x, sf.SlimeOutput) else x for x in (out, expected))
    assert not out.requires_grad
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("workspace", ["1GiB", 3000, "3KB"])
def test_workspaces(workspace):
    check("slime_loss", compiled("slime_loss"), make_batch(), {}, workspace=workspace)


@pytest.mark.parametrize("loss", LOSSES)
def test_dynamic_shapes(loss):
    """One graph serves other numbers of tokens: a second compilation is an error."""
    name, options = LOSSES[loss]
    function = compiled(name, dynamic=True)
    batches = [make_batch((4, 3, 5, 2)), make_batch((9, 3, 6, 8), prompt=4), make_batch((2, 5, 5, 11), padding=3)]
    check(name, function, batches[0], options)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in batches[1:]:
            check(name, function, batch, options)


def test_inside_a_larger_graph():
    """A model around the loss: hidden states are no leaves, and the head has a second use."""

    def step(tokens: Tensor, table: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(table[tokens])
        out = sf.slime_loss(hidden, table * 0.5, labels)
        return out.loss + hidden.square().mean(), out.margins

    batch = make_batch((4, 3, 5, 2))
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        table = batch.weight.clone().requires_grad_()
        loss, margins = function(batch.labels.clamp(min=0), table, batch.labels)
        loss.backward()
        results.append((loss.detach(), margins, table.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("workspace", ["1GiB", 250])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_fakes_know_the_dtypes_of_waiting_gradients(hidden_dtype, dtype, workspace, monkeypatch):
    """What a graph was traced for must be what it gets, on every plan: hidden cast or not, one chunk or several."""
    batch = make_batch((4, 3, 5, 2), dtype=torch.float32, has_bias=True)
    batch = replace(batch, hidden=batch.hidden.to(hidden_dtype)).leaves()
    seen = []
    for name in ("unit_loss_op", "cross_entropy_op", "token_loss_op"):
        op = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *args, op=op: seen.append((op, args)) or op(*args))
    for module in (tokens, given_module):
        monkeypatch.setattr(module, "is_traced", lambda *_: True)
    with torch.autocast("cpu", dtype):
        for name in ("slime_loss", "linear_cross_entropy", "linear_logprobs"):
            batch.call(getattr(sf, name), workspace=workspace)
    assert len(seen) == 3
    for op, args in seen:
        torch.library.opcheck(op, args, test_utils="test_faketensor")


@pytest.mark.parametrize("workspace", ["1GiB", 250])
def test_autocast_in_a_graph(workspace):
    batch = make_batch((4, 3, 5, 2), dtype=torch.float32)
    results = []
    for function in (sf.slime_loss, compiled("slime_loss")):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(function, batch, workspace=workspace))
    for key, value in results[0].outputs.items():
        assert torch.equal(results[1].outputs[key], value), key
    for key, value in results[0].grads.items():
        assert results[1].grads[key].dtype == torch.float32
        torch.testing.assert_close(results[1].grads[key], value, rtol=1e-2, atol=1e-3)


def test_errors_are_clear_in_a_graph():
    batch = make_batch((4, 3, 5, 2))
    wrong = Batch(batch.hidden, batch.weight.T, batch.labels)
    # PyTorch 2.8 names the error's type and where it was raised, not its text.
    message = r"weight: expected \(V, D\)" if torch.__version__ >= "2.9" else "ValueError"
    with pytest.raises(Exception, match=message):
        wrong.call(compiled("slime_loss"))
    outside = Batch(batch.hidden, batch.weight, batch.labels.masked_fill(batch.labels == batch.labels[0, 2], 99))
    with pytest.raises(ValueError, match=r"labels: .* got 99"):
        outside.call(compiled("slime_loss"))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["slime_loss", "sequence_logprobs"])
def test_inductor(loss):
    name, options = LOSSES[loss]
    # A graph that another version of an operator left in the cache on disk would be taken for this one's.
    with torch._inductor.config.patch(force_disable_caches=True):
        check(name, compiled(name, "inductor"), make_batch((4, 3, 5, 2), has_bias=True), options)


# --- torch.library's own checks ---


@dataclass(frozen=True)
class OpCase:
    """One call of an operator."""

    op: Any
    args: tuple[Any, ...]


def head_args(batch: Batch) -> tuple[Any, ...]:
    return batch.hidden, batch.weight, batch.bias, batch.labels, batch.cu_seqlens


def op_cases() -> dict[str, OpCase]:
    cases = {}
    references, per_token = torch.full((4,), -9.0), torch.full((4, 7), -2.0)
    unit_losses_of = {
        "all": (Slime(), {}),
        "every_row_labelled": (DPO(), {"ref_token_logps": per_token[:, :4]}),
        "head_frozen": (DPO(nll_weight=0.5), {"ref_sum_logps": references}),
        "nothing": (
            KTO(),
            {"ref_sum_logps": references, "desirable": references < 0, "kl_baseline": -per_token[0, 0]},
        ),
        "float16": (
            KTO(baseline="batch"),
            {"ref_mean_logps": references / 4, "desirable": torch.tensor([True, False, True, True])},
        ),
        "float32_logits": (PolicyGradient(), {"advantages": torch.arange(4.0) - 1, "old_logps": per_token}),
    }
    for label, wanted, dtype in (
        ("all", ("hidden", "weight", "bias"), torch.float32),
        ("every_row_labelled", ("hidden", "weight", "bias"), torch.float32),
        ("head_frozen", ("hidden",), torch.float32),
        ("nothing", (), torch.float32),
        ("float16", ("hidden", "weight", "bias"), torch.float16),
        ("float32_logits", ("hidden", "weight", "bias"), torch.bfloat16),
    ):
        # Where every row has a label, results could be views of one buffer, which an operator may not return.
        layout = {"prompt": 0, "padding": 0} if label == "every_row_labelled" else {}
        batch = make_batch((4, 4, 4, 4), dtype=dtype, has_bias=True, **layout)
        batch = pack(batch) if label == "head_frozen" else batch
        leaves = batch.leaves(wanted)
        wants = Wants.of(leaves.hidden, leaves.weight, leaves.bias)
        logits_dtype = torch.float32 if label == "float32_logits" else None
        options = HeadOptions(HeadTransform(0.5, 9.0), logits_dtype, None, "cpu")
        flat = operators.flat_request(LinearRequest(LabelledRows(leaves.labels, leaves.cu_seqlens), options, wants))
        head = head_args(leaves)
        loss_value, given = unit_losses_of[label]
        asked = {"float32_logits": "logps is_top1 entropy", "nothing": "logps", "float16": "lse"}.get(label, "")
        of_units = (loss_value.key, list(given.values()), " ".join(given), asked)
        cases[f"unit_loss-{label}"] = OpCase(operators.unit_loss_op, (*head, *of_units, *flat))
        token_loss = (0.1, 0.01)
        cases[f"cross_entropy-{label}"] = OpCase(operators.cross_entropy_op, (*head, True, *token_loss, *flat))
        for statistics in ("", "entropy lse"):
            named = f"{label}-entropy" if statistics else label
            args = (*token_loss, statistics, *flat)
            cases[f"token_loss-{named}"] = OpCase(operators.token_loss_op, (*head, *args))
            loss, entropy, *saved = (x.detach() for x in operators.token_loss_op(*head, *args))
            upstream = (torch.ones_like(loss), torch.ones_like(entropy))
            cases[f"token_loss_backward-{named}"] = OpCase(
                operators.token_loss_backward_op, (*upstream, *saved, *head_args(batch), *args)
            )
    bounds = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    for mean in (False, True):
        values = torch.randn(9, requires_grad=True)
        cases[f"segment_sum-{mean}"] = OpCase(token_operators.segment_sum_op, (values, bounds, mean, "cpu"))
        cases[f"segment_sum_backward-{mean}"] = OpCase(
            token_operators.segment_sum_backward_op, (torch.randn(3), bounds, 9, mean, "cpu")
        )
    for wanted in (False, True):
        logp = -torch.rand(9).requires_grad_(wanted)
        pairs = torch.tensor([0, 2, 5, 7, 9], dtype=torch.int32)
        args = (logp, pairs, Slime(stabilizer_reduction="token").key, "cpu", wanted)
        cases[f"slime_terms-{wanted}"] = OpCase(token_operators.slime_terms_op, args)
    for dtype in (torch.float32, torch.float16):
        logits = torch.randn(2, 3, 9, dtype=dtype, requires_grad=True)
        labels = torch.tensor([[1, IGNORE, 8], [0, 2, 2]])
        options = (0.1, 0.01, 0.5, 9.0, "cpu", IGNORE)
        cases[f"cross_entropy_of_logits-{dtype}"] = OpCase(
            token_operators.logits_loss_op, (logits, labels, True, *options)
        )
        loss, stats = (x.detach() for x in token_operators.logits_loss_op(logits, labels, True, *options))
        args = (torch.ones_like(loss), stats, logits.detach(), labels, *options)
        cases[f"cross_entropy_of_logits_backward-{dtype}"] = OpCase(token_operators.logits_loss_backward_op, args)
    return cases


OP_CASES = op_cases()


def test_every_operator_is_checked():
    kind = type(operators.unit_loss_op)
    ops = {op for module in (operators, token_operators) for op in vars(module).values() if isinstance(op, kind)}
    assert {case.op for case in OP_CASES.values()} == ops


@pytest.mark.parametrize("case", OP_CASES)
def test_opcheck(case):
    results = torch.library.opcheck(OP_CASES[case].op, OP_CASES[case].args)
    assert len(results) == 4
    assert set(results.values()) == {"SUCCESS"}
