"""The model card of a run: what was trained, with which loss and which settings, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import slime_fused
from slime_fused.trainer.config import SlimeConfig

PAPER = "https://arxiv.org/abs/2602.02383"

_LOSS = ("lambda_w", "lambda_l", "lambda_d", "delta", "margin_hard", "margin_soft", "kappa", "power")
_LOSS_CHOICES = ("stabilizer_reduction", "loss_impl")
_TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "max_length",
    "truncation",
    "bf16",
    "seed",
)
_RESULTS = ("loss", "logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies")


def model_card(
    config: SlimeConfig,
    history: Sequence[Mapping[str, Any]],
    *,
    name: str,
    base_model: str | None,
    num_processes: int,
    num_steps: int,
    is_adapter: bool,
    tags: Sequence[str],
    language: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """The card of a model trained from ``base_model`` (a hub name or a path) with ``config``.

    ``history`` is the trainer's: its last report of training and its last evaluation go into the card.
    """
    is_local = base_model is None or Path(base_model).exists() or base_model.count("/") > 1
    data = ModelCardData(
        # The hub looks a base model up by its name; a path means nothing there.
        base_model=None if is_local else base_model,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=list(tags),
        model_name=name,
        language=language,
        license=license,
    )
    origin = "an unnamed model" if base_model is None else f"`{Path(base_model).name if is_local else base_model}`"
    lines = [
        f"# {name}",
        "",
        f"{'An adapter for' if is_adapter else 'Trained from'} {origin}, on preference pairs with the SLIME loss "
        f"([arXiv 2602.02383]({PAPER})), which needs no reference model: a likelihood anchor on chosen responses, "
        "a dual-margin term on the pair and a token stabilizer on rejected responses.",
        "",
        "## Loss",
        "",
        *_table(config, _LOSS + _LOSS_CHOICES),
        "",
        "## Training",
        "",
        *_table(config, _TRAINING),
        f"| processes | {num_processes} |",
        f"| optimizer steps | {num_steps} |",
    ]
    results = _results(history)
    if results:
        lines += ["", "## Results", "", "`logps` are means over a response's tokens.", "", *results]
    lines += ["", f"Trained with slime_fused {slime_fused.__version__}.", ""]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def _table(config: SlimeConfig, names: Sequence[str]) -> list[str]:
    values = {name: getattr(config, name) for name in names}
    return ["| setting | value |", "|---|---|"] + [
        f"| {name} | {getattr(value, 'value', value)} |" for name, value in values.items()
    ]


def _results(history: Sequence[Mapping[str, Any]]) -> list[str]:
    trained: Mapping[str, Any] = next((row for row in reversed(history) if "loss" in row), {})
    evaluated: Mapping[str, Any] = next((row for row in reversed(history) if "eval_loss" in row), {})
    rows = []
    for name in _RESULTS:
        cells = [
            f"{row[key]:.4f}" if key in row else "" for row, key in ((trained, name), (evaluated, f"eval_{name}"))
        ]
        if any(cells):
            rows.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return ["| | last report of training | last evaluation |", "|---|---:|---:|", *rows] if rows else []
