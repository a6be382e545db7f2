"""`return_stats` in graphs: torch.compile, torch.export, make_fx, fake tensors, and `torch.library`'s rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import slime_fused as sf
from slime_fused.autograd import operators
from slime_fused.autograd.token_losses import STATISTICS
from slime_fused.engine.calls import HeadOptions, LabelledRows, LinearRequest, Wants
from tests.linear_stats_backend import linear_stats_backend  # noqa: F401
from tests.statistics_support import CE, HEAD, assert_as_exact, run, workspace_of
from tests.support import DTYPES, make_batch, pack

ASKED = {"all": STATISTICS, "entropy": ("entropy",), "logged": ("is_top1", "mean_logit"), "lse": ("lse",)}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(name: str = "linear_logprobs", compiler: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    """The public function in one graph: a break is an error."""
    return torch.compile(getattr(sf, name), fullgraph=True, backend=compiler, **options)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("asked", ASKED)
def test_one_graph(asked, layout, compiler):
    batch = make_batch((4, 3, 5, 2), has_bias=True, ignore_index=3)
    batch = pack(batch) if layout == "packed" else batch
    options = {**HEAD, "shift": True}
    assert_as_exact(batch, options=options, statistics=ASKED[asked], call=compiled(compiler=compiler))


@pytest.mark.parametrize("rows", [1000, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_dtypes(dtype, rows):
    batch = make_batch((4, 3, 5, 2), dtype=dtype, has_bias=True)
    function = "linear_cross_entropy"
    workspace = workspace_of(rows, batch)
    assert_as_exact(batch, function=function, options=CE, call=compiled(function), workspace=workspace)


def test_fused_plan(linear_stats_backend):  # noqa: F811
    batch = make_batch((9, 12, 14, 11), vocab_size=645, dtype=torch.bfloat16, has_bias=True)
    how = {"backend": linear_stats_backend.name, "workspace": 46 * 256 * 2}
    got, expected = (run(f, batch, **how) for f in (compiled(), sf.linear_logprobs))
    assert linear_stats_backend.calls >= 2
    for key, value in expected.outputs.items():
        assert torch.equal(got.outputs[key], value), key
    for key, value in expected.grads.items():
        torch.testing.assert_close(got.grads[key], value, rtol=torch.finfo(torch.bfloat16).eps, atol=0, msg=key)


@pytest.mark.parametrize("wanted", [("hidden",), ("weight", "bias"), ()], ids=str)
def test_frozen_inputs(wanted):
    assert_as_exact(make_batch((4, 3, 5), has_bias=True), wanted=wanted, call=compiled())


def test_autocast():
    batch = make_batch((4, 3, 5), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (run(f, batch, wanted=("hidden", "weight")) for f in (compiled(), sf.linear_logprobs))
    for key, value in expected.outputs.items():
        assert torch.equal(got.outputs[key], value), key
    torch.testing.assert_close(got.grads, expected.grads, rtol=1e-2, atol=1e-3)


def test_dynamic_shapes():
    """One graph serves other numbers of tokens: a second compilation is an error."""
    function = compiled(dynamic=True)
    batches = [make_batch((4, 3, 5, 2)), make_batch((9, 3, 6, 8), prompt=4), make_batch((2, 5, 5, 11), padding=3)]
    run(function, batches[0], wanted=("hidden", "weight"))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in batches[1:]:
            assert_as_exact(batch, wanted=("hidden", "weight"), call=function)


# --- recorded, run on fake tensors, exported ---


def told(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    out = sf.linear_logprobs(hidden, weight, labels, shift=True, return_stats=STATISTICS)
    return (out.logps, *(getattr(out, name) for name in STATISTICS))


def loss_and_gradients(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    logps, entropy, *others = told(hidden, weight, labels)
    return entropy, *others, *torch.autograd.grad((logps * entropy).sum(), [hidden, weight])


INPUTS = (make_batch((4, 3, 5, 2)).hidden, make_batch().weight, make_batch((4, 3, 5, 2)).labels)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    graph = make_fx(loss_and_gradients, tracing_mode=mode)(*INPUTS)
    assert any("linear_token_loss" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(*INPUTS), loss_and_gradients(*INPUTS), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("is_inside", [True, False], ids=["in_the_mode", "outside"])
def test_fake_tensors(is_inside):
    mode = FakeTensorMode()
    inputs = [mode.from_tensor(x) for x in INPUTS]
    if is_inside:
        with mode:
            got = loss_and_gradients(*inputs)
    else:
        got = loss_and_gradients(*inputs)
    for fake, real in zip(got, loss_and_gradients(*INPUTS), strict=True):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(INPUTS[1])

        def forward(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            return told(hidden, self.weight, labels)

    model = Model()
    exported = torch.export.export(model, (INPUTS[0], INPUTS[2]), strict=strict).module()
    got, expected = (f(INPUTS[0], INPUTS[2]) for f in (exported, model))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


# --- torch.library's own checks ---


@pytest.mark.parametrize("asked", ["all", "logged", "lse"])
@pytest.mark.parametrize(
    ("wanted", "dtype"),
    [
        (("hidden", "weight", "bias"), torch.float32),
        (("hidden",), torch.bfloat16),
        (("weight", "bias"), torch.float16),
        ((), torch.float32),
    ],
    ids=str,
)
def test_opcheck(wanted, dtype, asked):
    # Where every row has a label, results could be views of one buffer, which an operator may not return.
    layout = {"prompt": 0, "padding": 0} if len(wanted) == 3 else {}
    leaves = make_batch((4, 4, 4, 4), dtype=dtype, has_bias=True, **layout).leaves(wanted)
    wants = Wants.of(leaves.hidden, leaves.weight, leaves.bias)
    rows = LabelledRows(leaves.labels, leaves.cu_seqlens)
    flat = operators.flat_request(LinearRequest(rows, HeadOptions(backend="cpu"), wants))
    head = (leaves.hidden, leaves.weight, leaves.bias, leaves.labels, leaves.cu_seqlens)
    rest = (0.1, 0.01, " ".join(ASKED[asked]), *flat)
    results = torch.library.opcheck(operators.token_loss_op, (*head, *rest))
    loss, entropy, *saved = (x.detach() for x in operators.token_loss_op(*head, *rest))
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in head)
    args = (torch.ones_like(loss), torch.ones_like(entropy), *saved, *plain, *rest)
    results_of_backward = torch.library.opcheck(operators.token_loss_backward_op, args)
    assert {*results.values(), *results_of_backward.values()} == {"SUCCESS"}
    assert len(results) == len(results_of_backward) == 4
