"""One run of ``slime-train``, from its settings to what it leaves behind."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from slime_fused.losses import Slime
from slime_fused.model.check import HeadMismatchError
from slime_fused.trainer.adapter import make_adapter
from slime_fused.trainer.arguments import Settings, parse_arguments
from slime_fused.trainer.base import HeadTrainer
from slime_fused.trainer.callbacks import MetricsFile
from slime_fused.trainer.checkpoints import RunRefusedError, checkpoints_in
from slime_fused.trainer.config import SlimeConfig
from slime_fused.trainer.formats import pair_columns
from slime_fused.trainer.loading import load_model, load_tokenizer
from slime_fused.trainer.merging import adapts_embeddings, merge_adapter
from slime_fused.trainer.options import UsageError
from slime_fused.trainer.plotting import plot_history
from slime_fused.trainer.preference import PreferenceTrainer
from slime_fused.trainer.preflight import check_settings, check_workspace
from slime_fused.trainer.reading import load_rows, take_slice
from slime_fused.trainer.sft import SftTrainer
from slime_fused.trainer.sft_formats import example_columns
from slime_fused.trainer.trainer import SlimeTrainer

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "training.png"
MERGED_FOLDER = "merged"


def run(argv: Sequence[str]) -> int:
    """Run ``slime-train`` with ``argv``; returns the exit status: 0, or 2 for input that cannot be used."""
    try:
        settings = parse_arguments(argv)
        check_settings(settings)
        trainer = build_trainer(settings)
    except (UsageError, OSError, ValueError, TypeError, LookupError, ImportError, RuntimeError) as error:
        return _complain(error)
    config, script = settings.config, settings.script
    if script.overwrite_checkpoints and trainer.is_world_process_zero():
        for path in checkpoints_in(Path(str(config.output_dir))):
            shutil.rmtree(path)
    try:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    except (HeadMismatchError, RunRefusedError) as error:
        return _complain(error)
    except KeyError as error:
        # Which metrics there are is known with the first evaluation.
        if "metric_for_best_model" not in str(error):
            raise
        return _complain(UsageError(f"metric_for_best_model: {error.args[0]}"))
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        if script.merge_adapter:
            _save_merged(settings, trainer)
        _summarise(trainer, _plot(settings, trainer))
    return 0


def build_trainer(settings: Settings) -> HeadTrainer:
    """Read the data, then the model (the slower of the two), and put them together."""
    script, config = settings.script, settings.config
    dataset, eval_dataset = read_datasets(settings)
    tokenizer = load_tokenizer(script.tokenizer or script.model, "tokenizer" if script.tokenizer else "model")
    model = load_model(script.model, dtype=script.dtype, **config.model_options())
    check_workspace(config, model)
    given: dict[str, Any] = {
        "train_dataset": dataset,
        "eval_dataset": eval_dataset,
        "processing_class": tokenizer,
        "callbacks": [MetricsFile(Path(str(config.output_dir)) / METRICS_FILE)],
        "peft_config": make_adapter(script, model),
    }
    if script.stage == "sft":
        return SftTrainer(model, config, **given)
    if isinstance(config, SlimeConfig):
        return SlimeTrainer(model, config, **given)
    return PreferenceTrainer(model, config, settings.loss, **given)  # type: ignore[arg-type]


def read_datasets(settings: Settings) -> tuple[Dataset, Dataset | None]:
    """The rows to train and to evaluate on."""
    script, config = settings.script, settings.config
    columns = example_columns if script.stage == "sft" else pair_columns
    dataset = load_rows(script.dataset, columns, config=script.dataset_config, split=script.dataset_split)
    if script.dataset_slice is not None:
        dataset = take_slice(dataset, script.dataset_slice, script.slice_seed)
    eval_dataset = None
    if script.eval_dataset is not None:
        eval_dataset = load_rows(
            script.eval_dataset,
            columns,
            config=script.eval_dataset_config,
            split=script.eval_dataset_split,
            preferred="test",
            option="eval_dataset",
        )
    elif script.eval_share > 0:
        if round(len(dataset) * script.eval_share) in (0, len(dataset)):
            raise UsageError(f"eval_share: {script.eval_share} of {len(dataset)} rows leaves one side empty")
        parts = dataset.train_test_split(test_size=script.eval_share, seed=config.seed)
        dataset, eval_dataset = parts["train"], parts["test"]
    return dataset, eval_dataset


def _save_merged(settings: Settings, trainer: HeadTrainer) -> None:
    """The model of before training is loaded again: the one that was trained may be sharded over processes."""
    script, config = settings.script, settings.config
    untie = adapts_embeddings(trainer.accelerator.unwrap_model(trainer.model))
    base = load_model(script.model, dtype=script.dtype, **config.model_options())
    folder = Path(str(config.output_dir))
    merge_adapter(base, folder, untie).save_pretrained(folder / MERGED_FOLDER)
    tokenizer: Any = trainer.processing_class
    tokenizer.save_pretrained(folder / MERGED_FOLDER)


def _plot(settings: Settings, trainer: HeadTrainer) -> Path | None:
    """The picture of the run; None, and a word about it, where it cannot be drawn."""
    loss = settings.loss
    margins = {"hard margin": loss.margin_hard, "soft margin": loss.margin_soft} if isinstance(loss, Slime) else {}
    title = "Supervised fine-tuning" if loss is None else f"{settings.script.loss.upper()} training"
    path = Path(str(settings.config.output_dir)) / PLOT_FILE
    try:
        return plot_history(trainer.state.log_history, path, margins=margins, title=title)
    except ImportError as error:
        print(f"slime-train: no {PLOT_FILE}: {error}; pip install matplotlib", file=sys.stderr)
        return None


def _complain(error: Exception) -> int:
    """One line, however many the library has that raised it; all of it with SLIME_FUSED_TRACEBACK=1."""
    if os.environ.get("SLIME_FUSED_TRACEBACK", "0") != "0":
        traceback.print_exception(error)
    print(f"slime-train: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    return 2


_SUMMARY = (
    "loss",
    "entropy",
    "mean_token_accuracy",
    "logps/chosen",
    "logps/rejected",
    "rewards/margins",
    "rewards/accuracies",
)


def _summarise(trainer: HeadTrainer, plot: Path | None) -> None:
    reports = [entry for entry in trainer.state.log_history if "loss" in entry]
    table = Table(title=f"{trainer.state.global_step} steps in {trainer.args.output_dir}")
    for column in ("", "first report", "last report"):
        table.add_column(column, justify="left" if not column else "right")
    for name in _SUMMARY if reports else ():
        ends = [reports[0].get(name), reports[-1].get(name)]  # a run that goes on from another may log other names
        if ends != [None, None]:
            table.add_row(name, *("" if value is None else f"{value:.4f}" for value in ends))
    console = Console()
    console.print(table)
    files = ", ".join(["model", METRICS_FILE, *([plot.name] if plot else [])])
    console.print(f"{files} are in {trainer.args.output_dir}")
