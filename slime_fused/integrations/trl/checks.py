"""What a trainer must be for the loss to go through its hook; everything else is refused, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from slime_fused.losses import KTO, SFT, Formula, PolicyGradient, as_loss

HOOK = "_compute_loss"
"""The method of DPOTrainer that this package replaces, in TRL 0.29 and newer."""

_HOOK_ARGUMENTS = ["self", "model", "inputs", "return_outputs"]

_KEYS = ("input_ids", "attention_mask", "completion_mask")
"""What TRL's collators make since 0.29, rows [chosen..., rejected...]."""

_FOREIGN_KEYS = ("labels", "shift_labels", "position_ids", "cu_seqlens", "chosen_input_ids", "prompt_input_ids")
"""What only collators of another layout make."""

_OWN_OPTIONS: dict[str, Any] = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "use_weighting": False,
    "f_divergence_type": "reverse_kl",
    "ld_alpha": None,
}
"""Options of DPOConfig that choose TRL's loss, with their defaults. ``beta`` is not among them: scripts set it."""

_AVAILABLE = ("ref_logps", "ref_sum_logps", "ref_mean_logps", "ref_token_logps", "desirable")
"""What a loss may need and gets from a batch of TRL's."""


def as_trainable(loss: Any) -> Formula:
    """``loss`` as a value that a batch of preference pairs can train.

    Raises TypeError for what is no loss, ValueError for one that needs what such a batch has not.
    """
    value: Any = as_loss(loss)
    if isinstance(value, PolicyGradient):
        raise ValueError(
            f"loss: expected a loss of preferences, got {value!r}: it needs sampled responses (GRPOTrainer)"
        )
    if isinstance(value, SFT):
        raise ValueError(
            f"loss: expected a loss of preferences, got {value!r}: it would train on rejected responses too; "
            "take trl.SFTTrainer, or nll_weight of a loss of pairs"
        )
    if isinstance(value, KTO) and value.baseline == "given":
        raise ValueError(
            "loss: expected KTO with baseline='batch' or 'zero', got 'given': a DPOTrainer makes no mismatched "
            "responses to estimate the baseline from; take trl.KTOTrainer for that"
        )
    missing = [name for name in value.needs if name not in _AVAILABLE]
    if missing:
        raise ValueError(
            f"loss: expected one that needs nothing but {_AVAILABLE}, got {value.name}, which needs {missing}"
        )
    return value


def check_trainer(trainer: Any) -> None:
    """Refuse a trainer whose loss would not be ours, or not of the batches that ours expects."""
    _check_class(trainer)
    _check_state(trainer)
    _check_settings(trainer)
    _check_collator(trainer)


def check_batch(inputs: Mapping[str, Any]) -> None:
    """Refuse a batch of another form than TRL's collators make."""
    missing = [key for key in _KEYS if key not in inputs]
    foreign = [key for key in _FOREIGN_KEYS if key in inputs]
    if missing or foreign:
        raise ValueError(
            f"data_collator: expected batches with {', '.join(_KEYS)}, rows [chosen..., rejected...], as "
            f"DataCollatorForPreference makes them, got {sorted(inputs)}; leave data_collator=None"
        )
    rows = inputs["input_ids"].shape[0]
    if rows % 2:
        raise ValueError(f"data_collator: expected as many chosen rows as rejected ones, got {rows} rows")
    if "pixel_values" in inputs:
        raise ValueError(f"train_dataset: expected text alone, got a batch with images ({sorted(inputs)})")


