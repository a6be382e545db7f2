"""`accelerate_trl`: its kernel against TRL's own, when it is in use, and what it refuses."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'slime-fused[trl]'")

import trl
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

import slime_fused
from slime_fused.integrations.trl import accelerate_trl, seam
from tests.tiny_models import make_pairs, tiny_llama

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
N, V, D = 50, 37, 8


@pytest.fixture
def kernels():
    with accelerate_trl() as kernels:
        yield kernels


def truth_of(hidden, weight, bias, targets, **transform):
    """The five outputs in float64, from `slime_fused.reference`."""
    hidden, weight = hidden.double(), weight.double()
    bias = None if bias is None else bias.double()
    names = ("entropy", "sum_sq_probs", "mean_logit", "is_top1")
    s = slime_fused.reference.linear_logprobs(hidden, weight, targets, bias=bias, return_stats=names, **transform)
    return s.logps, s.entropy, s.sum_sq_probs.log(), s.mean_logit, s.is_top1


def gradients(outputs, leaves):
    """Of one coefficient per token for the log-prob, and another for its entropy."""
    share = torch.linspace(-1, 1, len(outputs[0]), dtype=outputs[0].dtype)
    return torch.autograd.grad((share * outputs[0]).sum() + (share.flip(0) * outputs[1]).sum(), leaves)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "autocast"),
    [
        (torch.float32, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, None),
        (torch.float16, torch.float16, None),
        (torch.bfloat16, torch.float32, None),  # a head that is kept in float32
        (torch.float32, torch.bfloat16, None),  # hidden states that are cast up for the head
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float64, torch.float64, None),
    ],
    ids=str,
)
def test_every_output_is_as_close_to_float64_as_trls(kernels, hidden_dtype, weight_dtype, autocast, with_bias):
    """Values and gradients, for each dtype that a head may have; transforms with the bias, none without.

    The factor: both round the residual to 16 bits, but in other places (1.7 was seen, of the gradients alone).
    """
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D).to(hidden_dtype), torch.randn(V, D).to(weight_dtype)
    bias = torch.randn(V).to(weight_dtype) if with_bias else None
    targets = torch.randint(0, V, (N,))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    scale, softcap, temperature = (0.7, 5.0, 0.9) if with_bias else (1.0, None, 1.0)
    expected = truth_of(
        hidden, weight, bias, targets, logit_scale=scale, logit_softcap=softcap, temperature=temperature
    )
    expected_grads = gradients(expected, leaves)
    found = []
    for kernel in (ChunkedLogProbFunction, kernels):
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            outputs = kernel.apply(hidden, weight, bias, targets, temperature, 16, softcap, scale, OUTPUTS)
        found.append((outputs, gradients(outputs, leaves)))
    (theirs, their_grads), (ours, our_grads) = found
    assert [(x.dtype, x.requires_grad) for x in ours] == [(x.dtype, x.requires_grad) for x in theirs]
    assert [x.dtype for x in our_grads] == [x.dtype for x in their_grads]
    pairs = [*zip(ours, theirs, expected, strict=True), *zip(our_grads, their_grads, expected_grads, strict=True)]
    for name, (mine, trls, exact) in zip((*OUTPUTS, "dX", "dW", "db"), pairs, strict=False):
        error, allowed = (float((x.double() - exact.double()).norm()) for x in (mine, trls))
        assert error <= 2.5 * allowed + 1e-6 * float(exact.double().norm()), (name, error, allowed)


@pytest.mark.parametrize("outputs", [("log_probs",), ("is_top1",), ("entropy", "log_sum_sq_probs"), OUTPUTS])
def test_what_is_not_asked_for_is_none(kernels, outputs):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(N, D), torch.randn(V, D), torch.randint(0, V, (N,))
    given = (hidden, weight, None, targets, 1.0, 16, None, 1.0)
    theirs, ours = (kernel.apply(*given, outputs) for kernel in (ChunkedLogProbFunction, kernels))
    assert [x is None for x in ours] == [x is None for x in theirs]
    for mine, expected in zip(ours, theirs, strict=True):
        if expected is not None:
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_of_equal_logits_the_first_is_the_likeliest(kernels):
    """TRL's rule, that of argmax. Tokens 1 and 3 have the same logit, the largest."""
    weight = torch.tensor([[0.0], [1.0], [0.5], [1.0]])
    given = (torch.ones(4, 1), weight, None, torch.arange(4), 1.0, 16, None, 1.0, ("is_top1",))
    assert kernels.apply(*given)[-1].tolist() == [False, True, False, False]
    assert ChunkedLogProbFunction.apply(*given)[-1].tolist() == [False, True, False, False]


