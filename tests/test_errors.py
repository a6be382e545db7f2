"""What bad input gets: before any kernel runs, a message with the argument, what was expected, and what came."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import slime_fused as sf
from slime_fused.backends import get_backend
from tests.support import BACKENDS, Batch, make_batch, pack

LINEAR = {
    "slime_loss": sf.slime_loss,
    "linear_logprobs": sf.linear_logprobs,
    "sequence_logprobs": sf.sequence_logprobs,
    "linear_cross_entropy": sf.linear_cross_entropy,
    "explain_plan": sf.explain_plan,
}


@pytest.fixture(params=LINEAR)
def function(request):
    return LINEAR[request.param]


@pytest.fixture
def batch() -> Batch:
    return make_batch(hidden_size=12, dtype=torch.float32, has_bias=True)


@pytest.fixture
def no_kernels(monkeypatch):
    """Any kernel or matrix product fails the test."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a kernel ran before the arguments were checked")

    for name in BACKENDS:
        for kernel in ("softmax_residual", "logits_stats", "residual_from_stats", "slime_terms"):
            monkeypatch.setattr(type(get_backend(name)), kernel, refuse)
    monkeypatch.setattr("slime_fused.engine.products.write_logits", refuse)


# case -> (changed tensors, error, argument, expected (pattern), got (pattern)); the batch is (6, 9, 12), V = 37.
TENSORS = {
    "hidden_is_a_list": (lambda b: {"hidden": [1.0]}, TypeError, "hidden", "Tensor", "list"),
    "weight_is_none": (lambda b: {"weight": None}, TypeError, "weight", "Tensor", "NoneType"),
    "labels_are_a_list": (lambda b: {"labels": b.labels.tolist()}, TypeError, "labels", "Tensor", "list"),
    "bias_is_a_float": (lambda b: {"bias": 0.0}, TypeError, "bias", "Tensor", "float"),
    "bounds_are_a_list": (
        lambda b: {**vars(pack(b)), "cu_seqlens": [0, 8]},
        TypeError,
        "cu_seqlens",
        "Tensor",
        "list",
    ),
    "hidden_is_integer": (lambda b: {"hidden": b.hidden.long()}, TypeError, "hidden", "floating", "int64"),
    "hidden_is_complex": (
        lambda b: {"hidden": b.hidden.to(torch.complex64)},
        TypeError,
        "hidden",
        "floating",
        "complex64",
    ),
    "hidden_is_a_vector": (lambda b: {"hidden": b.hidden[0, 0]}, ValueError, "hidden", r"\(S, T, D\)", r"\(12,\)"),
    "weight_is_transposed": (lambda b: {"weight": b.weight.T}, ValueError, "weight", "D = 12", r"\(12, 37\)"),
    "weight_is_a_vector": (lambda b: {"weight": b.weight[0]}, ValueError, "weight", r"\(V, D\)", r"\(12,\)"),
    "weight_has_no_rows": (lambda b: {"weight": b.weight[:0]}, ValueError, "weight", "one row", r"\(0, 12\)"),
    "weight_has_another_dtype": (
        lambda b: {"weight": b.weight.bfloat16()},
        ValueError,
        "weight",
        "float32",
        "bfloat16.*autocast",
    ),
    "bias_has_another_dtype": (lambda b: {"bias": b.bias.double()}, ValueError, "bias", "float32", "float64"),
    "hidden_holds_no_data": (lambda b: {"hidden": b.hidden.to("meta")}, ValueError, "hidden", "data", "meta"),
    "weight_is_elsewhere": (lambda b: {"weight": b.weight.to("meta")}, ValueError, "weight", "cpu", "meta"),
    "bias_is_elsewhere": (lambda b: {"bias": b.bias.to("meta")}, ValueError, "bias", "cpu", "meta"),
    "labels_are_elsewhere": (lambda b: {"labels": b.labels.to("meta")}, ValueError, "labels", "cpu", "meta"),
    "bias_is_short": (lambda b: {"bias": b.bias[:-1]}, ValueError, "bias", r"\(37,\)", r"\(36,\)"),
    "labels_are_short": (lambda b: {"labels": b.labels[:, 1:]}, ValueError, "labels", r"\(6, 9\)", r"\(6, 8\)"),
    "labels_are_floats": (lambda b: {"labels": b.labels.float()}, TypeError, "labels", "int64", "float32"),
    "labels_are_bools": (lambda b: {"labels": b.labels > 0}, TypeError, "labels", "int64", "bool"),
    "label_is_v": (
        lambda b: {"labels": b.labels.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(37))},
        ValueError,
        "labels",
        r"\[0, 37\)",
        r"37 at position \(1, 3\)",
    ),
    "label_is_negative": (
        lambda b: {"labels": b.labels.index_put((torch.tensor(5), torch.tensor(2)), torch.tensor(-1))},
        ValueError,
        "labels",
        "ignore_index",
        r"-1 at position \(5, 2\)",
    ),
    "padded_with_bounds": (
        lambda b: {"cu_seqlens": torch.tensor([0, 54], dtype=torch.int32)},
        ValueError,
        "hidden",
        r"\(N, D\)",
        r"\(6, 9, 12\)",
    ),
    "bounds_are_floats": (
        lambda b: {**vars(pack(b)), "cu_seqlens": torch.tensor([0.0, 48.0])},
        TypeError,
        "cu_seqlens",
        "int32",
        "float32",
    ),
    "bounds_are_a_matrix": (
        lambda b: {**vars(pack(b)), "cu_seqlens": torch.tensor([[0, 48]])},
        ValueError,
        "cu_seqlens",
        r"\(S \+ 1,\)",
        r"\(1, 2\)",
    ),
    "bounds_are_empty": (
        lambda b: {**vars(pack(b)), "cu_seqlens": torch.tensor([], dtype=torch.int32)},
        ValueError,
        "cu_seqlens",
        r"\(S \+ 1,\)",
        r"\(0,\)",
    ),
    "bounds_begin_late": (
        lambda b: {**vars(pack(b)), "cu_seqlens": torch.tensor([8, 40, 48])},
        ValueError,
        "cu_seqlens",
        "begin at 0 and end at 48",
        "8 and 48",
    ),
    "bounds_end_early": (
        lambda b: {**vars(pack(b)), "cu_seqlens": torch.tensor([0, 24, 47])},
        ValueError,
        "cu_seqlens",
        "begin at 0 and end at 48",
        "0 and 47",
    ),
    "bounds_end_late": (
        lambda b: {**vars(pack(b)), "cu_seqlens": torch.tensor([0, 24, 49])},
        ValueError,
        "cu_seqlens",
        "begin at 0 and end at 48",
        "0 and 49",
    ),
    "bounds_end_beyond_int32": (
        lambda b: {**vars(pack(b)), "cu_seqlens": torch.tensor([0, 24, 2**32 + 48])},
        ValueError,
        "cu_seqlens",
        "begin at 0 and end at 48",
        "0 and 2147483647",
    ),
    "bounds_decrease": (
        lambda b: {**vars(pack(b)), "cu_seqlens": torch.tensor([0, 30, 20, 40, 48])},
        ValueError,
        "cu_seqlens",
        "non-decreasing",
        "30 then 20 at index 1",
    ),
    "bounds_run_outside": (
        lambda b: {**vars(pack(b)), "cu_seqlens": torch.tensor([0, 100, 40, 48, 48])},
        ValueError,
        "cu_seqlens",
        "non-decreasing",
        "100 then 40",
    ),
}


