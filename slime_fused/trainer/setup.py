"""What a trainer does to a model and data, and checks of its arguments, before the base class sees any of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from slime_fused.model.head import attach_head, unwrap_peft
from slime_fused.trainer.checkpoints import RunRefusedError
from slime_fused.trainer.config import HeadConfig
from slime_fused.trainer.dropout import switch_dropout_off
from slime_fused.trainer.loading import load_model, load_tokenizer


def check_arguments(args: Any, config_class: type[HeadConfig], options: Mapping[str, Any]) -> None:
    """Refuse what a trainer of this package cannot honour, before a model is loaded. ``options``: further arguments
    of its constructor. Raises TypeError or ValueError.
    """
    if not isinstance(args, config_class):
        raise TypeError(
            f"args: expected a {config_class.__name__}, which has the loss's and the data's settings, got "
            f"{type(args).__name__}; {config_class.__name__}(**{{...}}) takes the same names"
        )
    if options.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func: expected None: it would get logits, which do not exist; give PreferenceTrainer a "
            "function of log-probs as its loss"
        )
    loading: Any = args.accelerator_config
    if args.n_gpu > 1:
        raise ValueError(
            f"args: {args.n_gpu} GPUs in one process would split the batch between chosen and rejected rows; "
            "start one process per GPU (accelerate launch, torchrun) or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(loading, name):
            raise ValueError(f"args.accelerator_config: {name}=True would separate chosen from rejected rows")
    # Left to itself, accelerate dispatches the batches of a stream.
    loading.dispatch_batches = False


def initial_model(model: Any, model_init: Any, args: HeadConfig, optimizers: Sequence[Any]) -> Any:
    """The model to begin with: ``model``, loaded if it is a name or folder, or what ``model_init`` makes."""
    if (model is None) == (model_init is None):
        got = "neither" if model is None else "both"
        raise ValueError(f"model: expected either a model (or its name or folder) or model_init, got {got}")
    if model_init is None:
        return load_model(model, **args.model_options()) if isinstance(model, str) else model
    if any(optimizers):
        raise ValueError("optimizers: expected none with model_init, whose models have other parameters each time")
    set_seed(args.seed)
    return call_model_init(model_init, None)


def call_model_init(model_init: Callable[..., Any], trial: Any) -> Any:
    """What it makes, given ``trial`` if it takes an argument."""
    return model_init(trial) if inspect.signature(model_init).parameters else model_init()


def find_tokenizer(model: Any, loaded: Any) -> PreTrainedTokenizerBase:
    """That of ``model``, the trainer's argument, or of the model it stands for."""
    name = model if isinstance(model, str) else unwrap_peft(loaded).config._name_or_path
    if not name:
        raise ValueError(
            "processing_class: expected a tokenizer: the model has no name or folder from which to load one"
        )
    return load_tokenizer(name)


def embedding_size(model: Any) -> int | None:
    """How many token ids ``model`` embeds; None where its embedding does not say."""
    return getattr(unwrap_peft(model).get_input_embeddings(), "num_embeddings", None)


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """``tokenizer`` with a pad token: its EOS token if it has none."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError("processing_class: expected a tokenizer with a pad or an EOS token; it has neither")
    return tokenizer


def ready_model(model: Any, peft_config: Any, args: HeadConfig) -> Any:
    """``model`` with the adapter of ``peft_config``, if any, without dropout, and ready for head calls.

    Raises ValueError if it carries an adapter already.
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
    if args.disable_dropout:
        switch_dropout_off(model)
    if args.loss_impl == "fused":
        attach_head(model)
    return model


def with_learning_rate(args: HeadConfig, model: Any) -> Any:
    """``args`` with a learning rate: a copy where it was left to the kind of ``model``."""
    if args.learning_rate is not None:
        return args
    args = copy.copy(args)
    args.learning_rate = args.resolved_learning_rate(is_adapter=hasattr(model, "peft_config"))
    return args


def with_lengths(dataset: Any, args: HeadConfig) -> Any:
    """A prepared ``dataset`` with the column that samplers group rows by, if ``args`` asks for one of those."""
    wanted = getattr(args, "train_sampling_strategy", "random") in ("group_by_length", "batch_rebalance")
    wanted = wanted or bool(getattr(args, "group_by_length", False))  # its name before transformers 5
    name = args.length_column_name
    if not wanted or not isinstance(dataset, Dataset) or name in dataset.column_names:
        return dataset
    lengths = [max(len(value) for value in row.values() if isinstance(value, list)) for row in dataset]
    return dataset.add_column(name, lengths)


def check_trains(model: Any, args: HeadConfig, dataset: Any, batch_size: int) -> None:
    """Refuse, with a RunRefusedError, a training in which no step would be made or change anything. ``batch_size``:
    rows of one batch over all processes.
    """
    if model is not None and not any(parameter.requires_grad for parameter in model.parameters()):
        raise RunRefusedError(
            "model: expected parameters to train, got none with requires_grad=True; set it, or add an adapter "
            "(peft_config)"
        )
    if args.max_steps == 0:
        raise RunRefusedError("max_steps: expected at least 1, or -1 for num_train_epochs, got 0")
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise RunRefusedError(
            f"num_train_epochs: expected a number > 0 where max_steps is not given, got {args.num_train_epochs}"
        )
    if args.dataloader_drop_last and hasattr(dataset, "__len__") and len(dataset) < batch_size:
        raise RunRefusedError(
            f"dataloader_drop_last: expected at least the {batch_size} rows of one batch over all processes, of "
            f"which fewer are dropped, got a train_dataset of {len(dataset)}"
        )


def refuse_streams(datasets: Any, num_processes: int) -> None:
    """Refuse, with a ValueError, evaluation data that several processes cannot share exactly."""
    for dataset in datasets.values() if isinstance(datasets, dict) else [datasets]:
        if isinstance(dataset, IterableDataset) and num_processes > 1:
            raise ValueError(
                "eval_dataset: expected a dataset of known length for several processes, got a stream, whose rows "
                "are repeated to fill the last batches without a sign; Dataset.from_list(list(stream)) makes one"
            )


@dataclass(frozen=True)
class CheckedCollator:
    """A collator of the caller's, whose batches are looked at: a wrong one would train on something else."""

    collator: Callable[[list[Any]], dict[str, Any]]
    rows_per_item: int

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """The batch. Raises ValueError for one that is not as the trainer's own would be."""
        batch = self.collator(rows)
        names = ("input_ids", "attention_mask", "labels")
        shapes = {name: tuple(batch[name].shape) for name in names if isinstance(batch.get(name), Tensor)}
        if len(shapes) < 3 or len(set(shapes.values())) > 1 or len(shapes["labels"]) != 2:
            raise ValueError(
                f"data_collator: expected tensors {names} of one shape (S, T), got {shapes or list(batch)}"
            )
        if shapes["labels"][0] % self.rows_per_item:
            raise ValueError(
                f"data_collator: expected the chosen rows and as many rejected ones after them, got "
                f"{shapes['labels'][0]} rows"
            )
        mask = torch.as_tensor(batch["attention_mask"])
        if not bool(mask[:, :1].all()):
            raise ValueError("data_collator: expected batches padded on the right, got padding on the left")
        return batch
