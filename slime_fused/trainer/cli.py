"""``slime-train``: train a model on preference pairs from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.trainer_utils import IntervalStrategy

from slime_fused.model.check import HeadMismatchError
from slime_fused.trainer.arguments import ScriptArguments, UsageError, parse_arguments
from slime_fused.trainer.callbacks import MetricsFile
from slime_fused.trainer.config import SlimeConfig
from slime_fused.trainer.loading import load_model, load_tokenizer
from slime_fused.trainer.merging import adapts_embeddings, merge_adapter
from slime_fused.trainer.plotting import plot_history
from slime_fused.trainer.reading import read_pairs
from slime_fused.trainer.trainer import SlimeTrainer

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "training.png"
MERGED_FOLDER = "merged"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``slime-train`` with ``argv``; returns the exit status: 0, or 2 for input that cannot be used."""
    try:
        script, config = parse_arguments(argv)
        trainer = build_trainer(script, config)
    except (UsageError, OSError, ValueError, TypeError) as error:
        return _complain(error)
    try:
        resume = config.resume_from_checkpoint
        trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    except HeadMismatchError as error:
        return _complain(error)
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        plot = plot_history(
            trainer.state.log_history,
            Path(str(config.output_dir)) / PLOT_FILE,
            margin_hard=config.margin_hard,
            margin_soft=config.margin_soft,
        )
        if script.merge_adapter:
            _save_merged(script, config, trainer)
        _summarise(trainer, plot)
    return 0


def build_trainer(script: ScriptArguments, config: SlimeConfig) -> SlimeTrainer:
    """Read the data, then the model (the slower of the two), and put them together."""
    dataset = read_pairs(script.dataset)
    eval_dataset = read_pairs(script.eval_dataset) if script.eval_dataset else None
    if eval_dataset is None and script.eval_share > 0:
        if round(len(dataset) * script.eval_share) in (0, len(dataset)):
            raise UsageError(f"eval_share: {script.eval_share} of {len(dataset)} pairs leaves one side empty")
        parts = dataset.train_test_split(test_size=script.eval_share, seed=config.seed)
        dataset, eval_dataset = parts["train"], parts["test"]
    if eval_dataset is None and config.eval_strategy != "no":
        raise UsageError(
            f"eval_strategy={IntervalStrategy(config.eval_strategy).value} needs --eval_dataset or --eval_share"
        )
    tokenizer = load_tokenizer(script.tokenizer or script.model)
    return SlimeTrainer(
        load_model(script.model, dtype=script.dtype, **config.model_options()),
        config,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=[MetricsFile(Path(str(config.output_dir)) / METRICS_FILE)],
        peft_config=_adapter(script),
    )


def _adapter(script: ScriptArguments) -> Any:
    if not script.use_peft:
        return None
    from peft import LoraConfig

    targets = script.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        modules_to_save=script.lora_modules_to_save,
    )


def _save_merged(script: ScriptArguments, config: SlimeConfig, trainer: SlimeTrainer) -> None:
    """The model of before training is loaded again: the one that was trained may be sharded over processes."""
    untie = adapts_embeddings(trainer.accelerator.unwrap_model(trainer.model))
    base = load_model(script.model, dtype=script.dtype, **config.model_options())
    folder = Path(str(config.output_dir))
    merge_adapter(base, folder, untie).save_pretrained(folder / MERGED_FOLDER)
    tokenizer: Any = trainer.processing_class
    tokenizer.save_pretrained(folder / MERGED_FOLDER)


def _complain(error: Exception) -> int:
    print(f"slime-train: error: {error}", file=sys.stderr)
    return 2


def _summarise(trainer: SlimeTrainer, plot: Path) -> None:
    reports = [entry for entry in trainer.state.log_history if "loss" in entry]
    table = Table(title=f"{trainer.state.global_step} steps in {trainer.args.output_dir}")
    for column in ("", "first report", "last report"):
        table.add_column(column, justify="left" if not column else "right")
    names = ("loss", "logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies")
    for name in names if reports else ():
        table.add_row(name, f"{reports[0][name]:.4f}", f"{reports[-1][name]:.4f}")
    console = Console()
    console.print(table)
    console.print(f"model, {METRICS_FILE} and {plot.name} are in {trainer.args.output_dir}")


if __name__ == "__main__":
    raise SystemExit(main())