def assert_refused(call, error, argument, expected, got):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert re.match(f"{argument}: expected .*{expected}.*{got}", message, re.DOTALL), message


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(
    ("case", "autocast"),
    # Under autocast dtypes that differ are no error.
    [(c, on) for c in TENSORS for on in (False, True) if not (on and c.endswith("another_dtype"))],
)
def test_tensors(case, autocast, function, batch):
    change, error, argument, expected, got = TENSORS[case]
    bad = replace(batch, **change(batch))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_refused(lambda: bad.call(function), error, argument, expected, got)


OPTIONS = [
    ({"logit_scale": float("nan")}, ValueError, "logit_scale", "finite", "nan"),
    ({"logit_scale": "1"}, TypeError, "logit_scale", "finite", "'1'"),
    ({"logit_softcap": 0.0}, ValueError, "logit_softcap", "> 0", "0.0"),
    ({"logit_softcap": -30.0}, ValueError, "logit_softcap", "> 0", "-30.0"),
    ({"logit_softcap": float("inf")}, ValueError, "logit_softcap", "> 0", "inf"),
    ({"workspace": 0}, ValueError, "workspace", "positive", "0"),
    ({"workspace": -5}, ValueError, "workspace", "positive", "-5"),
    ({"workspace": "many"}, ValueError, "workspace", "512MiB", "'many'"),
    ({"workspace": "0MiB"}, ValueError, "workspace", "512MiB", "'0MiB'"),
    ({"workspace": "5 parsecs"}, ValueError, "workspace", "512MiB", "'5 parsecs'"),
    ({"workspace": 1e9}, TypeError, "workspace", "bytes", "1000000000.0"),
    ({"workspace": None}, TypeError, "workspace", "bytes", "None"),
    ({"workspace": 159}, ValueError, "workspace", "at least 160 bytes", "159"),
    ({"backend": "cublas"}, ValueError, "backend", "'auto'.*'cpu'", "'cublas'"),
]


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(("options", "error", "argument", "expected", "got"), OPTIONS, ids=lambda x: str(x)[:30])
def test_options(options, error, argument, expected, got, function, batch):
    assert_refused(lambda: batch.call(function, **options), error, argument, expected, got)


