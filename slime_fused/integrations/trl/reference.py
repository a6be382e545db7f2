"""Where a reference model's log-probs come from: columns of the dataset, a model, or the adapter switched off."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from slime_fused.integrations.trl.placeholder import NoReference
from slime_fused.losses import Formula
from slime_fused.model.calls import FusedLogps, run_in_head
from slime_fused.model.head import attach_head
from slime_fused.model.reference import REFERENCE_COLUMNS, as_reference, reference_table, with_columns
from slime_fused.model.transform import transform_of

_ADAPTER = "ref"
"""TRL's name for the copy that it makes of a pre-trained adapter."""


class ReferenceLogProbs:
    """The reference of one trainer, for one loss."""

    def __init__(self, trainer: Any, loss: Formula, backend: str, workspace: int | str) -> None:
        self._trainer = trainer
        self._loss = loss
        self._backend = backend
        self._workspace = workspace
        self.is_dropped = False
        """Whether what the reference was computed from is gone."""

    @classmethod
    def find(
        cls,
        trainer: Any,
        loss: Formula,
        backend: str,
        workspace: int | str,
        earlier: ReferenceLogProbs | None,
    ) -> ReferenceLogProbs:
        """That of ``trainer``; ``earlier`` is that of the loss which this one replaces.

        Raises ValueError where the loss needs one and there is none, or another than it needs.
        """
        self = cls(trainer, loss, backend, workspace)
        self.is_dropped = earlier is not None and earlier.is_dropped
        args = trainer.args
        if not self.is_needed:
            if args.sync_ref_model:
                raise ValueError(
                    f"args.sync_ref_model: expected False, since {loss.name} has no reference model to keep in "
                    "step, got True"
                )
            return self
        has_columns = set(REFERENCE_COLUMNS) <= set(getattr(trainer.train_dataset, "column_names", None) or ())
        if self._needs_tokens and trainer.precompute_ref_logps:
            raise ValueError(
                f"args.precompute_ref_log_probs: expected False, since {loss.name} needs the reference's log-probs "
                "per token and the dataset's columns hold sums, got True"
            )
        if not has_columns and not self._has_model:
            gone = (
                "an earlier enable_slime or enable_loss dropped it" if self.is_dropped else "the trainer has none"
            )
            raise ValueError(
                f"ref_model: {loss.name} expected a reference model, an adapter to switch off, or columns "
                f"{' and '.join(REFERENCE_COLUMNS)} (precompute_ref_log_probs=True); {gone}. Construct the "
                "DPOTrainer again"
            )
        if self._separate is not None:
            attach_head(trainer.accelerator.unwrap_model(self._separate))
        return self

    @property
    def is_needed(self) -> bool:
        """Whether the loss takes the reference's log-probs."""
        return any(name.startswith("ref_") for name in self._loss.needs)

    @property
    def _needs_tokens(self) -> bool:
        return "ref_token_logps" in self._loss.needs

    @property
    def _has_model(self) -> bool:
        return self._separate is not None or (self._is_adapter and not self.is_dropped)

    @property
    def _separate(self) -> Any:
        """A reference model of its own, or None."""
        model = self._trainer.ref_model
        return None if model is None or isinstance(model, NoReference) else model

    @property
    def _is_adapter(self) -> bool:
        return hasattr(self._model, "peft_config")

    @property
    def _model(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    def given(
        self, inputs: Mapping[str, Any], model_inputs: Mapping[str, Tensor], labels: Tensor
    ) -> dict[str, Tensor]:
        """What the loss is given: by name, an argument of `slime_fused.preference_loss`.

        Raises ValueError where a batch has no columns and nothing is left to compute them from.
        """
        if not self.is_needed:
            return {}
        if self._needs_tokens:
            return {"ref_token_logps": self._logps(model_inputs, labels, per_token=True)}
        if all(name in inputs for name in REFERENCE_COLUMNS):
            sums = torch.cat([inputs[name] for name in REFERENCE_COLUMNS]).to(labels.device)
        else:
            sums = self._logps(model_inputs, labels)
        if "ref_mean_logps" in self._loss.needs:
            return {"ref_mean_logps": sums / (labels[:, 1:] != -100).sum(1).clamp(min=1)}
        return {"ref_sum_logps": sums}

    def _logps(self, model_inputs: Mapping[str, Tensor], labels: Tensor, *, per_token: bool = False) -> Tensor:
        """(S,) sums, or (S, T), through the fused head of the reference."""
        trainer = self._trainer
        if not self._has_model:
            raise ValueError(
                f"eval_dataset: {self._loss.name} expected the columns {' and '.join(REFERENCE_COLUMNS)} in every "
                "dataset, since no reference model is kept; pass this dataset when the trainer is constructed"
            )
        model = trainer.model if self._separate is None else self._separate
        where = (transform_of(model), self._backend, self._workspace)
        call = FusedLogps(labels, None, *where, reduction="none" if per_token else "sum")
        adapted = self._model if self._separate is None else None
        copy = _ADAPTER if _ADAPTER in getattr(adapted, "peft_config", ()) else None
        # Preparing a model for mixed precision puts autocast around the forward that `head_call` goes around.
        with as_reference(model, adapted, copy), trainer.accelerator.autocast():
            return run_in_head(model, model_inputs, call)["logps"]

    def drop(self) -> None:
        """Free the reference model, and TRL's copy of the adapter, and let evaluation ask for neither."""
        trainer = self._trainer
        trainer.precompute_ref_logps = False
        self._free()

    def _free(self) -> None:
        trainer = self._trainer
        had_model = self._has_model
        self.is_dropped |= had_model
        if trainer.ref_model is not None:
            # What the accelerator has prepared it keeps, too.
            prepared = trainer.accelerator._models
            prepared[:] = [model for model in prepared if model is not trainer.ref_model]
            trainer.ref_model = None
        model = self._model
        if self._is_adapter and _ADAPTER in model.peft_config and _ADAPTER not in model.active_adapters:
            model.delete_adapter(_ADAPTER)
        if had_model:
            gc.collect()  # TRL patches the model's forward with a method of itself: a circle

    def fill_datasets(self) -> None:
        """Compute the reference's log-probs of all examples, into columns of the datasets; then drop the model.

        Raises ValueError where this cannot be done.
        """
        trainer = self._trainer
        args = trainer.args
        if not self.is_needed or self._needs_tokens:
            kind = "needs them per token" if self.is_needed else "needs no reference"
            raise ValueError(f"cache_reference: {self._loss.name} {kind}; expected False, got True")
        if args.sync_ref_model:
            raise ValueError(
                "cache_reference: expected False with sync_ref_model, which changes the reference, got True"
            )
        if self._separate is None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise ValueError(
                "cache_reference: expected False where the model is sharded when training starts, got True"
            )
        trainer.train_dataset = self._filled(
            "train_dataset", trainer.train_dataset, args.per_device_train_batch_size
        )
        size = args.per_device_eval_batch_size
        if isinstance(trainer.eval_dataset, dict):
            trainer.eval_dataset = {
                name: self._filled(f"eval_dataset[{name!r}]", dataset, size)
                for name, dataset in trainer.eval_dataset.items()
            }
        elif trainer.eval_dataset is not None:
            trainer.eval_dataset = self._filled("eval_dataset", trainer.eval_dataset, size)
        self._free()

    def _filled(self, name: str, dataset: Any, batch_size: int) -> Any:
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"cache_reference: expected {name} to be a datasets.Dataset, got {type(dataset).__name__}"
            )
        if all(column in dataset.column_names for column in REFERENCE_COLUMNS):
            return dataset
        trainer = self._trainer
        table = reference_table(
            dataset,
            [0] * len(dataset),  # in the dataset's order
            self._sums_of,
            batch_size=batch_size,
            accelerator=trainer.accelerator,
            is_quiet=trainer.args.disable_tqdm,
        )
        return with_columns(dataset, table.float())

    def _sums_of(self, rows: list[Any]) -> Tensor:
        trainer = self._trainer
        batch = {key: value.to(trainer.accelerator.device) for key, value in trainer.data_collator(rows).items()}
        return self._logps(*split_batch(trainer, batch))


def split_batch(trainer: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """(what the model is called with, labels (S, T)): -100 on prompt and padding, not shifted."""
    own = ("completion_mask", *REFERENCE_COLUMNS)
    model_inputs = {key: value for key, value in inputs.items() if key not in own}
    completion = inputs["completion_mask"]
    if hasattr(trainer, "_truncate_inputs"):  # TRL 0.29 and 1.0 pad first, and truncate in the loss
        ids, attention = model_inputs["input_ids"], model_inputs["attention_mask"]
        ids, attention, completion = trainer._truncate_inputs(ids, attention, completion)
        model_inputs |= {"input_ids": ids, "attention_mask": attention}
    return model_inputs, model_inputs["input_ids"].masked_fill(completion == 0, -100)
