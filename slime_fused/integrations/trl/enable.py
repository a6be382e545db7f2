"""The two public functions: check the trainer, then put a loss of this package in the place of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from slime_fused.engine.units import Pairs, UnitTerms
from slime_fused.integrations.trl.checks import as_trainable, check_trainer
from slime_fused.integrations.trl.hook import LossHook
from slime_fused.integrations.trl.reference import ReferenceLogProbs
from slime_fused.losses import Formula, Slime
from slime_fused.model.head import attach_head
from slime_fused.model.options import check_options

if TYPE_CHECKING:
    from trl.trainer.dpo_trainer import DPOTrainer


def enable_slime(
    trainer: DPOTrainer,
    config: Slime | None = None,
    *,
    backend: str = "auto",
    workspace: int | str = "auto",
    check_head: bool = True,
) -> None:
    """Let an existing `trl.DPOTrainer` train with the SLIME loss (arXiv 2602.02383), without a reference model.

    `enable_loss` with `slime_fused.SlimeLossConfig`: ``config``, or the paper's where it is None.
    """
    enable_loss(trainer, Slime.of(config), backend=backend, workspace=workspace, check_head=check_head)


def enable_loss(
    trainer: DPOTrainer,
    loss: Formula | Callable[[Pairs], Tensor | UnitTerms],
    *,
    backend: str = "auto",
    workspace: int | str = "auto",
    check_head: bool = True,
    cache_reference: bool = False,
) -> None:
    """Let an existing `trl.DPOTrainer` train with ``loss``, computed in the model's head without its logits.

    Call it between the trainer's construction and ``trainer.train()``; of two calls the last one counts. Data,
    optimizer, evaluation, saving and resuming stay TRL's. Where the loss needs no reference model, the trainer's is
    dropped: ``trainer.ref_model`` becomes None, and so does the copy "ref" that TRL makes of an adapter. An
    optimizer step has the same gradient however it is cut into micro-batches and spread over processes.

    Args:
        trainer: of TRL 0.29 or newer; it looks at the hooks that the loss goes through, not at the version alone.
        loss: a value of `slime_fused.losses` (not `PolicyGradient`, not `SFT`) or a function of pairs, as
            `slime_fused.preference_loss` takes it. DPO and KTO get the reference model's log-probs from the
            dataset's columns where the trainer was built with ``precompute_ref_log_probs=True``, otherwise from
            its reference model, or with the adapter switched off.
        backend: as in `slime_fused.slime_loss`.
        workspace: as there.
        check_head: compare a few log-probs of the first batch with the model's own logits.
        cache_reference: compute the reference's log-probs of all examples now, into columns of the datasets, and
            drop the reference model.

    Raises:
        TypeError: for what is no `trl.DPOTrainer`, no loss, or a model without an output head.
        ValueError: for a trainer whose loss would not go through the hook (another version, an override), whose
            settings this loss cannot honour, whose batches have another form, or that has begun to train; for a
            head that cannot be fused; for a loss whose reference is missing. `HeadMismatchError` before the first
            step if the model's logits are not what its head gives.
        RuntimeError: at the end of the first step, if the trainer did not call the hook after all.
    """
    value = as_trainable(loss)
    check_options(backend, workspace)
    check_trainer(trainer)
    hooked: Any = trainer
    earlier = LossHook.of(hooked)
    reference = ReferenceLogProbs.find(hooked, value, backend, workspace, earlier.reference if earlier else None)
    attach_head(hooked.accelerator.unwrap_model(hooked.model))
    if cache_reference:
        reference.fill_datasets()
    elif not reference.is_needed:
        reference.drop()
    if earlier is not None:
        earlier.remove()
    LossHook(hooked, value, reference, backend, workspace, check_head=check_head).install()
