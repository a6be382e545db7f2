"""`SftTrainer`: supervised fine-tuning with a fused cross-entropy, on `HeadTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

import slime_fused
from slime_fused import reference
from slime_fused.losses import SFT
from slime_fused.model.averages import Averages
from slime_fused.model.calls import FusedLoss, OverLabels
from slime_fused.model.transform import LogitTransform
from slime_fused.trainer.base import HeadTrainer
from slime_fused.trainer.card import CardText
from slime_fused.trainer.data import IGNORE_INDEX
from slime_fused.trainer.sft_config import SftConfig
from slime_fused.trainer.sft_data import SFT_COLUMNS, SftCollator, prepare_examples

_STATS = ("entropy", "is_top1")


class SftTrainer(HeadTrainer):
    """Trains a causal language model on completions: the stage before preferences.

    The loss is the mean over all labelled tokens of the optimizer step, however it is cut into micro-batches and
    spread over processes. The arguments and errors are those of `SlimeTrainer`; rows are as
    `slime_fused.trainer.sft_formats` describes.
    """

    args: SftConfig

    config_class = SftConfig
    token_columns = SFT_COLUMNS
    tag_names = ("sft",)
    stage = "sft"

    def prepare_dataset(self, dataset: Any, name: str) -> Dataset | IterableDataset:
        """See `HeadTrainer.prepare_dataset`."""
        tokenizer: Any = self.processing_class
        return prepare_examples(dataset, tokenizer, self.args, name, self.num_embeddings)

    def make_collator(self, *, has_layout: bool) -> Callable[[list[Any]], dict[str, Any]]:
        """See `HeadTrainer.make_collator`."""
        tokenizer: Any = self.processing_class
        return SftCollator(tokenizer.pad_token_id, self.args.pad_to_multiple_of, has_layout=has_layout)

    def count_items(self, batch: Mapping[str, Any]) -> Tensor:
        """(1,): tokens that are predicted."""
        return (batch["labels"][:, 1:] != IGNORE_INDEX).sum().double().reshape(1)

    def head_loss(self, model: nn.Module, batch: dict[str, Any], shares: Tensor | None) -> dict[str, Tensor]:
        """See `HeadTrainer.head_loss`."""
        labels, layout = batch["labels"], batch.get("layout")
        smoothing, z_loss = self.args.label_smoothing, self.args.z_loss
        if self.args.loss_impl == "naive":
            return self.run_naive(
                model, batch, lambda logits: naive_cross_entropy(logits, labels, smoothing, z_loss)
            )
        where = (self.transform, self.args.backend, self.args.workspace_limit())
        if smoothing or z_loss:
            return self.run_in_head(model, batch, FusedCrossEntropy(labels, layout, smoothing, z_loss, *where))
        # Of a plain mean the coefficient of each token is known, which saves a product.
        return self.run_in_head(model, batch, FusedLoss(labels, layout, SFT(), *where, stats=_STATS))

    def record(self, averages: Averages, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """See `HeadTrainer.record`. Means over the tokens that are predicted."""
        num_tokens = self.count_items(batch)[0]
        aux_loss = outputs.get("aux_loss")
        loss = outputs["loss"].detach().double()
        means = {
            "loss": loss if aux_loss is None else loss + aux_loss.detach(),
            "entropy": outputs["stats/entropy"].double().sum() / num_tokens,
            "mean_token_accuracy": outputs["stats/is_top1"].double().sum() / num_tokens,
        }
        averages.add("tokens", num_tokens, means if aux_loss is None else {**means, "aux_loss": aux_loss})
        num_rows = num_tokens.new_tensor(batch["labels"].shape[0])
        averages.count({"num_rows": num_rows, "num_completion_tokens": num_tokens})

    def card_text(self) -> CardText:
        """See `HeadTrainer.card_text`."""
        settings = {
            name: getattr(self.args, name) for name in ("label_smoothing", "z_loss", "completion_only_loss")
        }
        return CardText("on completions, with the cross-entropy of their tokens", settings)


@dataclass(frozen=True)
class FusedCrossEntropy(OverLabels):
    """A `HeadCall` that computes a mean cross-entropy, with what `FusedLoss` has no place for."""

    labels: Tensor
    """(S, T), as in `FusedLoss`."""
    layout: slime_fused.TokenLayout | None
    label_smoothing: float
    z_loss: float
    transform: LogitTransform
    backend: str
    workspace: int | str

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """``loss``, and ``stats/*`` in the shape of the labels."""
        options = {"reduction": "none", "label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        told = self.run(slime_fused.linear_cross_entropy, hidden, weight, bias, **options, return_stats=_STATS)
        loss = told.losses.sum() / (self.labels[:, 1:] != IGNORE_INDEX).sum()
        return {"loss": loss, "stats/entropy": told.entropy.detach(), "stats/is_top1": told.is_top1}


def naive_cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> dict[str, Tensor]:
    """The loss from materialised ``logits`` (S, T, V), by autograd, with the same statistics."""
    targets = labels[:, 1:]
    logits = logits[:, -labels.shape[1] : -1].float()
    loss = reference.cross_entropy(logits, targets, label_smoothing=label_smoothing, z_loss=z_loss)
    with torch.no_grad():
        is_target = targets != IGNORE_INDEX
        logps = torch.log_softmax(logits, dim=-1)
        entropy = -(logps.exp() * logps).sum(-1) * is_target
        is_top1 = (logits.argmax(-1) == targets) & is_target
    return {"loss": loss, "stats/entropy": entropy, "stats/is_top1": is_top1}
