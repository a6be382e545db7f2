"""Exact evaluation: what a sampler repeats, so that all processes have batches of one size, must not count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from slime_fused.model.averages import Averages
from slime_fused.model.items import first_items, own_items


def filled_up(values: Any, num_items: int) -> Any:
    """Tensors of as many rows as ``num_items``, zeros at the end: all processes gather the same shapes."""
    if isinstance(values, Mapping):
        return {name: filled_up(value, num_items) for name, value in values.items()}
    missing = num_items - values.shape[0]
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values


class ExactEvaluation(Trainer):
    """A trainer whose evaluation is that of each item once, on any number of processes: loss, what is logged, and
    the predictions, in the order of the dataset.
    """

    rows_per_item: ClassVar[int] = 1
    """Rows of a batch that belong together, a whole number of items apart: 2 for [chosen..., rejected...]."""
    _eval_averages: Averages

    def prepare_dataset(self, dataset: Any, name: str) -> Any:
        """``dataset`` with the columns that batches are made of."""
        raise NotImplementedError(f"{type(self).__name__}.prepare_dataset")

    def predictions(
        self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Tensor] | None:
        """What `predict` and ``compute_metrics`` get of a batch of P items: tensors (P, ...) by name, and as label
        ids a tensor (P, ...). None: nothing.
        """
        return None

    def prepared(self, dataset: Any, name: str) -> Any:
        """`prepare_dataset`, by the main process first. None, and the name of an evaluation dataset, stay."""
        if dataset is None or isinstance(dataset, str):
            return dataset
        error: Exception | None = None
        with PartialState().main_process_first():
            # Raised inside, it would leave the others at a barrier that the main process never comes to.
            try:
                dataset = self.prepare_dataset(dataset, name)
            except Exception as raised:
                error = raised
        if error is not None:
            raise error
        return dataset

    def for_evaluation(self, dataset: Any, name: str) -> Any:
        """What batches of an evaluation are made of: `prepared`."""
        return self.prepared(dataset, name)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As in the base class; ``eval_dataset`` may be raw rows."""
        return super().get_eval_dataloader(self.for_evaluation(eval_dataset, "eval"))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As in the base class; ``test_dataset`` may be raw rows."""
        return super().get_test_dataloader(self.for_evaluation(test_dataset, "test"))

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        # In the dataset's order: grouped by length, predictions would come in another.
        return None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The loss of an evaluation batch, and its `predictions`; of what the sampler repeats, nothing counts."""
        inputs = self._prepare_inputs(inputs)
        num_items = inputs["labels"].shape[0] // self.rows_per_item
        num_own = own_items(self.accelerator.gradient_state, num_items, self.accelerator.process_index)
        if 0 < num_own < num_items:
            inputs = first_items(inputs, num_own, num_items, self.rows_per_item)
            inputs.pop("layout", None)  # the loss makes it again, of the labels
        averages = self._eval_averages
        if num_own == 0:
            # The model runs all the same: other processes may wait for its shards.
            self._eval_averages = Averages()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        finally:
            discarded, self._eval_averages = self._eval_averages, averages
        if num_own == 0:
            averages.add_nothing_of(discarded)
        told = None if prediction_loss_only else self.predictions(outputs, inputs)
        predictions, label_ids = (None, None) if told is None else (filled_up(x, num_items) for x in told)
        return loss.detach(), predictions, label_ids

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in the base class, with what `record` logs under ``metric_key_prefix``."""
        self._eval_averages = Averages()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        metrics = self.finish(self._eval_averages.flush(self._sum_over_processes))
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """The averages of an evaluation, with what follows from them."""
        if "num_new_tokens" in metrics:
            metrics["num_tokens"] = metrics.pop("num_new_tokens")
        return metrics

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")
