"""Graphs of the losses that have no head, and of every loss under make_fx, fake tensors and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import slime_fused as sf
from slime_fused import reference
from tests.support import make_batch, pack

BOUNDS = torch.tensor([0, 2, 5, 7, 9], dtype=torch.int32)
IGNORE = -100


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_logits(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    labels.view(-1)[::4] = IGNORE
    return logits.to(dtype), labels


def value_and_grad(function: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    loss = function(leaf * 1, *rest)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, [leaf], upstream)[0]


CROSS_ENTROPY = {
    "mean": {"label_smoothing": 0.1, "z_loss": 0.01},
    "sum": {"reduction": "sum", "logit_scale": 0.5, "logit_softcap": 4.0},
    "none": {"reduction": "none"},
    "inplace": {"inplace_backward": True},
    "torch": {"backend": "torch"},
}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", CROSS_ENTROPY)
def test_cross_entropy_in_one_graph(case, compiler):
    options = CROSS_ENTROPY[case]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return sf.cross_entropy(logits, labels, **options)

    logits, labels = make_logits(3, 5, 37)
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    torch.testing.assert_close(
        value_and_grad(compiled, logits, labels), value_and_grad(loss, logits, labels), rtol=1e-14, atol=1e-15
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_cross_entropy_dtypes(dtype):
    logits, labels = make_logits(3, 5, 37, dtype=dtype)
    compiled = torch.compile(sf.cross_entropy, fullgraph=True, backend="aot_eager")
    got, expected = (value_and_grad(f, logits, labels) for f in (compiled, sf.cross_entropy))
    assert got[0].dtype == torch.float32
    assert got[1].dtype == dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["transposed", "expanded"])
def test_cross_entropy_of_strided_logits(how):
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        view = logits.transpose(0, 1) if how == "transposed" else logits[:1].expand(5, 3, 9).transpose(0, 1)
        return sf.cross_entropy(view, labels)

    logits, labels = make_logits(5, 3, 9)
    labels = labels.T
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_grad(compiled, logits, labels), value_and_grad(loss, logits, labels), rtol=1e-14, atol=1e-15
    )


def test_cross_entropy_with_dynamic_shapes():
    compiled = torch.compile(sf.cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    value_and_grad(compiled, *make_logits(3, 5, 37))
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((4, 7, 37), (6, 2, 53)):
            logits, labels = make_logits(*shape)
            got, expected = (value_and_grad(f, logits, labels) for f in (compiled, reference.cross_entropy))
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_errors_of_cross_entropy_in_a_graph():
    compiled = torch.compile(sf.cross_entropy, fullgraph=True, backend="aot_eager")
    logits, labels = make_logits(4, 9)
    with pytest.raises(ValueError, match=r"labels: expected .* got 9 at position 2"):
        compiled(logits, torch.tensor([0, 1, 9, 2]))
    with pytest.raises(ValueError, match="labels: expected at least one label"):
        compiled(logits, torch.full_like(labels, IGNORE))
    refused = torch.compile(lambda x: sf.cross_entropy(x, labels, label_smoothing=2.0), backend="aot_eager")
    with pytest.raises(Exception, match=r"label_smoothing: expected a number in \[0, 1\], got 2"):
        refused(logits)


def test_the_sum_over_no_label_in_a_graph():
    batch = make_batch((3, 2)).leaves()
    labels = torch.full_like(batch.labels, IGNORE)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        linear = sf.linear_cross_entropy(hidden, weight, labels, reduction="sum")
        return linear + sf.cross_entropy(hidden @ weight.T, labels, reduction="sum")

    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(batch.hidden, batch.weight)
    assert value == 0
    assert not any(g.any() for g in torch.autograd.grad(value, [batch.hidden, batch.weight]))


def make_logp(*, tokens: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return -3 * torch.rand(tokens, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_slime_terms_in_one_graph(compiler, backend, reduction):
    config = sf.SlimeLossConfig(stabilizer_reduction=reduction)

    def terms(logp: Tensor, bounds: Tensor) -> sf.SlimeOutput:
        return sf.slime_terms(logp, bounds, config, backend=backend)

    compiled = torch.compile(terms, fullgraph=True, backend=compiler)
    outputs = []
    for function in (compiled, terms):
        leaf = make_logp().requires_grad_()
        out = function(leaf, BOUNDS)
        named = [out.loss, out.anchor, out.margin_loss, out.stabilizer, out.chosen_logps, out.rejected_logps]
        assert not any(x.requires_grad for x in named[1:])
        outputs.append([x.detach() for x in named] + list(torch.autograd.grad(out.loss * 3, [leaf])))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-14, atol=1e-15)
    with torch.no_grad():
        assert not compiled(make_logp(), BOUNDS).loss.requires_grad


def test_slime_terms_with_dynamic_shapes():
    compiled = torch.compile(sf.slime_terms, fullgraph=True, backend="aot_eager", dynamic=True)
    value_and_grad(lambda x, b: compiled(x, b).loss, make_logp(), BOUNDS)
    with torch.compiler.set_stance("fail_on_recompile"):
        for bounds in ([0, 3, 5, 9, 12, 14, 20], [0, 2, 3, 5, 8]):
            logp = make_logp(tokens=bounds[-1])
            got, expected = (
                value_and_grad(lambda x, b, f=f: f(x, b).loss, logp, torch.tensor(bounds, dtype=torch.int32))
                for f in (compiled, reference.slime_terms)
            )
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_errors_of_slime_terms_in_a_graph():
    compiled = torch.compile(sf.slime_terms, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"cu_seqlens: expected to begin at 0 and end at 8 .* got 0 and 9"):
        compiled(make_logp(tokens=8), BOUNDS)
    with pytest.raises(Exception, match="cu_seqlens: expected an even number of sequences"):
        compiled(make_logp(), BOUNDS[:-1])


@pytest.mark.slow
def test_inductor():
    """Both in one graph, between operations that inductor turns into code of its own."""

    def loss(logits: Tensor, labels: Tensor, bounds: Tensor) -> Tensor:
        cross_entropy = sf.cross_entropy(logits * 2, labels)
        return cross_entropy + sf.slime_terms(-logits[0, 0, :9].square(), bounds).loss

    inputs = *make_logits(3, 5, 37), BOUNDS
    # A graph that another version of an operator left in the cache on disk would be taken for this one's.
    with torch._inductor.config.patch(force_disable_caches=True):
        got = value_and_grad(torch.compile(loss, fullgraph=True), *inputs)
    torch.testing.assert_close(got, value_and_grad(loss, *inputs), rtol=1e-12, atol=1e-14)


# --- every loss: recorded by make_fx, run on fake tensors, exported ---


@dataclass(frozen=True)
class Case:
    """A scalar of a public function, its inputs, and which of them carry a gradient."""

    loss: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    wanted: int

    def grads(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """(loss, the gradients)."""
        leaves = [x.detach().requires_grad_() for x in inputs[: self.wanted]]
        loss = self.loss(*leaves, *inputs[self.wanted :])
        return loss, *torch.autograd.grad(loss, leaves)


def cases() -> dict[str, Case]:
    padded, packed = make_batch((4, 3, 5, 2), has_bias=True), pack(make_batch((4, 3, 5, 2), has_bias=True))
    result = {}
    for name in ("slime_loss", "linear_cross_entropy", "linear_logprobs", "sequence_logprobs"):
        for layout, batch in (("padded", padded), ("packed", packed)):

            def loss(hidden, weight, bias, labels, cu_seqlens=None, name=name):
                out = getattr(sf, name)(hidden, weight, labels, bias=bias, cu_seqlens=cu_seqlens, shift=True)
                return out.loss if isinstance(out, sf.SlimeOutput) else out.square().sum()

            bounds = () if batch.cu_seqlens is None else (batch.cu_seqlens,)
            result[f"{name}-{layout}"] = Case(loss, (*batch.tensors().values(), batch.labels, *bounds), 3)
    result["cross_entropy"] = Case(sf.cross_entropy, make_logits(3, 5, 37), 1)
    result["slime_terms"] = Case(lambda *x: sf.slime_terms(*x).loss, (make_logp(), BOUNDS), 1)
    return result


CASES = cases()


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", CASES)
def test_make_fx(name, mode):
    """A recorded forward and backward, run again, gives the numbers of the eager call."""
    case = CASES[name]
    graph = make_fx(case.grads, tracing_mode=mode)(*case.inputs)
    assert any("slime_fused" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(*case.inputs), case.grads(*case.inputs), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("is_inside", [True, False], ids=["in_the_mode", "outside"])
@pytest.mark.parametrize("name", CASES)
def test_fake_tensors(name, is_inside):
    """Shapes and dtypes without data; a tensor that outlives its mode is fake all the same."""
    case = CASES[name]
    expected = case.grads(*case.inputs)
    mode = FakeTensorMode()
    inputs = [mode.from_tensor(x) for x in case.inputs]
    if is_inside:
        with mode:
            got = case.grads(*inputs)
    else:
        got = case.grads(*inputs)
    for fake, real in zip(got, expected, strict=True):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


def test_fake_tensors_of_every_token_loss():
    mode = FakeTensorMode()
    batch = make_batch((4, 3, 5, 2))
    hidden, weight, labels = (mode.from_tensor(x) for x in (batch.hidden, batch.weight, batch.labels))
    assert sf.linear_cross_entropy(hidden, weight, labels, reduction="none").shape == labels.shape
    logits = mode.from_tensor(batch.hidden @ batch.weight.T)
    assert sf.cross_entropy(logits, labels, reduction="none").shape == labels.shape


def test_a_plan_of_fake_tensors_says_what_to_do():
    mode = FakeTensorMode()
    batch = make_batch((4, 3, 5, 2))
    with pytest.raises(ValueError, match=r"labels: expected values to count, got .* call explain_plan outside"):
        sf.explain_plan(*(mode.from_tensor(x) for x in (batch.hidden, batch.weight, batch.labels)))


def test_a_plan_in_a_compiled_function_breaks_the_graph_and_no_more():
    batch = make_batch((4, 3, 5, 2))

    @torch.compile(backend="eager")
    def step(hidden: Tensor) -> tuple[Tensor, str]:
        plan = sf.explain_plan(hidden, batch.weight, batch.labels)
        return sf.linear_cross_entropy(hidden, batch.weight, batch.labels), plan.kind

    loss, kind = step(batch.hidden)
    assert kind == batch.call(sf.explain_plan).kind
    torch.testing.assert_close(loss, batch.call(sf.linear_cross_entropy))


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(make_batch().weight)

        def forward(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            out = sf.slime_loss(hidden, self.weight, labels)
            ce = sf.cross_entropy(hidden @ self.weight.T, labels)
            return out.loss, out.margins, sf.linear_cross_entropy(hidden, self.weight, labels), ce

    batch, model = make_batch(), Model()
    exported = torch.export.export(model, (batch.hidden, batch.labels), strict=strict).module()
    got, expected = (f(batch.hidden, batch.labels) for f in (exported, model))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
