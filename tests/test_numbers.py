"""Options that are numbers, flags or labels: what passes, and what is refused by name before any kernel runs."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import slime_fused as sf
from slime_fused import reference
from tests.support import BACKENDS, make_batch, require_backend

LINEAR = ("slime_loss", "linear_logprobs", "sequence_logprobs", "linear_cross_entropy")
CALLS = (*LINEAR, "explain_plan", "cross_entropy")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return require_backend(request.param)


def caller(name: str, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    """The public function on a small batch, options left to give."""
    batch = make_batch((4, 3, 5, 2), dtype=dtype)
    if name == "cross_entropy":
        logits = batch.hidden @ batch.weight.T
        return lambda **options: sf.cross_entropy(logits, batch.labels, **options)
    return lambda **options: batch.call(getattr(sf, name), **options)


def value_of(out: Any) -> Tensor:
    return out.loss if isinstance(out, sf.SlimeOutput) else out


INT64 = 2**63
EVERYWHERE = [
    ("ignore_index", 1.5, TypeError, "an int"),
    ("ignore_index", "a", TypeError, "an int"),
    ("ignore_index", None, TypeError, "an int"),
    ("ignore_index", True, TypeError, "an int"),
    ("ignore_index", np.float64(-100), TypeError, "an int"),
    ("ignore_index", torch.tensor(-100), TypeError, "an int"),
    ("ignore_index", 2**70, ValueError, "an int64"),
    ("ignore_index", INT64, ValueError, "an int64"),
    ("ignore_index", -INT64 - 1, ValueError, "an int64"),
    ("logit_scale", True, TypeError, "a finite number"),
    ("logit_scale", np.True_, TypeError, "a finite number"),
    ("logit_scale", None, TypeError, "a finite number"),
    ("logit_scale", [1.0], TypeError, "a finite number"),
    ("logit_scale", 1j, TypeError, "a finite number"),
    ("logit_scale", torch.tensor(1.0), TypeError, "a finite number"),
    ("logit_scale", math.inf, ValueError, "a finite number"),
    ("logit_scale", -math.inf, ValueError, "a finite number"),
    ("logit_scale", np.float32("nan"), ValueError, "a finite number"),
    ("logit_scale", 1e300, ValueError, r"a finite number .* 3\.4e\+38"),
    ("logit_scale", -1e300, ValueError, r"a finite number .* 3\.4e\+38"),
    ("logit_scale", 10**400, ValueError, r"a finite number .* 3\.4e\+38"),
    ("logit_softcap", "30", TypeError, "None or a number > 0"),
    ("logit_softcap", True, TypeError, "None or a number > 0"),
    ("logit_softcap", math.nan, ValueError, "None or a number > 0"),
    ("logit_softcap", 1e300, ValueError, r"None or a number > 0 .*8\.51e\+37"),
    ("logit_softcap", 1e-300, ValueError, r"None or a number > 0 from 1\.18e-38"),
    ("backend", None, ValueError, "one of"),
    ("backend", ["cpu"], ValueError, "one of"),
]
LINEAR_ONLY = [
    ("shift", "no", TypeError, "True or False"),
    ("shift", 0, TypeError, "True or False"),
    ("shift", None, TypeError, "True or False"),
    ("shift", torch.tensor(True), TypeError, "True or False"),
    ("workspace", True, TypeError, "'auto', bytes"),
    ("workspace", np.float64(1e9), TypeError, "'auto', bytes"),
]
TOKEN_LOSS = [
    ("label_smoothing", "a", TypeError, r"a number in \[0, 1\]"),
    ("label_smoothing", None, TypeError, r"a number in \[0, 1\]"),
    ("label_smoothing", True, TypeError, r"a number in \[0, 1\]"),
    ("label_smoothing", torch.tensor(0.1), TypeError, r"a number in \[0, 1\]"),
    ("z_loss", "a", TypeError, "a finite number >= 0"),
    ("z_loss", True, TypeError, "a finite number >= 0"),
    ("z_loss", 1e300, ValueError, "a finite number >= 0"),
    ("z_loss", math.nan, ValueError, "a finite number >= 0"),
    ("reduction", None, ValueError, "one of"),
    ("reduction", 1, ValueError, "one of"),
]
REFUSED = [
    *[(name, *case) for name in CALLS for case in EVERYWHERE],
    *[(name, *case) for name in CALLS if name != "cross_entropy" for case in LINEAR_ONLY],
    *[(name, *case) for name in ("linear_cross_entropy", "cross_entropy") for case in TOKEN_LOSS],
    *[("cross_entropy", "inplace_backward", x, TypeError, "True or False") for x in ("yes", 1, None)],
]


@pytest.mark.parametrize(("name", "argument", "value", "error", "expected"), REFUSED, ids=lambda x: str(x)[:16])
def test_refused(name, argument, value, error, expected, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a kernel ran before the arguments were checked")

    for kernel in ("softmax_residual", "logits_stats", "residual_from_stats"):
        monkeypatch.setattr(f"slime_fused.backends.cpu.CpuBackend.{kernel}", refuse)
    call = caller(name)
    with pytest.raises(error, match=f"^{argument}: expected {expected}.*got") as caught:
        call(**{argument: value})
    if not isinstance(value, Tensor):
        assert repr(value) in str(caught.value) or str(value) in str(caught.value)


@pytest.mark.parametrize("name", LINEAR)
def test_numpy_numbers_pass(name, backend):
    call = caller(name)
    plain = {"shift": True, "ignore_index": -100, "logit_scale": 0.5, "logit_softcap": 9, "workspace": 37 * 4 * 9}
    numbers = {
        "shift": np.True_,
        "ignore_index": np.int64(-100),
        "logit_scale": np.float32(0.5),
        "logit_softcap": np.int32(9),
        "workspace": np.int64(37 * 4 * 9),
    }
    assert torch.equal(value_of(call(**numbers, backend=backend)), value_of(call(**plain, backend=backend)))


@pytest.mark.parametrize("name", ["linear_cross_entropy", "cross_entropy"])
def test_numpy_and_exact_numbers_pass_in_token_losses(name, backend):
    call = caller(name)
    plain = call(label_smoothing=0.25, z_loss=0.5, ignore_index=-100, logit_scale=2.0, backend=backend)
    other = call(
        label_smoothing=np.float16(0.25),
        z_loss=Fraction(1, 2),
        ignore_index=np.int16(-100),
        logit_scale=np.int8(2),
        backend=backend,
    )
    assert torch.equal(other, plain)


def test_numpy_flags_pass(backend):
    call = caller("cross_entropy")
    assert torch.equal(call(inplace_backward=np.True_, backend=backend), call(backend=backend))


@pytest.mark.parametrize("ignore_index", [INT64 - 1, -INT64, 0, 36])
def test_any_int64_may_be_ignored(ignore_index, backend):
    batch = make_batch((4, 3, 5, 2), ignore_index=ignore_index)
    logits = batch.hidden @ batch.weight.T
    options = {"reduction": "none", "ignore_index": ignore_index}
    expected = reference.cross_entropy(logits, batch.labels, **options)
    for got in (
        sf.cross_entropy(logits, batch.labels, backend=backend, **options),
        sf.linear_cross_entropy(batch.hidden, batch.weight, batch.labels, backend=backend, **options),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"logit_scale": 0.0},
        {"logit_scale": -2.0},
        {"logit_scale": 1e-300},
        {"logit_scale": 3e38, "logit_softcap": 5.0},
        {"logit_softcap": 8e37},
        {"logit_softcap": 1.2e-38},
        {"logit_scale": 1e-30, "logit_softcap": 1e30},
        {"logit_scale": 1e30, "logit_softcap": 1e-30},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["linear_cross_entropy", "cross_entropy"])
def test_extreme_scales_that_fit_are_pytorch_s(name, options, backend):
    """What the range lets through must not turn into NaN where PyTorch has a number."""
    batch = make_batch((4, 3, 5, 2), dtype=torch.float32)
    results = []
    for module, extra in ((sf, {"backend": backend}), (reference, {})):
        leaf = batch.hidden.clone().requires_grad_()
        x = (leaf, batch.weight) if name == "linear_cross_entropy" else (leaf @ batch.weight.T,)
        loss = getattr(module, name)(*x, batch.labels, **options, **extra)
        results.append((loss.detach(), *torch.autograd.grad(loss, [leaf])))
    assert all(torch.isfinite(x).all() for x in results[1])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    largest = results[1][1].abs().max().item()
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5 * largest)


def test_float64_takes_its_own_range(backend):
    call = caller("cross_entropy", torch.float64)
    assert call(logit_scale=1e300, logit_softcap=5.0, backend=backend).isfinite()
    with pytest.raises(ValueError, match=r"logit_scale: expected a finite number .*1\.8e\+308"):
        call(logit_scale=10**400, backend=backend)


FIELDS = ("lambda_w", "lambda_l", "lambda_d", "delta", "margin_hard", "margin_soft", "kappa", "power")


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (True, TypeError, "a number"),
        (np.True_, TypeError, "a number"),
        ("1", TypeError, "a number"),
        (None, TypeError, "a number"),
        (1j, TypeError, "a number"),
        (torch.tensor(1.5), TypeError, "a number"),
        (math.inf, ValueError, "a finite number"),
        (np.float32("nan"), ValueError, "a finite number"),
        (10**400, ValueError, "a finite number"),
    ],
    ids=lambda x: str(x)[:12],
)
def test_hyperparameters_that_are_refused(name, value, error, expected):
    with pytest.raises(error, match=f"{name}: expected {expected}, got"):
        sf.SlimeLossConfig(**{name: value})


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [np.float32(1.5), np.float64(1.5), Fraction(3, 2), np.float16(1.5)], ids=repr)
def test_hyperparameters_become_python_numbers(name, value):
    config = sf.SlimeLossConfig(**{name: value})
    assert type(getattr(config, name)) is float
    assert config == sf.SlimeLossConfig(**{name: 1.5})
    assert b"numpy" not in pickle.dumps(config)
    assert type(sf.SlimeLossConfig(power=np.int64(2)).power) is float