def test_a_frozen_head_and_a_pass_without_gradients(kernels):
    hidden, weight, targets = torch.randn(N, D, requires_grad=True), torch.randn(V, D), torch.randint(0, V, (N,))
    logps, *_ = kernels.apply(hidden, weight, None, targets, 1.0, 16)
    logps.sum().backward()
    assert hidden.grad.norm() > 0
    assert weight.grad is None
    with torch.no_grad():
        outputs = kernels.apply(hidden, weight, None, targets, 1.0, 16)
    assert not any(x.requires_grad for x in outputs)
    torch.testing.assert_close(outputs[0], logps.detach())


def labelled_batch(model, seed=0):
    """Token ids (3, 9) and labels of their second halves; one sequence has none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (3, 9), generator=generator)
    labels = ids.clone()
    labels[:, :4] = labels[1] = -100
    return ids, labels


def step(model, ids, labels):
    """(outputs, gradients by name) of a model with TRL's fused head."""
    model.zero_grad()
    outputs = model(input_ids=ids, labels=labels, fused_lm_head=True)
    (outputs.loss + outputs.entropy.mean()).backward()
    return outputs, {name: p.grad for name, p in model.named_parameters()}


def assert_same_step(found, expected, tolerance=1e-5):
    for name in ("loss", *OUTPUTS):
        torch.testing.assert_close(found[0][name], expected[0][name], rtol=tolerance, atol=tolerance)
    for name, grad in expected[1].items():
        torch.testing.assert_close(
            found[1][name], grad, rtol=10 * tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("compacts", [False, True], ids=["all rows", "labelled rows"])
@pytest.mark.parametrize("labelled", [True, False], ids=["", "no label"])
def test_in_trls_head(monkeypatch, labelled, compacts):
    """With a scale, a soft cap and a temperature; rows without a label come along on a CPU, and not on a GPU."""
    model = tiny_llama(V)
    model.config.logit_scale, model.config.final_logit_softcapping = 0.5, 4.0
    utils.add_fused_lm_head(model, temperature=0.7, outputs=OUTPUTS)
    ids, labels = labelled_batch(model)
    labels = labels if labelled else torch.full_like(labels, -100)
    monkeypatch.setattr(utils, "_use_triton", lambda device: compacts)
    expected = step(model, ids, labels)
    with accelerate_trl() as kernels:
        found = step(model, ids, labels)
    assert kernels.calls == 1
    assert_same_step(found, expected)
    if labelled:
        assert float(expected[0].loss.detach()) > 0


def test_a_head_cast_to_float32_in_a_16_bit_model():
    """GRPO's `cast_lm_head_to_fp32`, under autocast, which TRL switches off around the head."""
    model = tiny_llama(V).to(torch.bfloat16)
    utils.add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=OUTPUTS)
    ids, labels = labelled_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, ids, labels)
        with accelerate_trl():
            found = step(model, ids, labels)
    torch.testing.assert_close(found[0].log_probs, expected[0].log_probs, rtol=1e-5, atol=1e-5)
    assert found[1]["lm_head.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(found[1]["lm_head.weight"], expected[1]["lm_head.weight"], rtol=1e-2, atol=1e-3)


def test_a_compiled_model_takes_it_into_its_graph():
    """Traced once however often it runs, and traced again when the kernels change."""
    model = tiny_llama(V, num_hidden_layers=1)
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    ids, labels = labelled_batch(model)
    expected = step(model, ids, labels)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def compiled_step():
        outputs = compiled(input_ids=ids, labels=labels, fused_lm_head=True)
        model.zero_grad()
        (outputs.loss + outputs.entropy.mean()).backward()
        return outputs, {name: p.grad for name, p in model.named_parameters()}

    with accelerate_trl() as kernels:
        for _ in range(3):
            assert_same_step(compiled_step(), expected)
        with accelerate_trl(backend="torch") as others:
            assert_same_step(compiled_step(), expected)
    assert (kernels.calls, others.calls) == (1, 1)


def test_options_reach_the_kernels(monkeypatch):
    seen = []
    original = slime_fused.linear_logprobs
    monkeypatch.setattr(slime_fused, "linear_logprobs", lambda *a, **k: seen.append(k) or original(*a, **k))
    hidden, weight, targets = torch.randn(N, D), torch.randn(V, D), torch.randint(0, V, (N,))
    with accelerate_trl(backend="torch", workspace="1MiB") as kernels:
        utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 16)
    assert (seen[0]["backend"], seen[0]["workspace"]) == ("torch", "1MiB")
    assert repr(kernels) == "TrlKernels(backend='torch', workspace='1MiB', calls=1, undone)"