def _check_class(trainer: Any) -> None:
    trl: Any = import_module("trl")
    if not isinstance(trainer, trl.DPOTrainer):
        raise TypeError(
            f"trainer: expected a trl.DPOTrainer that is constructed, got {_described(trainer)}; "
            "trl.DPOTrainer takes the same model and data"
        )
    found = f"TRL {trl.__version__}"
    hook = getattr(trl.DPOTrainer, HOOK, None)
    if hook is None:
        raise ValueError(
            f"trainer: expected a DPOTrainer that computes its loss in {HOOK}, as TRL 0.29 and newer do; {found} "
            "has no such method, and would train plain DPO: pip install 'trl>=0.29'"
        )
    arguments = list(inspect.signature(hook).parameters)
    caller = getattr(trl.DPOTrainer.compute_loss, "__code__", None)
    if arguments != _HOOK_ARGUMENTS or (caller is not None and HOOK not in caller.co_names):
        raise ValueError(
            f"trainer: expected DPOTrainer.compute_loss to call {HOOK}({', '.join(_HOOK_ARGUMENTS)}), got "
            f"{HOOK}({', '.join(arguments)}) in {found}, which is not known here; "
            "install a release from 0.29 to 1.16"
        )
    cls = type(trainer)
    if getattr(cls, HOOK) is not hook:
        owner = next(base.__name__ for base in cls.__mro__ if HOOK in vars(base))
        raise ValueError(
            f"trainer: expected the {HOOK} of trl.DPOTrainer, got {owner}'s own, which computes another loss; "
            "construct a trl.DPOTrainer, or remove that method"
        )


def _check_state(trainer: Any) -> None:
    if trainer.is_in_train or trainer.state.global_step > 0:
        raise ValueError(
            f"trainer: expected one that has not begun to train, got one at step {trainer.state.global_step}; "
            "enable the loss right after the trainer's construction"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"trainer: {trainer.args.n_gpu} GPUs in one process would split the batch between chosen and rejected "
            "rows; start one process per GPU (accelerate launch, torchrun) or show one (CUDA_VISIBLE_DEVICES=0)"
        )


def _check_settings(trainer: Any) -> None:
    for name, default in _OWN_OPTIONS.items():
        value = getattr(trainer.args, name, default)
        value = getattr(value, "value", value)  # an enumeration in some releases
        value = [value] if name == "loss_type" and isinstance(value, str) else value
        if value != default:
            raise ValueError(
                f"args.{name}: expected its default {default!r}, since the loss given here takes the place of "
                f"TRL's, got {value!r}. Leave it out, and set what it meant in the loss"
            )
    if getattr(trainer, "padding_free", False):
        raise ValueError("args.padding_free: expected False, got True; padding costs no work in the head here")
    if getattr(trainer.args.accelerator_config, "dispatch_batches", None):
        raise ValueError(
            "args.accelerator_config: expected dispatch_batches=False, got True: it would cut one process's batch "
            "by rows, and so separate the pairs"
        )
    if getattr(trainer, "_is_vision_dataset", False):
        raise ValueError(
            "train_dataset: expected text alone, got a dataset with images; train it with TRL's own loss"
        )


def _check_collator(trainer: Any) -> None:
    from datasets import Dataset

    dataset = trainer.train_dataset
    # Of a stream the first batch tells: reading ahead here might move it on.
    if not isinstance(dataset, Dataset) or not len(dataset):
        return
    batch = trainer.data_collator([dataset[i] for i in range(min(len(dataset), 2))])
    check_batch(batch)
    prompts = [
        ids[(attended == 1) & (completed == 0)].tolist()
        for ids, attended, completed in zip(*(batch[key] for key in _KEYS), strict=True)
    ]
    num_pairs = len(prompts) // 2
    for i, (chosen, rejected) in enumerate(zip(prompts[:num_pairs], prompts[num_pairs:], strict=True)):
        kept = min(len(chosen), len(rejected))  # truncation may have taken more of one from its begin
        if kept and chosen[-kept:] != rejected[-kept:]:
            raise ValueError(
                f"data_collator: expected rows [chosen..., rejected...], got rows {i} and {num_pairs + i} of "
                f"{len(prompts)} with different prompts, which are no pair; leave data_collator=None"
            )


def _described(trainer: Any) -> str:
    if isinstance(trainer, type):
        return f"the class {trainer.__name__}"
    return f"{type(trainer).__module__}.{type(trainer).__name__}"
