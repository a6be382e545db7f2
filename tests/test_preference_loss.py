"""Losses of pairs, sequences, tokens and the whole batch against the float64 oracle: every path that they share.

What each formula computes is for `tests/losses`; here every loss meets every plan, dtype and backend.
"""

from __future__ import annotations

import pytest
import torch

import slime_fused as sf
from slime_fused.losses import DPO, KTO, SimPO
from tests.measure import count_products, memory_of
from tests.support import BACKENDS, DTYPES, assert_as_exact_as_plain, make_batch, pack, require_backend, run
from tests.unit_loss_cases import CASES, PREFERENCE, options_of, plan_of

KINDS = ("one", "several", "least")
HEAD = {"logit_scale": 1.5, "logit_softcap": 8.0, "temperature": 0.7}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name, dtype, kind, backend):
    case, batch = CASES[name], make_batch(dtype=dtype)
    workspace, plan = plan_of(kind, batch.leaves(), case.value)
    assert plan.kind == expected_plan(case.value, kind)
    options = options_of(case, batch)
    how = {"backend": backend, "workspace": workspace, "roundings": case.roundings}
    assert_as_exact_as_plain(case.fused, case.plain, batch, options=options, **how)


def expected_plan(loss, kind: str) -> str:
    if kind == "one" or (loss.unit == "token" and not loss.needs_batch):
        return "stream"
    return "stream" if kind == "several" and not loss.needs_batch else "resweep"


# Each feature above the chunks, with all of the head's: one plan of several chunks shows it.
LAYOUTS = {
    "padded": ({"has_bias": True}, {}),
    "packed": ({"has_bias": True}, {}),
    "shift": ({"has_bias": True, "prompt": 0}, {"shift": True}),
    "packed_shift": ({"prompt": 1}, {"shift": True}),
    "every_row_labelled": ({"lengths": (5,) * 6, "prompt": 0, "padding": 0}, {}),
    "pad_token_is_ignored": ({"ignore_index": 5}, {}),
    "one_pair": ({"lengths": (3, 2)}, {}),
    "one_token_each": ({"lengths": (1,) * 6, "prompt": 0, "padding": 0}, {}),
    "as_many_sequences_as_pairs_and_tokens": ({"lengths": (1, 1), "prompt": 0, "padding": 0}, {}),
}


