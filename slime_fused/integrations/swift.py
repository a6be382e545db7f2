"""SLIME, or any loss of pairs, in ms-swift's DPO training.

ms-swift imports files that its ``external_plugins`` name; one line in such a file is the switch::

    # slime_plugin.py
    from slime_fused.integrations.swift import enable_loss
    from slime_fused.losses import Slime

    enable_loss(Slime())

    swift rlhf --rlhf_type dpo --external_plugins slime_plugin.py ...

The loss runs in the model's head, so that the logits are never materialised, and a loss that needs no reference
model loads none. ``lora_dropout`` (0.05 by default) acts, where ms-swift's own DPO trainer switches all dropout
off. A mean over a batch's tokens (``stabilizer_reduction`` or ``nll_reduction`` "token", CPO's default) needs one
process and no gradient accumulation. Padded batches and padding-free ones (packing included). Read and run with
ms-swift 4.6.0 (TRL 0.29.1), padding-free without flash-attention's kernels, for which ms-swift asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slime_fused.integrations.batches import (
    BatchLoss,
    Labels,
    attach,
    lora_dropout_kept,
    pair_metrics,
    total_loss,
)
from slime_fused.integrations.hooks import refuse_settings, require_caller, require_method

_PACKAGE = "ms-swift"
_IGNORED = {
    "beta": 0.1,
    "loss_type": "sigmoid",
    "loss_weights": None,
    "label_smoothing": 0,
    "f_divergence_type": "reverse_kl",
    "reference_free": False,
    "rpo_alpha": None,
    "ld_alpha": None,
}
"""Arguments that change ms-swift's own losses, at their defaults."""


def enable_loss(
    loss: Any, backend: str = "auto", workspace: int | str = "auto", *, check_head: bool = True
) -> type:
    """From now on, ``rlhf_type: dpo`` trains ``loss``; returns the trainer class that does.

    Arguments, and what they raise, as for `slime_fused.integrations.llama_factory.enable_loss`; when training is
    set up, ValueError also for another ``rlhf_type``, sequence parallelism and a router's loss.
    """
    batch_loss = BatchLoss.of(loss, backend, workspace)
    import swift.rlhf_trainers as package
    from swift.pipelines.train.rlhf import SwiftRLHF
    from swift.rlhf_trainers import dpo_trainer as module

    plain: Any = getattr(module.DPOTrainer, "_slime_plain", module.DPOTrainer)
    parameters = ("model", "batch", "train_eval")  # 4.6 adds pair_loss_scale
    require_method(plain, "get_batch_loss_metrics", parameters, _PACKAGE)
    require_method(plain, "get_cu_seqlens", ("position_ids", "logits_to_keep"), _PACKAGE)
    require_method(plain, "__init__", ("model", "ref_model"), _PACKAGE)
    for caller in ("compute_loss", "prediction_step"):
        require_caller(plain, caller, "get_batch_loss_metrics", _PACKAGE)
    require_method(SwiftRLHF, "_prepare_model_tokenizer", (), _PACKAGE)

    class FusedDPOTrainer(plain):
        """`DPOTrainer` with a loss of this package."""

        _slime_plain = plain

        def __init__(self, model: Any, ref_model: Any = None, *args: Any, **kwargs: Any) -> None:
            name = batch_loss.loss.name
            reason = f"{name} would ignore it; leave it out and give the loss its own hyperparameters"
            refuse_settings(kwargs["args"], _IGNORED, reason)
            batch_loss.check_step(kwargs["args"])
            batch_loss.check_reference(model, ref_model)
            attach(model, ref_model)  # before the base class shards them
            self._head_is_checked = not check_head
            with lora_dropout_kept(model):
                super().__init__(model, ref_model, *args, **kwargs)
            _check_trainer(self)

        def get_batch_loss_metrics(
            self,
            model: Any,
            batch: Mapping[str, Any],
            train_eval: str = "train",
            pair_loss_scale: Tensor | None = None,
        ) -> tuple[Tensor, dict[str, float]]:
            """(loss, what to log of it)."""
            inputs, labels = _split(self, batch)
            if not self._head_is_checked:
                self._head_is_checked = True
                batch_loss.check(model, inputs, labels)
            reference = batch_loss.reference(self.model, self.ref_model, inputs, labels, self.ref_adapter_name)
            outputs = batch_loss.policy(model, inputs, labels, reference)
            loss = total_loss(outputs)
            if pair_loss_scale is not None:
                # Where batches hold different numbers of pairs, the mean over the window's pairs.
                loss = loss * (outputs["mean_logps"].shape[0] // 2 * pair_loss_scale)
            prefix = "eval_" if train_eval == "eval" else ""
            metrics = pair_metrics(outputs, labels, batch_loss.loss)
            values = torch.stack([value.detach().float() for value in metrics.values()])
            means = self.accelerator.gather(values).view(-1, len(metrics)).mean(0).tolist()
            return loss, {f"{prefix}{name}": mean for name, mean in zip(metrics, means, strict=True)}

    plain_prepare = getattr(SwiftRLHF._prepare_model_tokenizer, "_slime_plain", SwiftRLHF._prepare_model_tokenizer)

    def prepare(self: Any) -> None:
        if self.args.rlhf_type != "dpo":
            raise ValueError(
                f"rlhf_type: expected 'dpo', whose trainer {batch_loss.loss.name} takes over, got "
                f"{self.args.rlhf_type!r}, which would train its own loss"
            )
        if not batch_loss.needs_reference:
            self.args.ref_model = None
        plain_prepare(self)

    prepare._slime_plain = plain_prepare  # type: ignore[attr-defined]
    SwiftRLHF._prepare_model_tokenizer = prepare
    FusedDPOTrainer.__name__ = plain.__name__
    # The pipeline asks the package for the class, which otherwise loads it from the module.
    package.DPOTrainer = module.DPOTrainer = FusedDPOTrainer
    return FusedDPOTrainer


def _check_trainer(trainer: Any) -> None:
    if trainer.template.sequence_parallel_size > 1:
        size = trainer.template.sequence_parallel_size
        raise ValueError(f"sequence_parallel_size: expected 1, got {size}: the loss would see parts of responses")
    if trainer.is_encoder_decoder:
        raise ValueError("model: expected a decoder, got an encoder-decoder model")
    if trainer.aux_loss_enabled:
        raise ValueError(
            f"router_aux_loss_coef: expected 0, got {trainer.aux_loss_coef}: set output_router_logits in its "
            "config instead, whose own coefficient is then used"
        )


def _split(trainer: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Labels]:
    """(arguments of the model's forward, labels)."""
    inputs = {**batch, "use_cache": False}
    values = inputs.pop("labels")
    positions = inputs.pop("text_position_ids", None)
    if not trainer.template.padding_free:
        return inputs, Labels(values)
    positions = inputs.get("position_ids") if positions is None else positions
    return inputs, Labels(values, trainer.get_cu_seqlens(positions, None))
