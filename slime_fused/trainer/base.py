"""`HeadTrainer`: a `transformers.Trainer` whose loss runs inside the model's output head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from slime_fused.model.averages import Averages
from slime_fused.model.calls import run_in_head
from slime_fused.model.check import check_head
from slime_fused.model.head import HeadCall, unwrap_peft
from slime_fused.model.transform import transform_of
from slime_fused.trainer.card import CardText, model_card
from slime_fused.trainer.checkpoints import RUN_KEY, check_same_run, find_checkpoint
from slime_fused.trainer.config import HeadConfig
from slime_fused.trainer.data import check_vocabulary
from slime_fused.trainer.evaluation import ExactEvaluation
from slime_fused.trainer.saving import whole_weights
from slime_fused.trainer.setup import (
    CheckedCollator,
    call_model_init,
    check_arguments,
    check_trains,
    embedding_size,
    find_tokenizer,
    initial_model,
    ready_model,
    refuse_streams,
    with_learning_rate,
    with_lengths,
    with_pad_token,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_TOKENS = "slime_fused: num_tokens"
"""Where a checkpoint's state keeps how many tokens were trained on."""

AnyDataset: TypeAlias = Dataset | IterableDataset | Iterable[Mapping[str, Any]]


class HeadTrainer(ExactEvaluation, ABC):
    """What the trainers of this package share, whatever their loss.

    The loss runs inside the model's output head (`slime_fused.model.head`), so the (tokens x vocabulary) logits
    never exist as a whole and sharded training keeps its hooks.

    An optimizer step has the same gradient however it is cut into micro-batches and spread over processes: each
    micro-batch is weighted by its share of the step's items (pairs, tokens, ...), which `count_items` counts. Not
    so where the loss looks at a whole batch: `PreferenceTrainer`.

    A subclass says what the data are (`prepare_dataset`, `make_collator`, `token_columns`), how a batch counts
    (`count_items`), what runs in the head (`head_loss`), what is logged (`record`) and what the card says
    (`card_text`).

    Args and errors: see `slime_fused.trainer.SlimeTrainer`.
    """

    args: HeadConfig

    config_class: ClassVar[type[HeadConfig]] = HeadConfig
    """What ``args`` must be."""
    token_columns: ClassVar[tuple[str, ...]] = ()
    """Columns of a prepared dataset, of which batches are made."""
    loss_inputs: ClassVar[tuple[str, ...]] = ("labels", "layout")
    """Entries of a batch that are for the loss, not for the model."""
    tag_names: ClassVar[tuple[str, ...]] = ()
    """Tags of the models it makes."""
    stage: ClassVar[str] = ""
    """The kind of training, which a run goes on with from a checkpoint."""
    # Our loss is normalised over the whole accumulation window; the base class must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        args: HeadConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = self.config_class() if args is None else args
        check_arguments(args, self.config_class, kwargs)
        refuse_streams(eval_dataset, args.world_size)
        model_init = kwargs.pop("model_init", None)
        loaded: Any = initial_model(model, model_init, args, optimizers)
        tokenizer = with_pad_token(find_tokenizer(model, loaded) if processing_class is None else processing_class)
        loaded = ready_model(loaded, peft_config, args)
        args = with_learning_rate(args, loaded)
        self.transform = transform_of(loaded)
        self.num_embeddings = embedding_size(loaded)
        check_vocabulary([tokenizer.pad_token_id], self.num_embeddings, tokenizer, "processing_class, its padding")
        self._train_averages, self._eval_averages = Averages(), Averages()
        self._num_tokens: Tensor | float | None = None
        self._head_is_checked = not args.check_head or args.loss_impl == "naive"
        # `prepare_dataset` needs both, and the base class sets them only when it has the datasets.
        self.args, self.processing_class = args, tokenizer
        train_dataset = with_lengths(self.prepared(train_dataset, "train"), args)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self.prepared(value, f"eval ({name})") for name, value in eval_dataset.items()}
        else:
            eval_dataset = self.prepared(eval_dataset, "eval")
        collator = self.make_collator(has_layout=True)
        super().__init__(
            model=loaded,
            args=args,
            data_collator=CheckedCollator(data_collator, self.rows_per_item) if data_collator else collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            **kwargs,
        )
        if model_init is not None:
            self.model_init = lambda trial: ready_model(call_model_init(model_init, trial), peft_config, args)
        # Releases before 5.19 know no `loss_is_scaled_for_ga`; they divide unless the model takes the item count.
        self.model_accepts_loss_kwargs = True
        if hasattr(loaded, "add_model_tags"):
            loaded.add_model_tags(list(self.tag_names))

    @abstractmethod
    def prepare_dataset(self, dataset: Any, name: str) -> Dataset | IterableDataset:
        """``dataset`` with `token_columns`, as it is if it has them. ``name`` ("train", "eval") is for errors."""

    @abstractmethod
    def make_collator(self, *, has_layout: bool) -> Callable[[list[Any]], dict[str, Any]]:
        """What makes batches of prepared rows: ``input_ids``, ``attention_mask``, ``labels``, and ``layout``
        (their `TokenLayout`) if ``has_layout``. The base class's ``processing_class`` is a tokenizer.
        """

    @abstractmethod
    def count_items(self, batch: Mapping[str, Any]) -> Tensor:
        """(K,) float64 on the batch's device. The first entry counts what the loss is a mean of; the others,
        further counts whose shares `head_loss` is to know.
        """

    @abstractmethod
    def head_loss(self, model: nn.Module, batch: dict[str, Any], shares: Tensor | None) -> dict[str, Tensor]:
        """The outputs for one batch, by `run_in_head` or `run_naive`; ``loss`` is a mean over the batch's items.

        ``shares`` (K,): the batch's counts over the step's, times the number of processes. The caller weights
        the loss by the first. None outside training.
        """

    @abstractmethod
    def record(self, averages: Averages, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Add one batch, of training or of an evaluation, to what is logged."""

    @abstractmethod
    def card_text(self) -> CardText:
        """What the model card says of the method."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = list(self.token_columns)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in the base class, from a checkpoint that is whole and of this kind of run.

        Raises RunRefusedError where there is none, or where no step would be made or change anything.
        """
        rows = self.get_total_train_batch_size(self.args) // self.args.gradient_accumulation_steps
        check_trains(self.model, self.args, self.train_dataset, rows)
        resume_from_checkpoint = find_checkpoint(
            resume_from_checkpoint, Path(str(self.args.output_dir)), save_only_model=self.args.save_only_model
        )
        if resume_from_checkpoint is not None:
            check_same_run(resume_from_checkpoint, self._run_kind())
        self.before_training(resume_from_checkpoint)
        self._num_tokens = None  # a checkpoint may know
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def before_training(self, checkpoint: str | None) -> None:
        """What is done before the weights move or those of ``checkpoint`` are loaded: nothing here."""

    def _run_kind(self) -> dict[str, Any]:
        text = self.card_text()
        settings = {name: getattr(value, "__qualname__", str(value)) for name, value in text.settings.items()}
        is_adapter = hasattr(self.accelerator.unwrap_model(self.model), "peft_config")
        return {"stage": self.stage, "adapter": is_adapter, "loss": {"trained": text.sentence, **settings}}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one optimizer step, and (K,): its `count_items` over all processes."""
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        if not batches:
            return batches, None
        counts = [
            torch.cat([self.count_items(batch), batch["attention_mask"].sum().double().reshape(1)])
            for batch in batches
        ]
        total = self.accelerator.reduce(torch.stack(counts).sum(0).to(device), reduction="sum")
        if self._num_tokens is None:
            kept: Any = self.state.stateful_callbacks
            self._num_tokens = float(kept.get(_TOKENS, 0))
        self._num_tokens = self._num_tokens + total[-1]
        return batches, total[:-1]

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
        self.check_head_once(model, inputs)
        shares = None
        if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.dim() == 1:
            # Gradients are averaged over processes, hence the number of them.
            shares = self.count_items(inputs) / num_items_in_batch * self.accelerator.num_processes
        outputs = self.head_loss(model, inputs, shares)
        averages = self._train_averages if model.training else self._eval_averages
        self.record(averages, outputs, inputs)
        averages.count({"num_new_tokens": inputs["attention_mask"].sum()})
        loss = outputs["loss"]
        if "aux_loss" in outputs:
            loss = loss + outputs["aux_loss"]
        if shares is not None:
            loss = loss * shares[0].to(loss.dtype)
        return (loss, outputs) if return_outputs else loss

    def check_head_once(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Before anything is made of the head's log-probs: `slime_fused.model.check.check_head`."""
        if not self._head_is_checked:
            check_head(model, batch, self.transform, self.args.backend, self.args.workspace_limit())
            self._head_is_checked = True

    @property
    def _is_training(self) -> bool:
        return self.model is not None and self.model.training

    def run_in_head(self, model: nn.Module, batch: Mapping[str, Any], call: HeadCall) -> dict[str, Tensor]:
        """What ``call`` returns for the model's hidden states of ``batch``, and ``aux_loss`` of a router."""
        return run_in_head(model, self._model_inputs(batch), call)

    def run_naive(
        self, model: nn.Module, batch: Mapping[str, Any], loss_of: Callable[[Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What ``loss_of`` returns for the model's own logits (S, T, V) of ``batch``, and ``aux_loss``."""
        outputs = model(**self._model_inputs(batch), use_cache=False)
        result = loss_of(outputs.logits)
        if getattr(outputs, "aux_loss", None) is not None:
            config = unwrap_peft(self.accelerator.unwrap_model(model)).config.get_text_config()
            result["aux_loss"] = config.router_aux_loss_coef * outputs.aux_loss
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the averages since the last report to a report of training."""
        if "loss" in logs:
            averages = self._train_averages.flush(self._sum_over_processes)
            logs = {**averages, "num_tokens": int(self._num_tokens or 0), **logs}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the base class; under FSDP a whole model that loads by itself, even if checkpoints are in shards.

        The base class then writes nothing, and before release 5 shards are what FSDP2 keeps by default. Under FSDP1
        it would wait for ever where PEFT saves modules_to_save.
        """
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        in_shards = plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type)
        if in_shards and _internal_call:  # the base class writes the shards of a checkpoint
            super().save_model(output_dir, _internal_call)
        elif isinstance(self.model_wrapped, FullyShardedDataParallel):
            with whole_weights(self.model_wrapped, is_writer=self.args.should_save) as weights:
                if self.args.should_save:
                    self._save(output_dir, state_dict=weights)
        elif in_shards:
            gathered = self.accelerator.get_state_dict(self.model)
            if self.args.should_save:
                self._save(output_dir, state_dict=gathered)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        kept: Any = self.state.stateful_callbacks
        kept[_TOKENS] = int(self._num_tokens or 0)
        kept[RUN_KEY] = self._run_kind()
        super()._save_checkpoint(*args, **kwargs)

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
            self.card_text(),
            name=model_name or folder.resolve().name,
            base_model=finetuned_from or unwrap_peft(base).config._name_or_path or None,
            num_processes=self.accelerator.num_processes,
            num_steps=self.state.global_step,
            is_adapter=hasattr(base, "peft_config"),
            tags=[*self.tag_names, *extra],
            language=language,
            license=license,
        ).save(folder / "README.md")

    def _model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name not in self.loss_inputs}
