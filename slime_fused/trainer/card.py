"""The model card of a run: what was trained, with which loss and which settings, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import slime_fused
from slime_fused.losses import Formula
from slime_fused.trainer.config import HeadConfig

_PAPERS = {
    "Slime": "2602.02383",
    "DPO": "2305.18290",
    "SimPO": "2405.14734",
    "CPO": "2401.08417",
    "ORPO": "2403.07691",
    "AlphaPO": "2501.03884",
    "KTO": "2402.01306",
}
"""arXiv numbers, by the class of the loss."""

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


@dataclass(frozen=True)
class CardText:
    """What a card says of the method, besides what all trainers say."""

    sentence: str
    """Follows "Trained from X, "."""
    settings: Mapping[str, Any]
    """Of the loss."""
    results_note: str = ""
    """What one must know to read the results."""


def loss_text(loss: Formula) -> CardText:
    """Of a loss of preferences."""
    name = "SLIME" if loss.name == "Slime" else loss.name
    number = _PAPERS.get(type(loss).__name__)
    source = f" ([arXiv {number}](https://arxiv.org/abs/{number}))" if number else ""
    sentence = f"on preference pairs with the {name} loss{source}"
    if name == "SLIME":
        sentence += (
            ", which needs no reference model: a likelihood anchor on chosen responses, a dual-margin term on the "
            "pair and a token stabilizer on rejected responses"
        )
    settings = {field.name: getattr(loss, field.name) for field in fields(loss)}
    return CardText(sentence, settings, "`logps` are means over a response's tokens.")


def model_card(
    config: HeadConfig,
    history: Sequence[Mapping[str, Any]],
    text: CardText,
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
        f"{'An adapter for' if is_adapter else 'Trained from'} {origin}, {text.sentence}.",
        "",
        "## Loss",
        "",
        *_table({**text.settings, "loss_impl": config.loss_impl}),
        "",
        "## Training",
        "",
        *_table({name: getattr(config, name) for name in _TRAINING}),
        f"| processes | {num_processes} |",
        f"| optimizer steps | {num_steps} |",
    ]
    results = _results(history)
    if results:
        lines += ["", "## Results", "", text.results_note, "", *results]
    lines += ["", f"Trained with slime_fused {slime_fused.__version__}.", ""]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def _table(values: Mapping[str, Any]) -> list[str]:
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
