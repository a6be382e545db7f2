"""SLIME, or any loss of pairs, in LLaMA-Factory's DPO stage.

From the command line, with entries of one's own in the file that LLaMA-Factory reads::

    python -m slime_fused.integrations.llama_factory train config.yaml
    torchrun --nproc-per-node 8 -m slime_fused.integrations.llama_factory train config.yaml

    stage: dpo
    slime_loss: slime        # or dpo, simpo, cpo, orpo, alphapo
    slime_lambda_w: 0.1      # any hyperparameter of that loss

or in Python, before `llamafactory.train.tuner.run_exp`: ``enable_loss(slime_fused.losses.Slime())``.

The loss runs in the model's head, so that the logits are never materialised, and a loss that needs no reference
model loads none. ``lora_dropout`` (0 by default) acts, where LLaMA-Factory's own DPO trainer switches all dropout
off. A mean over a batch's tokens (``slime_stabilizer_reduction`` or ``slime_nll_reduction`` "token", CPO's default)
needs one process and no gradient accumulation. Read and run with LLaMA-Factory 0.9.5 (TRL 0.24).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

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
from slime_fused.integrations.settings import PREFIX, read_settings

_PACKAGE = "llamafactory"
_IGNORED = {
    "pref_beta": 0.1,
    "simpo_gamma": 0.5,
    "pref_ftx": 0.0,
    "pref_bco_weight": 0.0,
    "dpo_label_smoothing": 0.0,
    "ld_alpha": None,
}
"""Settings that change LLaMA-Factory's own losses, at their defaults."""

_REPLACED = {"pref_loss": "slime_loss", "pref_beta": "slime_beta", "simpo_gamma": "slime_gamma"}
"""What stands for them in a configuration file."""


def enable_loss(
    loss: Any, backend: str = "auto", workspace: int | str = "auto", *, check_head: bool = True
) -> type:
    """From now on, `CustomDPOTrainer` computes ``loss``; returns the class that does.

    A second call replaces the first. Arguments as `BatchLoss.of` takes them; the first batch's log-probs are
    compared with the model's own logits (`slime_fused.model.check`) unless ``check_head`` is False.

    Raises:
        HookError: LLaMA-Factory or TRL below it has not the methods that this overrides.
        TypeError, ValueError: see `BatchLoss.of`. When the trainer is made: ``pref_loss`` is such that a reference
            model would be loaded for nothing or be missing, a setting would be ignored, the loss is none of a step
            in several batches (`BatchLoss.check_step`), or the head cannot be fused
            (`slime_fused.model.head.attach_head`).
    """
    batch_loss = BatchLoss.of(loss, backend, workspace)
    from llamafactory.train.dpo import trainer as module

    plain: Any = module.CustomDPOTrainer
    plain = getattr(plain, "_slime_plain", plain)
    require_method(plain, "get_batch_loss_metrics", ("model", "batch", "train_eval"), _PACKAGE)
    require_method(plain, "__init__", ("model", "ref_model", "finetuning_args"), _PACKAGE)
    for caller in ("compute_loss", "prediction_step"):
        require_caller(plain, caller, "get_batch_loss_metrics", _PACKAGE)

    class FusedDPOTrainer(plain):
        """`CustomDPOTrainer` with a loss of this package."""

        _slime_plain = plain

        def __init__(self, model: Any, ref_model: Any, finetuning_args: Any, *args: Any, **kwargs: Any) -> None:
            _check_arguments(finetuning_args, batch_loss)
            batch_loss.check_reference(model, ref_model)
            batch_loss.check_step(kwargs["args"])
            attach(model, ref_model)  # before the base class shards them
            self._head_is_checked = not check_head
            with lora_dropout_kept(model):
                super().__init__(model, ref_model, finetuning_args, *args, **kwargs)

        def get_batch_loss_metrics(
            self, model: Any, batch: Mapping[str, Tensor], train_eval: str = "train"
        ) -> tuple[Tensor, dict[str, float]]:
            """(loss, what to log of it)."""
            inputs = dict(batch)
            labels = Labels(inputs.pop("labels"))
            if not self._head_is_checked:
                self._head_is_checked = True
                batch_loss.check(model, inputs, labels)
            reference = batch_loss.reference(model, self.ref_model, inputs, labels)
            outputs = batch_loss.policy(model, inputs, labels, reference)
            prefix = "eval_" if train_eval == "eval" else ""
            metrics = {
                f"{prefix}{name}": value.item()
                for name, value in pair_metrics(outputs, labels, batch_loss.loss).items()
            }
            return total_loss(outputs), metrics

    FusedDPOTrainer.__name__ = plain.__name__
    module.CustomDPOTrainer = FusedDPOTrainer
    return FusedDPOTrainer


def train(config: Mapping[str, Any], callbacks: Sequence[Any] | None = None) -> None:
    """LLaMA-Factory's `run_exp` with the loss that entries of ``config`` describe, see `read_settings`.

    ``pref_loss``, which decides whether a reference model is loaded, is set here.

    Raises ValueError, TypeError naming the entry; see `enable_loss`.
    """
    batch_loss = read_settings(config)
    plain = {name: value for name, value in config.items() if not name.startswith(PREFIX)}
    if plain.get("stage") != "dpo":
        raise ValueError(f"stage: expected 'dpo', got {plain.get('stage')!r}")
    for name, own in _REPLACED.items():
        if name in plain:
            raise ValueError(f"{name}: {own} takes its place; expected none, got {plain[name]!r}")
    for name in ("use_ray", "use_mca"):
        if plain.get(name):
            raise ValueError(f"{name}: expected false: its trainer is another, or runs where this loss is unknown")
    enable_loss(batch_loss.loss, batch_loss.backend, batch_loss.workspace)
    from llamafactory.train.tuner import run_exp

    run_exp({**plain, "pref_loss": _pref_loss(batch_loss)}, None if callbacks is None else list(callbacks))


def main(arguments: Sequence[str] | None = None) -> None:
    """``train config.yaml [name=value ...]``, as `llamafactory-cli` takes them.

    Raises SystemExit with one line for arguments of another form.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) < 2 or given[0] != "train" or not given[1].endswith((".yaml", ".yml", ".json")):
        usage = "python -m slime_fused.integrations.llama_factory train config.yaml [name=value ...]"
        raise SystemExit(f"usage: {usage}; got {' '.join(given) or 'nothing'}")
    from omegaconf import OmegaConf

    # YAML's superset: a JSON file is read by the same call.
    config = OmegaConf.merge(OmegaConf.load(given[1]), OmegaConf.from_cli(given[2:]))
    train(OmegaConf.to_container(config))


def _pref_loss(batch_loss: BatchLoss) -> str:
    """One of LLaMA-Factory's own that treats the reference model as the loss wants it."""
    return "sigmoid" if batch_loss.needs_reference else "simpo"


def _check_arguments(finetuning_args: Any, batch_loss: BatchLoss) -> None:
    if bool(finetuning_args.use_ref_model) != batch_loss.needs_reference:
        needs = "needs a reference model" if batch_loss.needs_reference else "needs no reference model"
        raise ValueError(
            f"pref_loss: expected {_pref_loss(batch_loss)!r}, since {batch_loss.loss.name} {needs} and this "
            f"decides whether LLaMA-Factory loads one; got {finetuning_args.pref_loss!r}"
        )
    reason = f"{batch_loss.loss.name} would ignore it; leave it out and give the loss its own hyperparameters"
    refuse_settings(finetuning_args, _IGNORED, reason)


if __name__ == "__main__":
    main()