def test_the_least_workspace_that_is_named_works(function, batch):
    batch.call(function, workspace=160)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_cannot_run_says_which_and_why(name, function, batch, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"backend: '{name}' cannot run on cpu .*{name}: .+available_backends"):
        batch.call(function, backend=name)


@pytest.mark.parametrize("name", [*BACKENDS, "auto"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_dtype_that_no_backend_takes(dtype, name, function, batch):
    with pytest.raises(ValueError, match=r"backend: .*cannot run on cpu with torch\.float8"):
        batch.to(dtype).call(function, backend=name)


@pytest.mark.usefixtures("no_kernels")
class TestPairs:
    def test_odd_number_of_sequences(self, batch):
        odd = replace(batch, hidden=batch.hidden[:5], labels=batch.labels[:5])
        for bad in (odd, pack(odd)):
            assert_refused(lambda bad=bad: bad.call(sf.slime_loss), ValueError, "labels", "even number", "got 5")
            assert_refused(lambda bad=bad: bad.call(sf.explain_plan), ValueError, "labels", "even number", "got 5")

    def test_no_pair(self, batch):
        none = replace(batch, hidden=batch.hidden[:0], labels=batch.labels[:0])
        for bad in (none, pack(none)):
            assert_refused(
                lambda bad=bad: bad.call(sf.slime_loss), ValueError, "labels", "at least one pair", "none"
            )

    def test_no_positions(self, batch):
        bad = replace(batch, hidden=batch.hidden[:, :0], labels=batch.labels[:, :0])
        assert_refused(lambda: bad.call(sf.slime_loss), ValueError, "labels", "at least one label", "none")

    def test_all_ignored(self, batch):
        bad = replace(batch, labels=torch.full_like(batch.labels, -100))
        for function in (sf.slime_loss, sf.linear_cross_entropy):
            assert_refused(lambda f=function: bad.call(f), ValueError, "labels", "at least one label", "none")

    @pytest.mark.parametrize(
        ("row", "name"), [(1, "chosen response of pair 1"), (3, "rejected response of pair 0")]
    )
    @pytest.mark.parametrize("packed", [False, True])
    def test_an_empty_response_names_its_row(self, row, name, packed, batch):
        labels = batch.labels.clone()
        labels[row] = -100
        bad = replace(batch, labels=labels)
        bad = pack(bad) if packed else bad
        assert_refused(
            lambda: bad.call(sf.slime_loss), ValueError, "labels", "every response", f"row {row}.*{name}"
        )

    def test_a_response_that_the_shift_empties(self, batch):
        labels = torch.full_like(batch.labels, -100)
        labels[:, 0] = 3
        bad = replace(batch, labels=labels)
        assert_refused(lambda: bad.call(sf.slime_loss, shift=True), ValueError, "labels", "at least one", "none")

    def test_hidden_without_sequences(self, batch):
        flat = replace(batch, hidden=batch.hidden[0], labels=batch.labels[0])
        assert_refused(lambda: flat.call(sf.slime_loss), ValueError, "hidden", "with cu_seqlens", r"\(9, 12\)")

    def test_config_of_another_type(self, batch):
        assert_refused(
            lambda: batch.call(sf.slime_loss, config={"kappa": 1}), TypeError, "config", "SlimeLossConfig", "dict"
        )


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(
    ("options", "error", "argument", "expected", "got"),
    [
        ({"reduction": "average"}, ValueError, "reduction", "'mean'", "'average'"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing", r"\[0, 1\]", "-0.1"),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing", r"\[0, 1\]", "1.1"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing", r"\[0, 1\]", "nan"),
        ({"z_loss": -1.0}, ValueError, "z_loss", ">= 0", "-1.0"),
        ({"z_loss": float("inf")}, ValueError, "z_loss", ">= 0", "inf"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_cross_entropy_options(options, error, argument, expected, got, batch):
    logits = torch.zeros(*batch.labels.shape, 37)
    assert_refused(lambda: batch.call(sf.linear_cross_entropy, **options), error, argument, expected, got)
    assert_refused(lambda: sf.cross_entropy(logits, batch.labels, **options), error, argument, expected, got)


def test_sequence_reduction(batch):
    with pytest.raises(ValueError, match=r"reduction: expected .*'sum'.* got 'none'"):
        batch.call(sf.sequence_logprobs, reduction="none")


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(
    ("logits", "labels", "options", "error", "argument", "expected", "got"),
    [
        ([1.0], torch.tensor([0]), {}, TypeError, "logits", "Tensor", "list"),
        (torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 1]), {}, TypeError, "logits", "floating", "int64"),
        (torch.zeros(2, 0), torch.tensor([0, 1]), {}, ValueError, "logits", "V > 0", r"\(2, 0\)"),
        (torch.zeros(2, 3), torch.tensor([0]), {}, ValueError, "labels", r"\(2,\) \(logits", r"\(1,\)"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), {}, TypeError, "labels", "int64", "float32"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), {}, ValueError, "labels", r"\[0, 3\)", "3 at position 1"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), {"backend": "x"}, ValueError, "backend", "'auto'", "'x'"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), {"logit_softcap": 0}, ValueError, "logit_softcap", "> 0", "0"),
    ],
    ids=lambda x: str(x)[:24] if isinstance(x, (str, dict)) else "",
)
def test_cross_entropy_of_logits(logits, labels, options, error, argument, expected, got):
    assert_refused(lambda: sf.cross_entropy(logits, labels, **options), error, argument, expected, got)


