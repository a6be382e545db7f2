"""What stands in the place of `DPOTrainer._compute_loss`: the loss in the model's head, and proof that it ran.

A trainer that ignored the hook would train plain DPO without any sign of it (at the first step its loss is log 2).
So a callback counts the calls of every step, and stops the first one that had none before the optimizer acts on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slime_fused.integrations.trl.checks import HOOK, check_batch
from slime_fused.integrations.trl.metrics import STATISTICS, record
from slime_fused.integrations.trl.reference import ReferenceLogProbs, split_batch
from slime_fused.losses import Formula, Slime
from slime_fused.model.averages import Averages
from slime_fused.model.calls import FusedLoss, run_in_head
from slime_fused.model.check import HeadMismatchError, check_head
from slime_fused.model.head import unwrap_peft
from slime_fused.model.items import PairCounts, first_items, own_items
from slime_fused.model.reference import REFERENCE_COLUMNS
from slime_fused.model.terms import reweighted
from slime_fused.model.transform import transform_of

_METHODS = (HOOK, "get_batch_samples", "log", "_prepare_inputs")
"""What is replaced on the trainer, as attributes of the instance."""

_PAPER = {
    "title": "SLIME: Stabilized Likelihood Implicit Margin Enforcement for Preference Optimization",
    "id": "2602.02383",
}


class LossHook:
    """One loss in one trainer."""

    def __init__(
        self,
        trainer: Any,
        loss: Formula,
        reference: ReferenceLogProbs,
        backend: str,
        workspace: int | str,
        *,
        check_head: bool,
    ) -> None:
        self.reference = reference
        self.calls = {"train": 0, "eval": 0}
        self._trainer = trainer
        self._loss = loss
        self._backend = backend
        self._workspace = workspace
        self._transform = transform_of(trainer.model)
        self._head_is_checked = not check_head
        self._means = {"train": Averages(), "eval": Averages()}
        self._window: Tensor | None = None
        self._guard = HookGuard(self)

    @classmethod
    def of(cls, trainer: Any) -> LossHook | None:
        """That of a trainer that has one.

        Raises ValueError where somebody else has put something in its place.
        """
        hook = getattr(vars(trainer).get(HOOK), "__self__", None)
        if HOOK in vars(trainer) and not isinstance(hook, cls):
            raise ValueError(
                f"trainer: expected the {HOOK} of trl.DPOTrainer, got {vars(trainer)[HOOK]!r} on this trainer; "
                "take off what put it there"
            )
        return hook

    def install(self) -> None:
        """Put it into the trainer."""
        trainer = self._trainer
        self._plain = {name: getattr(trainer, name) for name in _METHODS}
        trainer._compute_loss = self.compute_loss
        trainer.get_batch_samples = self.get_batch_samples
        trainer.log = self.log
        trainer._prepare_inputs = self.prepare_inputs
        trainer.use_liger_kernel = False  # up to TRL 1.13 it takes another way to another loss
        if getattr(trainer.args, "use_liger_kernel", False):
            # This one replaces the model's forward when training starts, and the head's hook with it.
            given = getattr(trainer.args, "liger_kernel_config", None) or {}
            trainer.args.liger_kernel_config = {**given, "fused_linear_cross_entropy": False}
        trainer._name = self._loss.name
        trainer._paper = _PAPER if isinstance(self._loss, Slime) else {}
        trainer.add_callback(self._guard)

    def remove(self) -> None:
        """Take it out again."""
        for name in _METHODS:
            vars(self._trainer).pop(name, None)
        self._trainer.remove_callback(self._guard)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of one optimizer step, as the trainer gets them; what they hold together is noted."""
        samples, num_items = self._plain["get_batch_samples"](*args, **kwargs)
        self._window = None
        if samples:
            device = self._trainer.accelerator.device
            counts = [self._counts(split_batch(self._trainer, _checked(batch))[1]).to(device) for batch in samples]
            self._window = self._sum(torch.stack(counts).sum(0))
        return samples, num_items

    def prepare_inputs(self, inputs: Any) -> Any:
        """A batch on the device, with the reference's log-probs as they are: DeepSpeed would round them."""
        prepared = self._plain["_prepare_inputs"](inputs)
        exact = {name: inputs[name] for name in REFERENCE_COLUMNS if name in inputs}
        return {**prepared, **{name: value.to(prepared[name].device) for name, value in exact.items()}}

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        """The loss of one micro-batch, weighted for an exact mean over the step's micro-batches and processes."""
        trainer = self._trainer
        mode = "train" if trainer.model.training else "eval"
        self.calls[mode] += 1
        whole_inputs = _checked(inputs)
        inputs, num_pairs = self._without_repeats(whole_inputs, mode)
        model_inputs, labels = split_batch(trainer, inputs)
        self._check_head(model, model_inputs, labels)
        shares = self._shares(self._counts(labels)) if mode == "train" else None
        loss = self._loss if shares is None else reweighted(self._loss, shares)
        given = self.reference.given(inputs, model_inputs, labels)
        if "desirable" in loss.needs:
            given["desirable"] = torch.arange(len(labels), device=labels.device) < len(labels) // 2
        call = FusedLoss(labels, None, loss, self._transform, self._backend, self._workspace, given, STATISTICS)
        outputs = run_in_head(model, {**model_inputs, **self._router_options()}, call)
        total = outputs["loss"]
        if "aux_loss" in outputs:
            total = total + outputs["aux_loss"]
        told = dict(outputs)
        if "aux_loss" in outputs:  # TRL reports it without its weight
            told["aux_loss"] = outputs["aux_loss"] / (getattr(trainer, "router_aux_loss_coef", None) or 1.0)
        record(self._means[mode], told, labels, loss, given, is_counted=num_pairs > 0)
        if mode == "train":
            self._means[mode].count({"num_tokens": inputs["attention_mask"].sum()})
        if shares is not None:
            total = total * shares[0].to(total.dtype)
        if not return_outputs:
            return total
        # As TRL does: the logits that compute_metrics wants take a forward of their own. Repeated pairs are among
        # them: processes gather tensors of one size, and whoever gathers drops what is repeated.
        with torch.no_grad():
            return total, model(**split_batch(trainer, whole_inputs)[0])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        """Adds the means since the last report, under TRL's names; `evaluate` returns them, too."""
        trainer = self._trainer
        mode = "train" if trainer.model.training else "eval"
        is_report = any(name == "loss" or name.endswith("_loss") for name in logs)
        if is_report and (means := self._means[mode].flush(self._sum)):
            trainer._total_train_tokens += int(means.pop("num_tokens", 0)) // getattr(trainer, "_tp_size", 1)
            means["num_tokens"] = trainer._total_train_tokens
            prefix = "eval_" if mode == "eval" else ""
            logs.update({f"{prefix}{name}": value for name, value in means.items()})
        return self._plain["log"](logs, *args, **kwargs)

    def forget(self, *modes: str) -> None:
        """End a loop: its step, and what of these modes has not been reported."""
        self._window = None
        for mode in modes:
            self.calls[mode] = 0
            self._means[mode] = Averages()

    def _base(self) -> Any:
        return unwrap_peft(self._trainer.accelerator.unwrap_model(self._trainer.model))

    def _sum(self, values: Tensor) -> Tensor:
        total: Tensor = self._trainer.accelerator.reduce(values, reduction="sum")
        return total

    def _counts(self, labels: Tensor) -> Tensor:
        return PairCounts.of(labels).by_unit(self._loss)

    def _shares(self, counts: Tensor) -> Tensor | None:
        """(4,): this micro-batch's counts, divided by their means over the step's micro-batches and processes."""
        if self._window is None:
            return None
        accumulated = getattr(self._trainer, "current_gradient_accumulation_steps", None)
        accumulated = accumulated or self._trainer.args.gradient_accumulation_steps
        parts = accumulated * self._trainer.accelerator.num_processes
        return counts * parts / self._window.clamp(min=1)

    def _without_repeats(self, inputs: Mapping[str, Any], mode: str) -> tuple[Mapping[str, Any], int]:
        """The batch and how many of its pairs count.

        The last batches of an evaluation by several processes are filled up with pairs that others have.
        """
        num_pairs = inputs["input_ids"].shape[0] // 2
        if mode == "train":
            return inputs, num_pairs
        accelerator = self._trainer.accelerator
        own = own_items(accelerator.gradient_state, num_pairs, accelerator.process_index)
        if own in (0, num_pairs):  # a process without any goes along all the same, for the sake of sharded weights
            return inputs, own
        return first_items(inputs, own, num_pairs, 2), own

    def _check_head(self, model: nn.Module, model_inputs: Mapping[str, Tensor], labels: Tensor) -> None:
        if self._head_is_checked:
            return
        if (labels[:, 1:] != -100).any():
            batch = {**model_inputs, "labels": labels}
            try:
                check_head(model, batch, self._transform, self._backend, self._workspace)
            except HeadMismatchError as error:
                raise HeadMismatchError(f"{error}; under TRL: train this model with TRL's own losses") from None
        self._head_is_checked = True

    def _router_options(self) -> dict[str, float]:
        """The weight of a mixture-of-experts model's auxiliary loss, where this TRL has one."""
        trainer = self._trainer
        if not hasattr(trainer, "aux_loss_enabled"):
            return {}
        return {"router_weight": float(trainer.router_aux_loss_coef) if trainer.aux_loss_enabled else 0.0}


class HookGuard(TrainerCallback):
    """Stops training, or evaluation, that went past the hook."""

    def __init__(self, hook: LossHook) -> None:
        self._hook = hook

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What was called before belongs to no report."""
        self._hook.forget("train", "eval")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count anew."""
        self._hook.calls["train"] = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the weights change."""
        self._require("train")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """For what has an optimizer step of its own."""
        self._require("train")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the loop over the dataset."""
        self._require("eval")
        self._hook.forget("eval")

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """As an evaluation, whose means nobody reports."""
        self._require("eval")
        self._hook.forget("eval")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What is called afterwards belongs to no step."""
        self._hook.forget("train")

    def _require(self, mode: str) -> None:
        if not self._hook.calls[mode]:
            raise RuntimeError(
                f"trainer: expected it to call {HOOK} for its loss; it did not, so its own loss ran instead of "
                "the one that was enabled; look for what replaced compute_loss or the hook since then"
            )


def _checked(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    check_batch(inputs)
    return inputs
