"""What a trainer does to a model and checks of its settings before the base class sees either."""

from __future__ import annotations

from typing import Any

from datasets import IterableDataset
from torch import nn
from transformers import set_seed

from slime_fused.model.head import unwrap_peft
from slime_fused.trainer.config import HeadConfig


def wrap_adapter(model: Any, peft_config: Any, args: HeadConfig) -> Any:
    """``model`` with the adapter of ``peft_config``, if any, ready for gradient checkpointing.

    Raises ValueError if it carries one already.
    """
    if peft_config is not None:
        if hasattr(model, "peft_config"):
            raise ValueError("peft_config: the model already carries an adapter; pass one or the other")
        from peft import get_peft_model

        # The base class seeds later, in its own constructor; the adapter's random start belongs to the run too.
        set_seed(args.seed)
        model = get_peft_model(model, peft_config)
    if hasattr(model, "peft_config") and args.gradient_checkpointing:
        # Reentrant checkpointing needs one input with a gradient, and frozen embeddings give none.
        unwrap_peft(model).enable_input_require_grads()
    return model


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of ``model``, adapters included, to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def check_parallelism(args: HeadConfig, train_dataset: Any) -> None:
    """Refuse, with a ValueError, what would split a batch between chosen and rejected rows."""
    loading: Any = args.accelerator_config
    if args.n_gpu > 1:
        raise ValueError(
            f"args: {args.n_gpu} GPUs in one process would split the batch between chosen and rejected rows; "
            "start one process per GPU (accelerate launch, torchrun) or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    if loading.split_batches:
        raise ValueError("args.accelerator_config: split_batches=True would separate chosen from rejected rows")
    if isinstance(train_dataset, IterableDataset):
        # Dispatching would slice one process's batch by rows, and so separate the pairs.
        loading.dispatch_batches = False