def test_undoing():
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    first = accelerate_trl()
    assert utils._ChunkedLogProbFunction is first
    with accelerate_trl() as second:
        assert utils._ChunkedLogProbFunction is second
        assert first.active
        assert second.active
    assert utils._ChunkedLogProbFunction is first
    first.undo()
    first.undo()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    with pytest.raises(RuntimeError, match="undone; call it again"), first:
        pass
    with pytest.raises(ZeroDivisionError), accelerate_trl():
        raise ZeroDivisionError
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_undoing_out_of_order():
    first, second = accelerate_trl(), accelerate_trl()
    first.undo()
    assert utils._ChunkedLogProbFunction is second
    assert not first.active
    second.undo()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_what_others_have_put_in_its_place_is_left_there(monkeypatch):
    kernels = accelerate_trl()
    with monkeypatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", "theirs")
        for attempt in (kernels.undo, accelerate_trl):
            with pytest.raises(
                RuntimeError, match=r"expected the kernels that accelerate_trl put there, got 'theirs'"
            ):
                attempt()
        assert utils._ChunkedLogProbFunction == "theirs"
    kernels.undo()
    with monkeypatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", "theirs")
        with pytest.raises(RuntimeError, match=r"expected an autograd.Function of TRL, got theirs"):
            accelerate_trl()


class Shorter(torch.autograd.Function):
    """TRL's kernel up to 1.14, without ``outputs``."""

    __module__ = "trl.trainer.utils"

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0): ...


def add_other_head(model):
    """A head that has found its kernel beforehand."""


@pytest.mark.parametrize(
    ("module", "name", "value", "message"),
    [
        (trl, "__version__", "1.14.2", r"expected version 1.15 or 1.16, got 1.14.2"),
        (trl, "__version__", "1.17.0.dev0", r"expected version 1.15 or 1.16, got 1.17.0.dev0"),
        (utils, "_ChunkedLogProbFunction", Shorter, r"expected a forward with the parameters .*'outputs'\), got"),
        (utils, "_ChunkedLogProbFunction", None, r"expected an autograd.Function of TRL, got None"),
        (utils, "add_fused_lm_head", add_other_head, r"expected add_fused_lm_head to call"),
        (
            sys.modules["trl.kernels.chunked_logprob"],
            "OPTIONAL_OUTPUTS",
            ("entropy",),
            r"expected optional outputs",
        ),
    ],
    ids=["1.14", "1.17", "parameters", "no kernel", "head", "outputs"],
)
def test_another_trl_is_refused(monkeypatch, module, name, value, message):
    monkeypatch.setattr(module, name, value)
    before = utils._ChunkedLogProbFunction
    with pytest.raises(RuntimeError, match=f"{message}.*pip install 'trl==1.16"):
        accelerate_trl()
    assert utils._ChunkedLogProbFunction is before
    assert not seam._installed


def test_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'slime-fused\[trl\]'"):
        accelerate_trl()


def test_bad_options_are_refused_at_once(monkeypatch):
    with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of \('cuda', .*got 'fast'"):
        accelerate_trl(backend="fast")
    monkeypatch.setattr(slime_fused, "available_backends", lambda: {"cuda": "no GPU is seen"})
    with pytest.raises(ValueError, match="got 'cuda': no GPU is seen"):
        accelerate_trl(backend="cuda")
    with pytest.raises(ValueError, match=r"workspace: expected .*got 'much'"):
        accelerate_trl(workspace="much")
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_bad_calls_are_refused(kernels):
    hidden, weight, targets = torch.randn(N, D), torch.randn(V, D), torch.randint(0, V, (N,))
    for wrong in (V, -1, -100):
        with pytest.raises(ValueError, match=f"labels: .*{wrong}"):
            kernels.apply(hidden, weight, None, torch.where(targets == targets[7], wrong, targets), 1.0, 16)
    weight.ds_id = 0
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 splits"):
        kernels.apply(hidden, weight, None, targets, 1.0, 16)


def test_the_page(tokenizer, tmp_path):
    """docs/trl_kernels.md, on a tiny model."""
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "trl_kernels.md").read_text()
    from datasets import Dataset

    args = {"max_steps": 1, "use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none"}
    names = {
        "args": trl.DPOConfig(output_dir=str(tmp_path / "out"), save_strategy="no", **args),
        "model": str(tmp_path),
        "tokenizer": tokenizer,
        "pairs": Dataset.from_list(make_pairs(8)),
    }
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
        assert names["kernels"].calls > 0
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
