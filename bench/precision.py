"""What rounding the logits costs in exactness: `python -m bench.precision` prints the table of docs/backends.md.

Log-probs of random labels and their gradients, for the seeds below and ``mean`` over tokens, against plain PyTorch
in float64 on the same 16-bit operands. An error of a log-prob is absolute; that of a gradient is relative to the
largest entry (max) or to the root mean square of all entries (rms) of the float64 gradient. Gradients are stored in
the operands' dtype in both modes, whose own rounding is then at most 2^-9 (bfloat16) or 2^-12 (float16) per entry.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import slime_fused as sf
from slime_fused import reference

TOKENS, HIDDEN, VOCAB = 512, 256, 8193
SPREADS = (2.0, 10.0, 30.0)
"""Standard deviations of the logits: a model before training, a trained one, one with large logits."""
DTYPES = (torch.bfloat16, torch.float16)
MODES = (None, torch.float32)


@dataclass(frozen=True)
class Errors:
    """Of the log-probs, dX and dW: each (max, rms)."""

    logp: tuple[float, float]
    d_hidden: tuple[float, float]
    d_weight: tuple[float, float]


def make_operands(dtype: torch.dtype, spread: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D) and weight (V, D) in ``dtype``, labels (N,) that the logits make likely or not."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator) * spread / HIDDEN**0.5
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    likely = (hidden.float() @ weight.float().t()).argmax(1)
    labels[::2] = likely[::2]
    return hidden, weight, labels


def measure(dtype: torch.dtype, spread: float, logits_dtype: torch.dtype | None, backend: str = "auto") -> Errors:
    """The errors of one mode."""
    hidden, weight, labels = make_operands(dtype, spread)
    exact = _run(reference.linear_logprobs, hidden.double(), weight.double(), labels)
    got = _run(sf.linear_logprobs, hidden, weight, labels, logits_dtype=logits_dtype, backend=backend)
    logp, *grads = (a.double() - b for a, b in zip(got, exact, strict=True))
    relative = [_of(error, like) for error, like in zip(grads, exact[1:], strict=True)]
    return Errors((logp.abs().max().item(), logp.square().mean().sqrt().item()), *relative)


def _run(function: object, hidden: Tensor, weight: Tensor, labels: Tensor, **options: object) -> list[Tensor]:
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    logp = function(hidden, weight, labels, **options)  # type: ignore[operator]
    logp.mean().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [logp.detach(), hidden.grad, weight.grad]


def _of(error: Tensor, exact: Tensor) -> tuple[float, float]:
    rms = error.square().mean().sqrt() / exact.square().mean().sqrt()
    return (error.abs().max() / exact.abs().max()).item(), rms.item()


def render(
    dtypes: Sequence[torch.dtype] = DTYPES, spreads: Sequence[float] = SPREADS, backend: str = "auto"
) -> str:
    """The table, in Markdown."""
    lines = [
        "| operands | logits' std | logits | log-prob: max | rms | dX: max | rms | dW: max | rms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for dtype in dtypes:
        for spread in spreads:
            for mode in MODES:
                errors = measure(dtype, spread, mode, backend)
                numbers = [*errors.logp, *errors.d_hidden, *errors.d_weight]
                cells = [_name(dtype), f"{spread:g}", _name(mode or dtype), *(f"{x:.1e}" for x in numbers)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__)
    parser.add_argument("--backend", default="auto", help="that forms the results (default: auto, on the CPU)")
    print(render(backend=parser.parse_args().backend))


if __name__ == "__main__":
    main()
