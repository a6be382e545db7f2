"""The modules hold options: unknown names are refused when they are made, and copies behave as the original."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import slime_fused as sf
from tests.support import make_batch


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize(
    "module",
    [
        sf.SlimeLoss(sf.SlimeLossConfig(kappa=1.0), shift=True, workspace="1MiB"),
        sf.LinearCrossEntropyLoss(reduction="sum", ignore_index=3),
    ],
    ids=["SlimeLoss", "LinearCrossEntropyLoss"],
)
def test_copies_of_modules(module, copier):
    batch = make_batch()
    twin = copier(module)
    assert repr(twin) == repr(module)
    values = [m(batch.hidden, batch.weight, batch.labels.clamp(min=0)) for m in (module, twin)]
    values = [v.loss if isinstance(v, sf.SlimeOutput) else v for v in values]
    assert torch.equal(*values)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (sf.SlimeLoss, "shfit"),
        (sf.SlimeLoss, "reduction"),
        (sf.SlimeLoss, "bias"),
        (sf.LinearCrossEntropyLoss, "reducton"),
        (sf.LinearCrossEntropyLoss, "config"),
        (sf.LinearCrossEntropyLoss, "cu_seqlens"),
        (sf.LinearCrossEntropyLoss, "dp_group"),
    ],
)
def test_an_unknown_option_is_refused_when_the_module_is_made(module, name):
    with pytest.raises(
        TypeError, match=f"{name}: expected an option among .*shift, .*workspace.*got an unknown one"
    ):
        module(**{name: True})


def test_every_option_of_the_functions_is_taken():
    options = {"shift": True, "ignore_index": -1, "logit_scale": 0.5, "logit_softcap": 9.0, "backend": "torch"}
    groups = {"tp_group": None, "cp_group": None, "dp_group": None}
    sf.SlimeLoss(workspace="1MiB", **options, **groups)
    sf.LinearCrossEntropyLoss(reduction="sum", label_smoothing=0.1, z_loss=0.1, tp_group=None, **options)


@pytest.mark.parametrize("config", [{}, {"kappa": 1.0}, "token", 0])
def test_a_configuration_of_another_type_is_refused(config):
    with pytest.raises(TypeError, match="config: expected a SlimeLossConfig or None"):
        sf.SlimeLoss(config)
