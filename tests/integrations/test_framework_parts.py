"""What the integrations of other frameworks share; these themselves run in `make test-integrations`."""

from __future__ import annotations

import pytest
import torch

from slime_fused.integrations.batches import BatchLoss, Labels, pair_metrics
from slime_fused.integrations.hooks import HookError, refuse_settings, require_caller, require_method
from slime_fused.integrations.settings import read_settings, setting_names
from slime_fused.losses import DPO, KTO, SFT, SimPO, Slime
from slime_fused.losses.names import PAIR_LOSSES
from slime_fused.model.head import attach_head
from tests.tiny_models import tiny_llama


def test_settings_become_losses():
    assert read_settings({}).loss == Slime()
    assert read_settings({"slime_lambda_w": 0.3, "slime_delta": None, "learning_rate": 1.0}).loss == Slime(
        lambda_w=0.3
    )
    wanted = read_settings(
        {"slime_loss": "dpo", "slime_beta": 0.2, "slime_workspace": "64MiB", "slime_backend": "cpu"}
    )
    assert wanted == BatchLoss(DPO(beta=0.2), "cpu", "64MiB")
    assert wanted.needs_reference
    assert not read_settings({"slime_loss": "simpo"}).needs_reference
    assert {"slime_loss", "slime_lambda_w", "slime_gamma", "slime_workspace"} <= set(setting_names())
    for name in PAIR_LOSSES:
        assert read_settings({"slime_loss": name}).loss.unit == "pair"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"slime_loss": "grpo"}, "slime_loss: expected one of slime, dpo, simpo, orpo, cpo, alphapo, got 'grpo'"),
        ({"slime_lamda_w": 1}, "slime_lamda_w: expected a setting of 'slime'.*did you mean slime_lambda_w"),
        ({"slime_loss": "dpo", "slime_lambda_w": 1}, "slime_lambda_w: expected a setting of 'dpo': slime_beta"),
        ({"slime_lambda_w": -1.0}, "slime_lambda_w: expected"),
        ({"slime_backend": "tpu"}, "slime_backend: expected"),
        ({"slime_workspace": "much"}, "slime_workspace: expected"),
    ],
)
def test_wrong_settings_are_named(entries, message):
    with pytest.raises(ValueError, match=message):
        read_settings(entries)


@pytest.mark.parametrize("loss", [SFT(), KTO()])
def test_losses_of_single_responses_are_refused(loss):
    with pytest.raises(ValueError, match="loss: expected a loss of pairs"):
        BatchLoss.of(loss)


def padded_batch() -> dict[str, torch.Tensor]:
    """Two pairs: prompts of two tokens, responses of 3, 1, 2 and 4."""
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 3, 4, 6)
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
    ids = torch.randint(1, 50, (4, 6), generator=generator) * mask
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("loss", [Slime(), SimPO(nll_weight=0.5), DPO()], ids=lambda loss: loss.name)
def test_packed_batches_say_the_same_as_padded_ones(loss):
    """Loss, gradients, reference log-probs and every metric; the losses name terms, rewards or neither."""
    batch = padded_batch()
    model = tiny_llama(50)
    attach_head(model)
    of, mask = BatchLoss.of(loss), batch["attention_mask"].bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = Labels(batch["labels"])
    bounds = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()
    packed = Labels(batch["labels"][mask][None], bounds)
    positions = torch.cat([torch.arange(n) for n in mask.sum(1).tolist()])[None]
    packed_inputs = {"input_ids": batch["input_ids"][mask][None], "position_ids": positions}
    assert labels.counts().tolist() == packed.counts().tolist() == [3, 1, 2, 4]
    results = []
    for given, own in ((inputs, labels), (packed_inputs, packed)):
        reference = of.reference(model, model, given, own) - 0.1 if of.needs_reference else None
        model.zero_grad()
        outputs = of.policy(model, given, own, reference)
        outputs["loss"].backward()
        metrics = {name: float(value) for name, value in pair_metrics(outputs, own, loss).items()}
        results.append((outputs["loss"].detach(), metrics, model.lm_head.weight.grad.clone()))
    (value, metrics, gradient), (packed_value, packed_metrics, packed_gradient) = results
    torch.testing.assert_close(packed_value, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    assert packed_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    logits = model(**inputs).logits[:, :-1]
    is_chosen = (batch["labels"][:2, 1:] != -100).unsqueeze(-1)
    expected = float(logits[:2].masked_select(is_chosen).mean())
    assert metrics["logits/chosen"] == pytest.approx(expected, rel=1e-4)
    assert metrics["logps/chosen"] == pytest.approx(
        float((outputs["mean_logps"][:2] * torch.tensor([3.0, 1.0])).mean()), rel=1e-4
    )


def test_hooks_are_looked_at():
    class Owner:
        def loss(self, model, batch):
            return model, batch

        def step(self, model):
            return self.loss(model, None)

    require_method(Owner, "loss", ("model", "batch"), "torch")
    require_caller(Owner, "step", "loss", "torch")
    with pytest.raises(HookError, match=r"torch: expected .*Owner\.loss\(batch\), got \(model, batch\) in torch 2"):
        require_method(Owner, "loss", ("batch",), "torch")
    with pytest.raises(HookError, match="got no such method"):
        require_method(Owner, "metrics", (), "torch")
    with pytest.raises(HookError, match=r"expected .*Owner\.step to call metrics"):
        require_caller(Owner, "step", "metrics", "torch")
    refuse_settings(Owner(), {"alpha": 0.0}, "it would be ignored")
    owner = Owner()
    owner.alpha = 1.0
    with pytest.raises(ValueError, match=r"alpha: expected 0\.0, got 1\.0: it would be ignored"):
        refuse_settings(owner, {"alpha": 0.0}, "it would be ignored")
