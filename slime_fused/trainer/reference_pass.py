"""When and for which data a trainer computes its reference's log-probs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from slime_fused.model.calls import FusedLogps
from slime_fused.model.reference import REFERENCE_COLUMNS, as_reference, reference_table, with_columns
from slime_fused.trainer.pair_metrics import REFERENCE
from slime_fused.trainer.reference import (
    LateReference,
    ReferenceCollator,
    adapter_changes,
    naive_sums,
)

logger = logging.get_logger(__name__)

_WAY_OUT = (
    f"pass a dataset with the columns {REFERENCE_COLUMNS} beside the tokenised ones (those of another trainer's "
    "train_dataset, say), or train an adapter (peft_config): its model without the adapter is the reference"
)


class ReferencePass:
    """The reference's side of a `PreferenceTrainer`. Of a loss that needs none, it does nothing."""

    def __init__(self, trainer: Any, *, is_needed: bool) -> None:
        self._trainer = trainer
        self.is_needed = is_needed
        self._has_trained = False

    def begin(self) -> None:
        """Once the trainer is built: refuse what has no reference."""
        trainer = self._trainer
        if not self.is_needed:
            return
        if trainer.model_init is not None:
            raise ValueError(
                f"model_init: {trainer.loss.name} needs a reference, which is the policy before training, and each "
                "training would begin with another; give a model"
            )
        if not self._has_adapter:
            for dataset in _all_of(trainer.train_dataset, trainer.eval_dataset):
                if isinstance(dataset, IterableDataset):
                    raise ValueError(
                        f"train_dataset, eval_dataset: {trainer.loss.name} needs a reference's log-probs, which "
                        f"cannot be computed in advance for a stream, and the model carries no adapter; {_WAY_OUT}"
                    )
        elif adapter_changes(trainer.model):
            logger.warning(
                "The adapter changes the model already, and the reference is the model without it; merge it into "
                "the model first (merge_and_unload) if the reference is to have it"
            )
        self._wrap_collator()
        trainer.add_callback(_FillWhenPrepared(self))

    def before_training(self, resume_from_checkpoint: Any) -> None:
        """Log-probs for all datasets, before the weights move or a checkpoint's are loaded."""
        trainer = self._trainer
        if self.is_needed:
            self._wrap_collator()
            trainer.train_dataset = self._referenced(trainer.train_dataset)
            self._add_to_evaluation()
            is_late = any(
                isinstance(d, LateReference) for d in _all_of(trainer.train_dataset, trainer.eval_dataset)
            )
            if is_late and resume_from_checkpoint and trainer.is_deepspeed_enabled and not self._has_adapter:
                raise ValueError(
                    "resume_from_checkpoint: under DeepSpeed the checkpoint's weights are loaded before the "
                    f"reference's log-probs can be computed; {_WAY_OUT}"
                )
        self._has_trained = True

    def for_evaluation(self, dataset: Any) -> Any:
        """``dataset`` (the trainer's own if None or a name), with log-probs.

        Raises ValueError if the policy of before training is gone.
        """
        if not self.is_needed:
            return dataset
        self._wrap_collator()
        if dataset is None or isinstance(dataset, str):
            if not self._has_trained:
                self._add_to_evaluation()
            return dataset
        # An adapter is left out batch by batch, at any time.
        return dataset if self._has_adapter else self._referenced(dataset)

    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """(2P,): from the batch, or by running the model without its adapter."""
        if REFERENCE in batch:
            known: Tensor = batch[REFERENCE]
            return known
        if not self._has_adapter:
            raise ValueError(
                f"{REFERENCE_COLUMNS[0]}: {self._trainer.loss.name} expected the reference's log-probs in every "
                f"batch, got none; {_WAY_OUT}"
            )
        return self._sums(model, dict(batch))

    def fill(self, model: nn.Module) -> None:
        """Give those datasets that wait for a sharded ``model`` their log-probs."""
        trainer = self._trainer
        for dataset in _all_of(trainer.train_dataset, trainer.eval_dataset):
            if isinstance(dataset, LateReference) and dataset.table is None:
                dataset.table = self._table(dataset.dataset, model)

    @property
    def _has_adapter(self) -> bool:
        return hasattr(self._trainer.accelerator.unwrap_model(self._trainer.model), "peft_config")

    def _wrap_collator(self) -> None:
        """Whenever batches are to be made: somebody may have replaced it since."""
        trainer = self._trainer
        if not isinstance(trainer.data_collator, ReferenceCollator):
            trainer.data_collator = ReferenceCollator(trainer.data_collator)

    def _lacks_columns(self, dataset: Any) -> bool:
        return isinstance(dataset, Dataset) and not set(REFERENCE_COLUMNS) <= set(dataset.column_names)

    def _add_to_evaluation(self) -> None:
        trainer = self._trainer
        if isinstance(trainer.eval_dataset, dict):
            trainer.eval_dataset = {name: self._referenced(x) for name, x in trainer.eval_dataset.items()}
        else:
            trainer.eval_dataset = self._referenced(trainer.eval_dataset)

    def _referenced(self, dataset: Any) -> Any:
        if not self._lacks_columns(dataset):
            return dataset
        if self._has_trained and not self._has_adapter:
            raise ValueError(
                f"train_dataset, eval_dataset: {self._trainer.loss.name} needs a reference's log-probs, and the "
                f"model has been trained since; give the dataset to the constructor, or {_WAY_OUT}"
            )
        if self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled:
            return LateReference(dataset)
        return with_columns(dataset, self._table(dataset, self._trainer.model))

    def _table(self, dataset: Dataset, model: nn.Module) -> Tensor:
        trainer = self._trainer
        lengths = [max(len(a), len(b)) for a, b in zip(dataset["chosen_ids"], dataset["rejected_ids"], strict=True)]
        return reference_table(
            dataset,
            lengths,
            lambda rows: self._sums(model, trainer._prepare_inputs(trainer.data_collator(rows))),
            batch_size=trainer.args.eval_batch_size,
            accelerator=trainer.accelerator,
            is_quiet=trainer.args.disable_tqdm,
        )

    def _sums(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        trainer = self._trainer
        labels = batch["labels"]
        # A model that is not prepared yet has no mixed precision of its own.
        with as_reference(model, trainer.accelerator.unwrap_model(model)), trainer.accelerator.autocast():
            if not self._has_adapter:  # which the check is to see
                trainer.check_head_once(model, batch)
            if trainer.args.loss_impl == "naive":
                return trainer.run_naive(model, batch, lambda logits: naive_sums(logits, labels))["logps"]
            args = trainer.args
            where = (trainer.transform, args.backend, args.workspace_limit())
            call = FusedLogps(labels, batch.get("layout"), *where, reduction="sum")
            return trainer.run_in_head(model, batch, call)["logps"]


class _FillWhenPrepared(TrainerCallback):
    def __init__(self, reference: ReferencePass) -> None:
        self._reference = reference

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._reference.fill(self._reference._trainer.model_wrapped)


def _all_of(*datasets: Any) -> list[Any]:
    """Those that are there, of datasets and dictionaries of them."""
    found: list[Any] = []
    for dataset in datasets:
        found += dataset.values() if isinstance(dataset, dict) else [dataset]
    return [dataset for dataset in found if dataset is not None]