@pytest.mark.parametrize("kind", ["several", "least"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_layouts(name, layout, kind):
    how, options = LAYOUTS[layout]
    batch = make_batch(dtype=torch.float32, **how)
    batch = pack(batch) if layout.startswith("packed") else batch
    case = CASES[name]
    workspace, _ = plan_of(kind, batch.leaves(), case.value, **options)
    options = {**options_of(case, batch), **options, **HEAD}
    how = {"workspace": workspace, "upstream": -1.5, "roundings": case.roundings}
    assert_as_exact_as_plain(case.fused, case.plain, batch, options=options, **how)


@pytest.mark.parametrize("wanted", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias")], ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_wanted_gradients(name, kind, wanted):
    case, batch = CASES[name], make_batch(dtype=torch.float32, has_bias=True)
    workspace, _ = plan_of(kind, batch.leaves(wanted), case.value)
    options = options_of(case, batch)
    how = {"workspace": workspace, "wanted": wanted, "roundings": case.roundings}
    assert_as_exact_as_plain(case.fused, case.plain, batch, options=options, **how)


@pytest.mark.parametrize("name", CASES)
def test_a_token_layout_gives_the_same(name):
    case, batch = CASES[name], make_batch(has_bias=True, prompt=1)
    options = options_of(case, batch)
    layout = sf.token_layout(batch.labels, shift=True)
    got = case.fused(batch.hidden, batch.weight, layout, bias=batch.bias, workspace=4000, **options)
    expected = batch.call(case.fused, shift=True, workspace=4000, **options)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.mean_logps, expected.mean_logps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CASES)
def test_autocast_is_the_call_on_cast_tensors(name, dtype):
    case, batch = CASES[name], make_batch(dtype=torch.float32, has_bias=True)
    options = options_of(case, batch)
    with torch.autocast("cpu", dtype):
        got = run(case.fused, batch, workspace=4000, **options)
    cast = batch.to(dtype)
    expected = run(case.fused, cast, workspace=4000, **options)
    # The bias is added before it is rounded to 16 bits in one and after in the other.
    for key, value in expected.outputs.items():
        torch.testing.assert_close(got.outputs[key], value, rtol=2e-2, atol=2e-2, msg=key)
    assert all(grad.dtype == torch.float32 for grad in got.grads.values())


@pytest.mark.parametrize("name", ["dpo", "kto_batch", "grpo"])
def test_float16_takes_a_scalers_factor(name):
    """The gradients of a batch mean may lie below float16's smallest number before they are scaled."""
    case, batch = CASES[name], make_batch(dtype=torch.float16)
    options = options_of(case, batch)
    for upstream in (65536.0, 2.0**-20):
        for kind in KINDS:
            workspace, _ = plan_of(kind, batch.leaves(), case.value)
            scaled = batch.to(torch.float32).to(torch.float16)
            how = {"workspace": workspace, "upstream": upstream / 128, "roundings": case.roundings}
            assert_as_exact_as_plain(case.fused, case.plain, scaled, options=options, **how)


@pytest.mark.parametrize("name", CASES)
def test_a_kept_graph_gives_the_same_again(name):
    case, leaves = CASES[name], make_batch(has_bias=True).leaves()
    loss = leaves.call(case.fused, workspace=4000, **options_of(case, leaves)).loss
    tensors = list(leaves.tensors().values())
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    again = torch.autograd.grad(loss, tensors, torch.tensor(2.0, dtype=loss.dtype))
    for one, two in zip(first, again, strict=True):
        torch.testing.assert_close(two, 2 * one, rtol=1e-13, atol=0)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("name", ["dpo", "kto", "own_tokens", "gspo"])
def test_given_tensors_of_any_strides_and_kinds(name):
    case, batch = CASES[name], make_batch()
    options = options_of(case, batch)
    expected = batch.call(case.fused, **options).loss

    def strided(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, dim=-1)[..., ::2] if x.dim() else x

    def lazily_negative(x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype == torch.bool else torch.complex(x * 0, -x).conj().imag

    def grown(x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype == torch.bool else x.clone().requires_grad_()

    for change in (strided, lazily_negative, grown):
        changed = {
            k: change(v) if isinstance(v, torch.Tensor) else v for k, v in options.items() if k not in ("extra",)
        }
        if "extra" in options:
            changed["extra"] = {k: change(v) for k, v in options["extra"].items()}
        assert torch.equal(batch.call(case.fused, **changed).loss, expected), change.__name__


@pytest.mark.parametrize("name", CASES)
def test_another_default_device(name):
    case, batch = CASES[name], make_batch()
    options = options_of(case, batch)
    expected = run(case.fused, batch, workspace=3000, **options)
    with torch.device("meta"):
        leaves = batch.leaves()
        loss = leaves.call(case.fused, workspace=3000, **options).loss
    loss.backward()
    assert torch.equal(loss.detach(), expected.outputs["loss"])


# --- what it costs ---


@pytest.mark.parametrize("name", CASES)
def test_products_are_as_planned(name, backend):
    """Three products, two with either side frozen, one for evaluation; four where logits come twice."""
    case, batch = CASES[name], make_batch(vocab_size=257, hidden_size=4, has_bias=True)
    options = options_of(case, batch)
    for wanted, streamed in ((("hidden", "weight", "bias"), 3), (("hidden",), 2), (("weight",), 2), ((), 1)):
        for kind in KINDS:
            leaves = batch.leaves(wanted)
            workspace, plan = plan_of(kind, leaves, case.value)
            with count_products(vocab_size=257, hidden_size=4) as counted:
                out = leaves.call(case.fused, backend=backend, workspace=workspace, **options)
                if wanted:
                    out.loss.backward()
            assert counted.flops == plan.flops, plan
            if plan.kind in ("stream", "eval"):
                assert plan.products == streamed, plan


def test_the_plan_of_a_loss_of_the_whole_batch_says_so():
    leaves = make_batch().leaves()
    loss = KTO(baseline="batch")
    fits, tight = (plan_of(kind, leaves, loss)[1] for kind in ("one", "several"))
    assert (fits.kind, len(fits.chunks), fits.products) == ("stream", 1, 3)
    assert (tight.kind, tight.products) == ("resweep", 4)
    assert "batch" in str(tight)
    assert plan_of("several", leaves, KTO())[1].kind == "stream"


@pytest.mark.parametrize("name", ["slime", "dpo", "simpo", "kto", "sft", "grpo"])
def test_peak_memory(name):
    """1024 tokens x 50257 x 64 in 8 MiB, SLIME and others: a few numbers per token beside it."""
    batch = make_batch((16,) * 64, prompt=0, padding=0, hidden_size=64, vocab_size=50257).to(torch.float32)
    leaves, case = batch.leaves(("hidden", "weight")), CASES[name]
    options = options_of(case, batch)
    peak, _ = memory_of(lambda: leaves.call(case.fused, workspace="8MiB", **options))
    gradients = sum(x.nbytes for x in leaves.tensors().values())
    assert 2**22 < peak - gradients < 2**23 + 2**19


@pytest.mark.parametrize("loss", [DPO(), SimPO()], ids=lambda loss: loss.name)
def test_slime_is_a_loss_among_others(loss):
    """Every plan of a loss of pairs is SLIME's."""
    leaves = make_batch().leaves()
    for workspace in (1500, 4000, "1GiB"):
        assert leaves.call(sf.explain_plan, loss=loss, workspace=workspace) == leaves.call(
            sf.explain_plan, workspace=workspace
        )


def test_every_shipped_loss_is_here():
    shipped = {
        cls for cls in vars(sf.losses).values() if isinstance(cls, type) and issubclass(cls, sf.losses.Formula)
    }
    assert {type(case.value) for case in CASES.values()} >= shipped - {sf.losses.Formula}
    assert {case.value.unit for case in PREFERENCE.values()} == {"pair", "sequence", "token"}
