"""`SlimeTrainer`: reference-free preference training with the fused SLIME loss, on `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from slime_fused.losses import Slime
from slime_fused.trainer.base import AnyDataset
from slime_fused.trainer.config import SlimeConfig
from slime_fused.trainer.preference import PreferenceTrainer

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class SlimeTrainer(PreferenceTrainer):
    """Trains a causal language model on preference pairs with the SLIME loss.

    There is no reference model. The loss runs inside the model's output head (`slime_fused.model.head`), so the
    (tokens x vocabulary) logits never exist as a whole and sharded training keeps its hooks.

    An optimizer step has the same gradient however it is cut into micro-batches and spread over processes: each
    micro-batch is weighted by its share of the step's pairs, and with ``stabilizer_reduction="token"`` its
    stabilizer by its share of the step's rejected tokens. Evaluation weights batches alike.

    Args:
        model: a causal language model, one wrapped by PEFT, or the folder or name of one.
        args: see `SlimeConfig`.
        data_collator: makes ``input_ids``, ``attention_mask`` and ``labels`` of rows [chosen..., rejected...].
        train_dataset: rows as `slime_fused.trainer.formats` describes: a dataset, a streaming dataset or an
            iterable of dictionaries.
        eval_dataset: one such, or several by name.
        processing_class: the tokenizer; taken from the model's folder if None.
        callbacks: as in `transformers.Trainer`.
        optimizers: as in `transformers.Trainer`.
        peft_config: wraps the model in this adapter.
        kwargs: the other arguments of `transformers.Trainer`, but for ``compute_loss_func``. ``compute_metrics``
            gets what `predictions` says, one of each per pair in the order of the dataset, as `predict` gives it;
            ``model_init`` may stand in the place of ``model``.

    Raises:
        TypeError, ValueError: for a model whose head cannot be used, an unusable dataset, or a setting that splits
            a batch across devices. `HeadMismatchError` before the first step if the model's logits are not what
            its head gives.
    """

    args: SlimeConfig

    config_class = SlimeConfig
    tag_names = ("slime", "preference-training")

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        args: SlimeConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = SlimeConfig() if args is None else args
        super().__init__(
            model,
            args,
            args.loss_config() if isinstance(args, SlimeConfig) else Slime(),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            **kwargs,
        )
