"""`SlimeTrainer`: reference-free preference training with the fused SLIME loss, on `transformers.Trainer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from slime_fused.model.calls import FusedLoss, naive_loss, run_in_head
from slime_fused.model.check import check_head
from slime_fused.model.head import attach_head, unwrap_peft
from slime_fused.model.transform import find_logit_transform
from slime_fused.trainer.card import model_card
from slime_fused.trainer.config import SlimeConfig
from slime_fused.trainer.data import TOKEN_COLUMNS, PreferenceCollator, prepare_dataset
from slime_fused.trainer.loading import load_model
from slime_fused.trainer.metrics import PairMetrics

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

AnyDataset: TypeAlias = Dataset | IterableDataset | Iterable[Mapping[str, Any]]


class SlimeTrainer(Trainer):
    """Trains a causal language model on preference pairs with the SLIME loss.

    There is no reference model. The loss runs inside the model's output head (`slime_fused.model.head`), so the
    (tokens x vocabulary) logits never exist as a whole and sharded training keeps its hooks.

    An optimizer step has the same gradient however it is cut into micro-batches and spread over processes: each
    micro-batch is weighted by its share of the step's pairs, and with ``stabilizer_reduction="token"`` its
    stabilizer by its share of the step's rejected tokens. Evaluation weights batches by pairs; there, "token"
    means the rejected tokens of one batch.

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

    Raises:
        TypeError, ValueError: for a model whose head cannot be used, an unusable dataset, or a setting that splits
            a batch across devices. `HeadMismatchError` before the first step if the model's logits are not what
            its head gives.
    """

    args: SlimeConfig

    _tag_names = ("slime", "preference-training")
    # Our loss is normalised over the whole accumulation window; the base class must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
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
        _check_parallelism(args, train_dataset)
        loaded: Any = load_model(model, **args.model_options()) if isinstance(model, str) else model
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(unwrap_peft(loaded).config._name_or_path)
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        if processing_class.pad_token_id is None:
            raise ValueError("processing_class: expected a tokenizer with a pad or an EOS token; it has neither")
        loaded = _wrap_adapter(loaded, peft_config, args)
        if args.disable_dropout:
            for module in loaded.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        if args.loss_impl == "fused":
            attach_head(loaded)
        self.transform = find_logit_transform(unwrap_peft(loaded).config)
        self.loss_config = args.loss_config()
        self._train_metrics = PairMetrics()
        self._eval_metrics = PairMetrics()
        self._head_is_checked = not args.check_head or args.loss_impl == "naive"

        def prepare(dataset: Any, name: str) -> Any:
            with PartialState().main_process_first():
                return prepare_dataset(dataset, processing_class, args, name)

        if train_dataset is not None:
            train_dataset = prepare(train_dataset, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(value, f"eval ({name})") for name, value in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset, "eval")
        if data_collator is None:
            # Of a stream the main process reads every batch and gives each process its rows of the tensors.
            evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
            is_cut_up = bool(getattr(args.accelerator_config, "dispatch_batches", False)) or any(
                isinstance(dataset, IterableDataset) for dataset in (train_dataset, *evaluated)
            )
            data_collator = PreferenceCollator(
                processing_class.pad_token_id, args.pad_to_multiple_of, has_layout=not is_cut_up
            )
        super().__init__(
            model=loaded,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            **kwargs,
        )
        # Releases before 5.19 know no `loss_is_scaled_for_ga`; they divide unless the model takes the item count.
        self.model_accepts_loss_kwargs = True
        if hasattr(loaded, "add_model_tags"):
            loaded.add_model_tags(list(self._tag_names))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = list(TOKEN_COLUMNS)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one optimizer step, and (2,): its pairs and rejected tokens over all processes."""
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        if not batches:
            return batches, None
        counts = torch.stack([_count(batch["labels"].to(device)) for batch in batches]).sum(0)
        return batches, self.accelerator.reduce(counts, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, weighted by its share of the optimizer step if ``num_items_in_batch``
        is what `get_batch_samples` returns.
        """
        if not self._head_is_checked:
            check_head(model, inputs, self.transform, self.args.backend, self.args.workspace_limit())
            self._head_is_checked = True
        config, weight = self.loss_config, None
        if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() == 2:
            own = _count(inputs["labels"])
            # Gradients are averaged over processes, hence the number of them.
            shares = own / num_items_in_batch * self.accelerator.num_processes
            weight = shares[0]
            if config.stabilizer_reduction == "token":
                config = dataclasses.replace(config, lambda_l=config.lambda_l * float(shares[1] / shares[0]))
        outputs = self._forward(model, inputs, config)
        metrics = self._train_metrics if model.training else self._eval_metrics
        metrics.add(outputs, inputs, config.margin_hard)
        loss = outputs["loss"]
        if "aux_loss" in outputs:
            loss = loss + outputs["aux_loss"]
        if weight is not None:
            loss = loss * weight.to(loss.dtype)
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: dict[str, Any], config: Any) -> dict[str, Tensor]:
        inputs = dict(inputs)
        labels, layout = inputs.pop("labels"), inputs.pop("layout", None)
        if self.args.loss_impl == "fused":
            call = FusedLoss(labels, layout, config, self.transform, self.args.backend, self.args.workspace_limit())
            return run_in_head(model, inputs, call)
        outputs = model(**inputs, use_cache=False)
        result = naive_loss(outputs.logits, labels, config)
        if getattr(outputs, "aux_loss", None) is not None:
            base_config = unwrap_peft(self.accelerator.unwrap_model(model)).config.get_text_config()
            result["aux_loss"] = base_config.router_aux_loss_coef * outputs.aux_loss
        return result

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of an evaluation batch. There are no predictions to return: the logits do not exist."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in the base class, with the metrics of `PairMetrics` under ``metric_key_prefix``."""
        self._eval_metrics = PairMetrics()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        metrics = self._eval_metrics.flush(self._sum_over_processes)
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the averages since the last report to a report of training."""
        if "loss" in logs:
            metrics = self._train_metrics.flush(self._sum_over_processes)
            logs = {**metrics, **logs}
        super().log(logs, *args, **kwargs)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write ``README.md`` into the output folder: the loss and its paper, the settings, and the last reports.

        ``model_name`` is the output folder's name by default and ``finetuned_from`` the model that was loaded. The
        base class's other arguments, which describe data sets of the hub, are taken and not used.
        """
        if not self.is_world_process_zero():
            return
        base: Any = self.accelerator.unwrap_model(self.model)
        extra = [tags] if isinstance(tags, str) else list(tags or [])
        folder = Path(str(self.args.output_dir))
        model_card(
            self.args,
            self.state.log_history,
            name=model_name or folder.resolve().name,
            base_model=finetuned_from or unwrap_peft(base).config._name_or_path or None,
            num_processes=self.accelerator.num_processes,
            num_steps=self.state.global_step,
            is_adapter=hasattr(base, "peft_config"),
            tags=[*self._tag_names, *extra],
            language=language,
            license=license,
        ).save(folder / "README.md")

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")


def _count(labels: Tensor) -> Tensor:
    """(2,) float64: the pairs of a batch and its rejected tokens that are predicted."""
    num_pairs = labels.shape[0] // 2
    num_rejected = (labels[num_pairs:, 1:] != -100).sum()
    return torch.stack([num_rejected.new_tensor(num_pairs), num_rejected]).double()


def _wrap_adapter(model: Any, peft_config: Any, args: SlimeConfig) -> Any:
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


def _check_parallelism(args: SlimeConfig, train_dataset: Any) -> None:
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
