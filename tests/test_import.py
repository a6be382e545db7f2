"""What ``import slime_fused`` does, and does not, in a fresh interpreter."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import textwrap

import pytest

import slime_fused as sf


def run_python(code: str, **environment: str) -> object:
    """Run ``code`` in a fresh interpreter; it prints one JSON value."""
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:slime_fused", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_imports_no_optional_dependency_and_no_cuda():
    report = run_python("""
        import json, sys
        import torch
        before = set(sys.modules)
        import slime_fused
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        heavy = {"triton", "transformers", "datasets", "peft", "accelerate", "gguf", "matplotlib", "rich", "typer",
                 "yaml", "scipy", "pandas", "pybind11"}
        print(json.dumps([sorted(new & heavy), torch.cuda.is_initialized(), "torch._dynamo" in new]))
    """)
    assert report == [[], False, False]


def test_works_without_the_optional_dependencies():
    """None in sys.modules makes an import fail, as where a package is not installed."""
    report = run_python("""
        import json, sys
        for name in ("triton", "transformers", "datasets", "peft", "accelerate", "gguf", "matplotlib", "rich",
                     "typer", "yaml"):
            sys.modules[name] = None
        import torch, slime_fused as sf
        reasons = sf.available_backends()
        loss = sf.slime_loss(torch.randn(2, 3, 4), torch.randn(5, 4), torch.randint(0, 5, (2, 3))).loss
        print(json.dumps([reasons["triton"], bool(loss.isfinite())]))
    """)
    assert "triton" in report[0]
    assert report[1]


def test_without_the_native_module_auto_takes_plain_pytorch():
    report = run_python("""
        import json, sys
        sys.modules["slime_fused._C"] = None
        import torch, slime_fused as sf
        reasons = sf.available_backends()
        args = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randint(0, 5, (2, 3))
        loss, expected = sf.slime_loss(*args).loss, sf.reference.slime_loss(*args).loss
        try:
            sf.slime_loss(*args, backend="cpu")
            refusal = ""
        except ValueError as error:
            refusal = str(error)
        info = sf.build_info()
        print(json.dumps([reasons["cpu"], abs(loss - expected).item() < 1e-5, refusal, info["native"]]))
    """)
    assert "slime_fused._C" in report[0]
    assert "pip install" in report[0]
    assert report[1]
    assert report[2].startswith("backend: 'cpu' cannot run on cpu with torch.float32")
    assert "pip install" in report[2]
    assert report[3].startswith("not built")


def test_every_public_name_exists_and_is_documented():
    for name in sf.__all__:
        member = getattr(sf, name)
        assert member.__doc__, name
    assert set(sf.__all__) <= set(dir(sf))


def test_available_backends():
    backends = sf.available_backends()
    assert list(backends) == ["cuda", "triton", "cpu", "torch"]
    assert backends["torch"] is None
    assert backends["cpu"] is None
    for name, reason in backends.items():
        assert reason is None or len(reason) > 10, name


def test_build_info_answers_in_a_source_tree_too():
    info = sf.build_info()
    assert {"slime_fused", "python", "torch", "triton", "native", "backends"} <= info.keys()
    assert json.dumps(info)
    assert info["backends"]["cpu"] == "runs here"


@pytest.mark.parametrize(
    "name",
    ["slime_loss", "linear_logprobs", "sequence_logprobs", "linear_cross_entropy", "cross_entropy", "slime_terms"],
)
def test_the_reference_has_the_public_parameters(name):
    """Whatever a public function takes, the oracle takes by the same name, or accepts and ignores."""
    public = inspect.signature(getattr(sf, name)).parameters
    oracle = inspect.signature(getattr(sf.reference, name)).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in oracle.values())
    for parameter in public.values():
        if parameter.name in oracle:
            assert oracle[parameter.name].default == parameter.default
        else:
            assert takes_any, f"reference.{name} refuses {parameter.name}"


def test_a_loss_needs_no_numpy():
    """PyTorch itself runs without it, and warns."""
    report = run_python("""
        import json, sys
        sys.modules["numpy"] = None
        import torch
        import slime_fused as sf
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in ((2, 5, 8), (11, 8)))
        labels = torch.randint(0, 11, (2, 5), generator=generator)
        results = []
        for module in (sf, sf.reference):
            leaf = weight.clone().requires_grad_()
            loss = module.slime_loss(hidden, leaf, labels).loss
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)
        print(json.dumps(sys.modules["numpy"] is None))
    """)
    assert report is True