BOUNDS = torch.tensor([0, 2, 4], dtype=torch.int32)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(
    ("logp", "bounds", "options", "error", "argument", "expected", "got"),
    [
        ([0.0], BOUNDS, {}, TypeError, "logp", "Tensor", "list"),
        (torch.zeros(4).bfloat16(), BOUNDS, {}, TypeError, "logp", "float32 or float64", "bfloat16"),
        (torch.zeros(2, 2), BOUNDS, {}, ValueError, "logp", r"\(N,\)", r"\(2, 2\)"),
        (torch.zeros(4), [0, 2, 4], {}, TypeError, "cu_seqlens", "Tensor", "list"),
        (torch.zeros(4), BOUNDS.float(), {}, TypeError, "cu_seqlens", "int32", "float32"),
        (torch.zeros(4), BOUNDS[:1], {}, ValueError, "cu_seqlens", "at least one pair", "none"),
        (torch.zeros(4), BOUNDS[:2], {}, ValueError, "cu_seqlens", "even number", "1"),
        (torch.zeros(5), BOUNDS, {}, ValueError, "cu_seqlens", "end at 5", "0 and 4"),
        (
            torch.zeros(4),
            torch.tensor([0, 2, 2**32 + 4]),
            {},
            ValueError,
            "cu_seqlens",
            "end at 4",
            "0 and 2147483647",
        ),
        (torch.zeros(4), torch.tensor([1, 2, 4]), {}, ValueError, "cu_seqlens", "begin at 0", "1 and 4"),
        (torch.zeros(4), torch.tensor([0, 4, 4]), {}, ValueError, "cu_seqlens", "hold a token", "0 in row 1"),
        (torch.zeros(4), torch.tensor([0, 5, 4]), {}, ValueError, "cu_seqlens", "hold a token", "-1 in row 1"),
        (torch.zeros(4), BOUNDS, {"config": {}}, TypeError, "config", "SlimeLossConfig", "dict"),
        (torch.zeros(4), BOUNDS, {"config": "token"}, TypeError, "config", "SlimeLossConfig", "str"),
        (torch.zeros(4), BOUNDS, {"backend": "x"}, ValueError, "backend", "'auto'", "'x'"),
    ],
    ids=lambda x: str(x)[:24] if isinstance(x, (str, dict)) else "",
)
def test_slime_terms(logp, bounds, options, error, argument, expected, got):
    assert_refused(lambda: sf.slime_terms(logp, bounds, **options), error, f"({argument})", expected, got)


def test_explain_plan_names_its_losses(batch):
    with pytest.raises(ValueError, match=r"loss: expected one of .*'cross_entropy'.* got 'dpo'"):
        batch.call(sf.explain_plan, loss="dpo")
