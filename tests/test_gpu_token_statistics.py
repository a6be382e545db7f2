"""``return_stats`` on a GPU, on every plan: values, and gradients of log-prob and entropy together."""

from __future__ import annotations

import pytest
import torch

from slime_fused.backends import get_backend
from tests.statistics_support import assert_as_exact
from tests.support import Batch, make_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("rows", [1000, 40, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_token_statistics(name, dtype, rows):
    """198 rows of 1003 logits: all at once, several times, few at a time or by blocks of the vocabulary."""
    is_available, reason = get_backend(name).available()
    if not is_available:
        pytest.skip(f"{name}: {reason}")
    batch = make_batch((33,) * 6, hidden_size=64, vocab_size=1003, dtype=dtype)
    batch = Batch(batch.hidden.to(DEVICE), batch.weight.to(DEVICE), batch.labels.to(DEVICE))
    assert_as_exact(
        batch,
        options={"logit_softcap": 8.0, "temperature": 0.7},
        wanted=("hidden", "weight"),
        roundings=4,
        backend=name,
        workspace=rows * 1008 * dtype.itemsize,
    )
