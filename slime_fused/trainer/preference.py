"""`PreferenceTrainer`: preference training with any loss of pairs, on `HeadTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from slime_fused.losses import Formula, Slime
from slime_fused.model.calls import FusedLoss, naive_loss
from slime_fused.trainer.base import HeadTrainer
from slime_fused.trainer.card import CardText, loss_text
from slime_fused.trainer.config import PreferenceConfig
from slime_fused.trainer.data import TOKEN_COLUMNS, PreferenceCollator, prepare_dataset
from slime_fused.trainer.metrics import Averages
from slime_fused.trainer.weighting import find_token_mean, reweighted

if TYPE_CHECKING:
    from peft import PeftModel

_PAIRS, _CHOSEN, _REJECTED = range(3)
"""Of `PreferenceTrainer.count_items`."""


class PreferenceTrainer(HeadTrainer):
    """Trains a causal language model on preference pairs with a loss of `slime_fused.losses`.

    Args:
        model: a causal language model, one wrapped by PEFT, or the folder or name of one.
        args: see `PreferenceConfig`.
        loss: a value of `slime_fused.losses`: `DPO`, `SimPO`, `CPO`, `ORPO`, `AlphaPO`, `Slime`, `KTO` (the chosen
            responses are desirable, the rejected ones undesirable) or an `Own`.

    The other arguments and the errors are those of `SlimeTrainer`.
    """

    args: PreferenceConfig

    config_class = PreferenceConfig
    token_columns = TOKEN_COLUMNS
    rows_per_item = 2
    tag_names: ClassVar[tuple[str, ...]] = ("preference-training",)

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: PreferenceConfig | None = None,
        loss: Formula | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(loss, Formula):
            raise TypeError(f"loss: expected a value of slime_fused.losses, such as DPO(), got {loss!r}")
        self.loss = loss
        self._token_mean = find_token_mean(loss)
        super().__init__(model, args, **kwargs)

    def prepare_dataset(self, dataset: Any, name: str) -> Dataset | IterableDataset:
        """See `HeadTrainer.prepare_dataset`."""
        tokenizer: Any = self.processing_class
        return prepare_dataset(dataset, tokenizer, self.args, name)

    def make_collator(self, *, has_layout: bool) -> Callable[[list[Any]], dict[str, Any]]:
        """See `HeadTrainer.make_collator`."""
        tokenizer: Any = self.processing_class
        return PreferenceCollator(tokenizer.pad_token_id, self.args.pad_to_multiple_of, has_layout=has_layout)

    def count_items(self, batch: Mapping[str, Any]) -> Tensor:
        """(3,): pairs, chosen and rejected tokens that are predicted."""
        labels = batch["labels"]
        num_pairs = labels.shape[0] // 2
        is_target = labels[:, 1:] != -100
        chosen, rejected = is_target[:num_pairs].sum(), is_target[num_pairs:].sum()
        return torch.stack([chosen.new_tensor(num_pairs), chosen, rejected]).double()

    def head_loss(self, model: nn.Module, batch: dict[str, Any], shares: Tensor | None) -> dict[str, Tensor]:
        """See `HeadTrainer.head_loss`."""
        loss, labels = self.loss, batch["labels"]
        if shares is not None and self._token_mean is not None:
            side = _CHOSEN if self._token_mean.side == "chosen" else _REJECTED
            loss = reweighted(loss, self._token_mean, shares[_PAIRS], shares[side])
        given = self._given(batch)
        if self.args.loss_impl == "naive":
            return self.run_naive(model, batch, lambda logits: naive_loss(logits, labels, loss, given))
        call = FusedLoss(
            labels,
            batch.get("layout"),
            loss,
            self.transform,
            self.args.backend,
            self.args.workspace_limit(),
            given,
        )
        return self.run_in_head(model, batch, call)

    def _given(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        given: dict[str, Tensor] = {}
        if "desirable" in self.loss.needs:
            labels = batch["labels"]
            given["desirable"] = torch.arange(labels.shape[0], device=labels.device) < labels.shape[0] // 2
        return given

    def record(self, averages: Averages, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """See `HeadTrainer.record`. Means over pairs; ``logps/*`` are mean log-probs per token."""
        counts = self.count_items(batch)
        chosen, rejected = outputs["mean_logps"].double().chunk(2)
        margins = chosen - rejected
        loss = outputs["loss"].detach().double() + outputs.get("aux_loss", margins.new_zeros(())).detach()
        means = {
            "loss": loss,
            "logps/chosen": chosen.mean(),
            "logps/rejected": rejected.mean(),
            "rewards/margins": margins.mean(),
            "rewards/accuracies": (margins > 0).double().mean(),
        }
        if isinstance(self.loss, Slime):
            means["slime/active_fraction"] = (margins < self.loss.margin_hard).double().mean()
        prefix = type(self.loss).__name__.lower()
        for name in self.loss.term_names:
            means[f"{prefix}/{_SHORT.get(name, name)}"] = outputs[f"terms/{name}"]
        if "aux_loss" in outputs:
            means["aux_loss"] = outputs["aux_loss"]
        averages.add("pairs", counts[_PAIRS], means)
        averages.count(
            {
                "num_pairs": counts[_PAIRS],
                "num_tokens": batch["attention_mask"].sum(),
                "num_completion_tokens": counts[1:].sum(),
            }
        )

    def card_text(self) -> CardText:
        """See `HeadTrainer.card_text`."""
        return loss_text(self.loss)


_SHORT = {"margin_loss": "margin"}
"""Terms that are logged under another name than the loss's own."""
