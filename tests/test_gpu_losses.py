"""Losses of units on a GPU: of pairs, of sequences, of tokens, of the whole batch and one's own, against float64.

The paths are those of the CPU's grid (`test_preference_loss.py`); here they meet a GPU's kernels and products, in
one chunk and in several.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import slime_fused as sf
from slime_fused import reference
from tests.test_gpu import DEVICE, GPU_DTYPES, backend, problem, relative_error  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PAIRS = 3


def hinge(pairs):
    return F.relu(1 - (pairs.chosen_mean_logps - pairs.rejected_mean_logps))


def given(name):
    """What the loss is told, per sequence; the same for every dtype."""
    generator = torch.Generator().manual_seed(1)
    references = -150 + 10 * torch.randn(2 * PAIRS, generator=generator, dtype=torch.float64)
    if name == "dpo":
        return {"ref_chosen_sum_logps": references[:PAIRS], "ref_rejected_sum_logps": references[PAIRS:]}
    if name.startswith("kto"):
        return {"ref_sum_logps": references, "desirable": torch.arange(2 * PAIRS) % 2 == 0}
    return {}


LOSSES = {
    "dpo": sf.losses.DPO(beta=0.1),
    "orpo": sf.losses.ORPO(),
    "kto_zero": sf.losses.KTO(baseline="zero"),
    "kto_batch": sf.losses.KTO(baseline="batch"),
    "sft": sf.losses.SFT(),
    "own": hinge,
}


def run(module, tensors, name, device, **options):
    hidden, weight, labels = tensors
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    told = {key: value.to(device) for key, value in given(name).items()}
    out = module.preference_loss(hidden, weight, labels, loss=LOSSES[name], **told, **options)
    out.loss.backward()
    return out.loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("workspace", ["auto", "100KB"])
@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_no_worse_than_plain_pytorch(backend, name, dtype, workspace):  # noqa: F811
    tensors = problem(dtype, pairs=PAIRS)
    on_device = [t.to(DEVICE) for t in tensors]
    truth = run(reference, (tensors[0].double(), tensors[1].double(), tensors[2]), name, torch.device("cpu"))
    plain = run(reference, on_device, name, DEVICE)
    ours = run(sf, on_device, name, DEVICE, backend=backend.name, workspace=workspace)
    for got, naive, true in zip(ours, plain, truth, strict=True):
        floor = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 0.25)
        assert relative_error(got, true) <= relative_error(naive, true) + floor


def test_no_wait_with_a_layout(backend):  # noqa: F811
    """With a layout made on the host, a loss of pairs by its formula waits for nothing."""
    hidden, weight, labels = problem(torch.bfloat16, pairs=PAIRS)
    layout = sf.token_layout(labels, vocab_size=weight.shape[0]).to(DEVICE)
    hidden, weight = (x.to(DEVICE).requires_grad_() for x in (hidden, weight))
    told = {key: value.to(DEVICE) for key, value in given("dpo").items()}

    def step():
        sf.preference_loss(hidden, weight, layout, loss=LOSSES["dpo"], backend=backend.name, **told).loss.backward()

    step()  # the first call compiles, and takes workspaces
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
