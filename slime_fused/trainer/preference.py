"""`PreferenceTrainer`: preference training with any loss of pairs, on `HeadTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slime_fused.losses import SFT, Formula, PolicyGradient, as_loss
from slime_fused.model.averages import Averages
from slime_fused.model.calls import FusedLoss, naive_loss
from slime_fused.model.items import PairCounts
from slime_fused.model.reference import REFERENCE_COLUMNS
from slime_fused.model.terms import find_token_mean, logged_term, reweighted
from slime_fused.trainer.base import HeadTrainer
from slime_fused.trainer.card import CardText, loss_text
from slime_fused.trainer.config import PreferenceConfig
from slime_fused.trainer.data import TOKEN_COLUMNS, PreferenceCollator, prepare_dataset
from slime_fused.trainer.loss_needs import check_needs
from slime_fused.trainer.pair_metrics import REFERENCE, pair_means, token_means, unit_means
from slime_fused.trainer.reference import LateReference
from slime_fused.trainer.reference_pass import ReferencePass

if TYPE_CHECKING:
    from peft import PeftModel


class PreferenceTrainer(HeadTrainer):
    """Trains a causal language model on preference pairs with a loss of `slime_fused.losses`.

    A loss that needs a reference model gets the log-probs of the policy as it is before training, or of the model
    without its adapter where it carries one. They are computed once, before training, and become columns of the
    tokenised datasets (`REFERENCE_COLUMNS`, sums per response). A dataset that has them, such as TRL's with
    ``precompute_ref_log_probs``, keeps them; its rows may not be cut. For a stream, and for datasets that come
    later, a model with an adapter is run without it at each batch. Other losses run no reference at all.

    The gradient of an optimizer step is the same however the step is cut up, as `HeadTrainer` says, for every loss
    that is a mean over pairs, over responses or over tokens; terms that are means over the tokens of one side
    (``nll_reduction="token"``) are weighted by their own share. Where a loss looks at the whole batch
    (``KTO(baseline="batch")``, an `Own` with ``needs_batch``), its batch is one micro-batch of one process.

    Args:
        model: a causal language model, one wrapped by PEFT, or the folder or name of one.
        args: see `PreferenceConfig`.
        loss: a value of `slime_fused.losses`: `DPO`, `SimPO`, `CPO`, `ORPO`, `AlphaPO`, `Slime`, `KTO` (the chosen
            responses are desirable, the rejected ones undesirable; ``baseline`` "batch" or "zero"), an `Own`, or a
            function of pairs.

    The other arguments and the errors are those of `SlimeTrainer`. ValueError too for a loss that needs what pairs
    do not give, or a reference where there is none.
    """

    args: PreferenceConfig

    config_class = PreferenceConfig
    token_columns = (*TOKEN_COLUMNS, *REFERENCE_COLUMNS)
    loss_inputs = ("labels", "layout", REFERENCE)
    rows_per_item = 2
    tag_names: ClassVar[tuple[str, ...]] = ("preference-training",)
    stage = "preference"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        args: PreferenceConfig | None = None,
        loss: Formula | Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if loss is None:
            raise TypeError("loss: expected a value of slime_fused.losses, such as DPO(), got None")
        value: Any = as_loss(loss)
        if isinstance(value, SFT):
            raise ValueError(
                f"loss: expected a loss of preferences, got {value!r}: it would train on rejected responses too; "
                "take SftTrainer, or nll_weight of a loss of pairs"
            )
        if type(self).given is PreferenceTrainer.given:
            if isinstance(value, PolicyGradient):
                raise ValueError(f"loss: expected a loss of preferences, got {value!r}: it needs sampled responses")
            check_needs(value)
        self.loss: Formula = value
        self._token_mean = find_token_mean(value)
        self._reference = ReferencePass(self, is_needed="ref_logps" in value.needs)
        super().__init__(model, args, **kwargs)
        self._reference.begin()

    def before_training(self, checkpoint: str | None) -> None:
        """The reference's log-probs."""
        self._reference.before_training(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if model is not None:  # sharded, and still as it was made
            self._reference.fill(model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def for_evaluation(self, dataset: Any, name: str) -> Any:
        """See `HeadTrainer.for_evaluation`; with the reference's log-probs where the loss needs them."""
        return self._reference.for_evaluation(super().for_evaluation(dataset, name))

    def _get_train_sampler(self, train_dataset: Any = None, *args: Any) -> Any:
        # It may read rows to group them by length, before a sharded model can give them reference log-probs.
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, LateReference):
            return super()._get_train_sampler(dataset, *args)
        return super()._get_train_sampler(dataset.dataset, *args)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Under DeepSpeed in 16 bits the base class rounds whatever floats to them: sums of hundreds by units.
        known = inputs.get(REFERENCE)
        inputs = super()._prepare_inputs({name: value for name, value in inputs.items() if name != REFERENCE})
        return inputs if known is None else {**inputs, REFERENCE: known.to(self.args.device)}

    def prepare_dataset(self, dataset: Any, name: str) -> Any:
        """See `HeadTrainer.prepare_dataset`."""
        if isinstance(dataset, LateReference):
            return dataset
        tokenizer: Any = self.processing_class
        carried = REFERENCE_COLUMNS if self._reference.is_needed else ()
        return prepare_dataset(dataset, tokenizer, self.args, name, carried, self.num_embeddings)

    def make_collator(self, *, has_layout: bool) -> Callable[[list[Any]], dict[str, Any]]:
        """See `HeadTrainer.make_collator`."""
        tokenizer: Any = self.processing_class
        return PreferenceCollator(tokenizer.pad_token_id, self.args.pad_to_multiple_of, has_layout=has_layout)

    def count_items(self, batch: Mapping[str, Any]) -> Tensor:
        """(4,): the loss's units, pairs, chosen and rejected tokens that are predicted."""
        return PairCounts.of(batch["labels"]).by_unit(self.loss)

    def head_loss(self, model: nn.Module, batch: dict[str, Any], shares: Tensor | None) -> dict[str, Tensor]:
        """See `HeadTrainer.head_loss`."""
        loss, labels = self.loss if shares is None else reweighted(self.loss, shares), batch["labels"]
        given = self.given(model, batch)
        known = {REFERENCE: given[REFERENCE]} if REFERENCE in given else {}
        if self.args.loss_impl == "naive":
            outputs = self.run_naive(model, batch, lambda logits: naive_loss(logits, labels, loss, given))
            return {**outputs, **known}
        call = FusedLoss(
            labels,
            batch.get("layout"),
            loss,
            self.transform,
            self.args.backend,
            self.args.workspace_limit(),
            given,
            ("entropy", "is_top1") if self.args.log_token_statistics else None,
        )
        return {**self.run_in_head(model, batch, call), **known}

    def given(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the loss needs besides, for one batch: arguments of `slime_fused.preference_loss`."""
        given: dict[str, Tensor] = {}
        labels = batch["labels"]
        if "ref_logps" in self.loss.needs:
            given[REFERENCE] = self._reference.of_batch(model, batch)
        if "desirable" in self.loss.needs:
            given["desirable"] = torch.arange(labels.shape[0], device=labels.device) < labels.shape[0] // 2
        return given

    def record(self, averages: Averages, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """See `HeadTrainer.record` and `slime_fused.trainer.pair_metrics`."""
        counts = PairCounts.of(batch["labels"])
        means = unit_means(self.loss, outputs)
        if self._token_mean is not None and not self._is_training:
            # While training its weight has the micro-batch's share in it; here it is a mean over tokens.
            name = logged_term(self.loss, self._token_mean.term)
            tokens = counts.chosen if self._token_mean.side == "chosen" else counts.rejected
            averages.add("tokens of one side", tokens, {name: means.pop(name)})
        averages.add("units", counts.by_unit(self.loss)[0], means)
        averages.add("pairs", counts.pairs, pair_means(self.loss, outputs, counts))
        averages.add("tokens", counts.lengths.sum(), token_means(outputs, counts))
        averages.count({"num_pairs": counts.pairs, "num_completion_tokens": counts.lengths.sum()})

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """See `HeadTrainer.finish`: a loss with a mean over tokens inside is the sum of its terms."""
        if self._token_mean is not None and metrics:
            terms = [metrics[logged_term(self.loss, name)] for name in self.loss.term_names]
            metrics["loss"] = sum(terms) + metrics.get("aux_loss", 0.0)
        return super().finish(metrics)

    def predictions(
        self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """``chosen_logps``, ``rejected_logps``: (P,) mean log-probs per token; ``chosen_sum_logps`` and
        ``rejected_sum_logps``; ``ref_chosen_sum_logps`` and ``ref_rejected_sum_logps`` where the loss has a
        reference. Label ids: (P, 2) tokens of the chosen and the rejected response.
        """
        lengths = (batch["labels"][:, 1:] != -100).sum(1)
        told = {"logps": outputs["mean_logps"], "sum_logps": outputs["mean_logps"] * lengths}
        predictions: dict[str, Tensor] = {}
        for name, values in told.items():
            chosen, rejected = values.detach().chunk(2)
            predictions |= {f"chosen_{name}": chosen, f"rejected_{name}": rejected}
        if REFERENCE in outputs:
            chosen, rejected = outputs[REFERENCE].chunk(2)
            predictions |= {"ref_chosen_sum_logps": chosen, "ref_rejected_sum_logps": rejected}
        return predictions, torch.stack(lengths.chunk(2), dim=1)

    def card_text(self) -> CardText:
        """See `HeadTrainer.card_text`."""
        return loss_text(self.loss)
