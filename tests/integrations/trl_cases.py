"""DPOTrainers on a tiny model, and the steps that they ought to take, from the model's own logits in float64."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

import slime_fused as sf
from slime_fused.integrations.trl import no_reference
from tests.tiny_models import make_pairs, tiny_llama

LOSSES = {
    "slime": sf.losses.Slime(),
    "slime by token": sf.losses.Slime(stabilizer_reduction="token"),
    "dpo": sf.losses.DPO(beta=0.3),
    "ipo": sf.losses.DPO(beta=0.3, loss_type="ipo"),
    "ld-dpo": sf.losses.DPO(beta=0.3, ld_alpha=0.5),
    "rpo by token": sf.losses.DPO(nll_weight=0.7, nll_reduction="token"),
    "simpo": sf.losses.SimPO(),
    "cpo": sf.losses.CPO(),
    "orpo": sf.losses.ORPO(),
    "alphapo": sf.losses.AlphaPO(),
    "kto": sf.losses.KTO(baseline="zero"),
    "kto by batch": sf.losses.KTO(baseline="batch"),
}


def make_trainer(
    tokenizer,
    folder,
    model=None,
    *,
    ref_model="none",
    pairs=12,
    train_dataset=None,
    cls=DPOTrainer,
    extra=None,
    **options,
):
    """A `DPOTrainer` for two pairs a step; ``ref_model="copy"`` is a second model of `tiny_llama`'s weights."""
    args = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,  # no clipping: gradients are compared
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **options,
    }
    model = tiny_llama(len(tokenizer)) if model is None else model
    if isinstance(ref_model, str):
        ref_model = no_reference() if ref_model == "none" else tiny_llama(len(tokenizer))
    return cls(
        model,
        ref_model=ref_model,
        args=DPOConfig(**args),
        train_dataset=Dataset.from_list(make_pairs(pairs)) if train_dataset is None else train_dataset,
        eval_dataset=Dataset.from_list(make_pairs(5, seed=5)),
        processing_class=tokenizer,
        **(extra or {}),
    )


def reports(trainer) -> list[dict[str, float]]:
    """Those of training steps."""
    return [row for row in trainer.state.log_history if "loss" in row]


def trained_parameters(model) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


class Expected(TrainerCallback):
    """Before each optimizer step: the loss of its pairs and its gradients, and what the trainer has."""

    def __init__(self, trainer, loss, reference=None, plain=None) -> None:
        self.trainer, self.loss, self.reference = trainer, loss, reference
        self.plain = plain or (lambda model, batch: model(**batch).logits)
        self.steps: list[tuple[torch.Tensor, dict, dict]] = []
        self._examples: list[dict] = []
        self._collator = trainer.data_collator
        trainer.data_collator = self._collate
        trainer.add_callback(self)

    def _collate(self, examples):
        self._examples += examples
        return self._collator(examples)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        count = args.per_device_train_batch_size * args.gradient_accumulation_steps
        begin = state.global_step * count
        batch = self._collator(self._examples[begin : begin + count])  # all micro-batches as one
        module = getattr(model, "module", model)
        loss = expected_loss(module, batch, self.loss, self.reference, self.plain)
        names = trained_parameters(module)
        expected = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
        found = {name: p.grad.clone() for name, p in names.items() if p.grad is not None}
        self.steps.append((loss.detach(), dict(zip(names, expected, strict=True)), found))

    def check(self, steps: int = 3) -> None:
        """Loss and gradients of every step to the rounding of float32."""
        assert len(self.steps) == steps
        for (loss, expected, found), report in zip(self.steps, reports(self.trainer), strict=True):
            # transformers before 5 rounds what it reports to four places
            assert abs(report["loss"] - float(loss)) < 2e-5 * abs(float(loss)) + 6e-5
            assert {name for name, value in expected.items() if value is not None} == set(found)
            for name, gradient in found.items():
                floor = 2e-5 * float(expected[name].abs().max()) + 1e-7
                torch.testing.assert_close(
                    gradient, expected[name], rtol=2e-3, atol=floor, msg=lambda m, n=name: f"{n}: {m}"
                )


def expected_loss(model, batch, loss, reference, plain) -> torch.Tensor:
    """In float64 after the logits; ``reference`` gives its own logits for a batch."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logps = token_logps(plain(model, inputs), labels)
    value = sf.losses.as_loss(loss)
    given = {}
    if any(name.startswith("ref_") for name in value.needs):
        with torch.no_grad():
            ref_logps = token_logps(reference(inputs), labels)
        is_summed = "ref_token_logps" not in value.needs
        given = {"ref_sum_logps": ref_logps.sum(1)} if is_summed else {"ref_token_logps": ref_logps}
    if "desirable" in value.needs:
        given["desirable"] = torch.arange(len(labels)) < len(labels) // 2
    return sf.reference.preference_terms(logps, labels, value, given).loss


def token_logps(logits, labels) -> torch.Tensor:
    logps = torch.log_softmax(logits[:, -labels.shape[1] - 1 : -1].double(), -1)
    found = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return found.masked_fill(labels == -100, 0.0)
