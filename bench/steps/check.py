"""Whether a contestant takes the same training step: loss, gradient norm and gradients of every parameter.

The yardstick shares the decoder's arithmetic and replaces the head: log-probs and gradients in float32 or float64,
by blocks of rows, so that it fits wherever a fused contestant does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.steps.cases import StepBatch
from bench.steps.model import Training
from slime_fused import reference

# Rows whose logits the yardstick holds at once.
_BLOCK_ROWS = 1024
# Entries of each parameter's gradient that are compared, evenly spaced.
_SAMPLE = 4096

# As in `bench.test_cpu`, generous: accuracy is what tests/ is for; here a contestant that takes another step must
# not be timed. bfloat16: every layer's backward pass rounds again, and the authors' log-probs keep 3 digits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Fingerprint:
    """A step's loss and gradients, in little memory."""

    loss: float
    norm: float
    """Of all gradients together."""
    sample: Tensor
    """(K,) float32 on the CPU: entries of every parameter's gradient; NaN where a parameter has none."""


@dataclass(frozen=True)
class StepErrors:
    """Relative errors: of the loss, of the gradients' norm, and of the sampled gradients (norm of difference)."""

    loss: float
    norm: float
    gradient: float

    def within(self, dtype: str) -> bool:
        """Whether the step counts as the same; NaN does not."""
        return all(error <= TOLERANCE[dtype] for error in (self.loss, self.norm, self.gradient))


def fingerprint(training: Training, loss_fn: Callable[[], Tensor]) -> Fingerprint:
    """Run forward and backward once; the weights stay as they are and the gradients are freed."""
    try:
        loss = loss_fn()
        loss.backward()
        return _read_gradients(training, float(loss.detach()))
    finally:
        training.clear_gradients()


def expected_fingerprint(training: Training, batch: StepBatch) -> Fingerprint:
    """The same step with the head and the loss in float64 (float32 for a 16-bit model)."""
    weight = training.head_weight
    try:
        hidden = training.hidden_states(batch.input_ids)
        rows = hidden.flatten(0, 1).index_select(0, batch.rows)
        targets = batch.targets.index_select(0, batch.rows)
        loss, d_rows, d_weight = _exact_head(rows.detach(), weight.detach(), targets, batch, weight.requires_grad)
        rows.backward(d_rows.to(rows.dtype))
        if d_weight is not None:
            # A tied head: the embedding's share is there already.
            share = d_weight.to(weight.dtype)
            weight.grad = share if weight.grad is None else weight.grad.add_(share)
        return _read_gradients(training, loss)
    finally:
        training.clear_gradients()


def compare(actual: Fingerprint, expected: Fingerprint) -> StepErrors:
    """How far ``actual`` is from ``expected``."""
    return StepErrors(
        loss=abs(actual.loss - expected.loss) / abs(expected.loss),
        norm=abs(actual.norm - expected.norm) / expected.norm,
        gradient=float((actual.sample - expected.sample).norm() / expected.sample.norm()),
    )


def _exact_head(
    rows: Tensor, weight: Tensor, targets: Tensor, batch: StepBatch, wants_weight: bool
) -> tuple[float, Tensor, Tensor | None]:
    """Loss, d_rows (M, D) and d_weight (V, D) of ``rows`` (M, D) with labels ``targets`` (M,)."""
    exact = torch.float64 if rows.dtype.itemsize >= 4 else torch.float32
    wide = weight.to(exact).requires_grad_(wants_weight)

    def logps_of(block: Tensor, labels: Tensor) -> Tensor:
        return reference.linear_logprobs(block, wide, labels)

    blocks = list(zip(rows.split(_BLOCK_ROWS), targets.split(_BLOCK_ROWS), strict=True))
    with torch.no_grad():
        logps = torch.cat([logps_of(block.to(exact), labels) for block, labels in blocks])
    logps.requires_grad_()
    loss = reference.slime_terms(logps, batch.cu_valid).loss
    (coefficients,) = torch.autograd.grad(loss, logps)  # (M,)
    d_rows = []
    for (block, labels), upstream in zip(blocks, coefficients.split(_BLOCK_ROWS), strict=True):
        leaf = block.to(exact).requires_grad_()
        logps_of(leaf, labels).backward(upstream)
        assert leaf.grad is not None
        d_rows.append(leaf.grad)
    return float(loss.detach()), torch.cat(d_rows), wide.grad


def _read_gradients(training: Training, loss: float) -> Fingerprint:
    square, samples = 0.0, []
    for parameter in training.trainable:
        stride = max(1, parameter.numel() // _SAMPLE)
        if parameter.grad is None:
            samples.append(torch.full((len(range(0, parameter.numel(), stride)),), float("nan")))
            continue
        # Accumulated in float32 at least, without a copy of the gradient in that dtype.
        wide = torch.promote_types(parameter.grad.dtype, torch.float32)
        square += float(torch.linalg.vector_norm(parameter.grad, dtype=wide)) ** 2
        samples.append(parameter.grad.flatten()[::stride].float().cpu())
    return Fingerprint(loss, square**0.5, torch.cat(samples))
