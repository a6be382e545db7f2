"""The command line of ``slime-train``: every setting as an option, or in a YAML file of the same names."""

# Annotations stay unquoted here: the parser reads the types of the fields.
import argparse
import dataclasses
import difflib
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.trainer_utils import IntervalStrategy

from slime_fused.losses import Formula
from slime_fused.trainer.config import HeadConfig, PreferenceConfig, SlimeConfig
from slime_fused.trainer.loss_choice import DEFAULTS, LOSSES, UNSERVED, hyperparameters, losses_with
from slime_fused.trainer.options import Option, UsageError, as_arguments, read_options
from slime_fused.trainer.sft_config import SftConfig

STAGES = ("preference", "sft")

_FAMILIAR = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "accumulation_steps": "gradient_accumulation_steps",
    "max_seq_length": "max_length",
    "dataset_name": "dataset",
    "dataset_train_split": "dataset_split",
    "dataset_test_split": "eval_dataset_split",
    "attn_implementation": "model_init_kwargs",
    "torch_dtype": "dtype",
}
"""What other tools, or habit, call a setting."""

_NOT_EMPTY = ("model", "dataset", "output_dir", "tokenizer", "eval_dataset")
_STRATEGIES = ("save_strategy", "eval_strategy", "logging_strategy")


@dataclass
class ScriptArguments:
    """What to train, on what, and with which adapter."""

    model: str = field(
        metadata={"help": "Model folder, .gguf file or hub name.", "aliases": ["--model_name_or_path"]}
    )
    dataset: str = field(
        metadata={"help": "Rows: .jsonl, .json, .csv (.gz) or .parquet file, a folder, or a hub name."}
    )
    stage: Literal["preference", "sft"] = field(
        default="preference", metadata={"help": "'preference': pairs and --loss. 'sft': cross-entropy before that."}
    )
    loss: Literal["slime", "dpo", "simpo", "orpo", "cpo", "alphapo", "kto"] = field(
        default="slime", metadata={"help": "Loss of the pairs; its hyperparameters are settings too."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not with the model."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a --dataset that has several."}
    )
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split of a --dataset that has several; unset: train."}
    )
    dataset_slice: str | None = field(
        default=None,
        metadata={"help": "START:STOP of the rows, shuffled by --slice_seed, in rows or percent, such as 0:66%%."},
    )
    slice_seed: int = field(
        default=0, metadata={"help": "Order for --dataset_slice; the same for slices that must not overlap."}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Rows to evaluate on, as for --dataset."})
    eval_dataset_config: str | None = field(default=None, metadata={"help": "As --dataset_config."})
    eval_dataset_split: str | None = field(default=None, metadata={"help": "As --dataset_split; unset: test."})
    eval_share: float = field(
        default=0.0, metadata={"help": "Without --eval_dataset: share of the rows held out for evaluation."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Type the weights are loaded and trained in."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of the whole model."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, times its rank."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout of the adapter (with --disable_dropout false)."}
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Layers that get an adapter."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Layers trained and saved whole, such as lm_head."}
    )
    merge_adapter: bool = field(
        default=False,
        metadata={"help": "With --use_peft: also save the model with the adapter merged in, in OUTPUT_DIR/merged."},
    )
    overwrite_checkpoints: bool = field(
        default=False,
        metadata={"help": "Delete the checkpoints of an earlier run in OUTPUT_DIR (also --overwrite_output_dir)."},
    )


@dataclass(frozen=True)
class Settings:
    """Everything that one run was told."""

    script: ScriptArguments
    config: HeadConfig
    loss: Formula | None
    """None for supervised fine-tuning."""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_arguments(argv: Sequence[str] | None = None) -> Settings:
    """Settings from ``argv`` (the process's own if None) and the YAML files that ``--config`` names.

    Raises UsageError for unknown or missing names, values of the wrong type, settings that have no effect without
    another, and an unreadable file.
    """
    options = [_renamed(option) for option in read_options(sys.argv[1:] if argv is None else argv)]
    stage, loss = _last(options, "stage", STAGES), _last(options, "loss", tuple(LOSSES))
    parser = make_parser(stage, loss)
    known = {option for action in parser._actions for option in action.option_strings}
    for option in options:
        if f"--{option.name}" not in known:
            raise UsageError(_unknown(option, known, stage, loss))
    _check_combinations(options, stage)
    options = _with_evaluation(options)
    try:
        parsed = parser.parse_args_into_dataclasses(
            as_arguments(options), look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(str(error)) from error
    *values, spare = parsed
    if spare:
        raise UsageError(f"values that belong to no setting: {spare}; a setting that takes one value got several")
    script, config, *losses = values
    _check_values(script, config)
    if isinstance(config, SlimeConfig):
        losses = [config.loss_config()]
    return Settings(script, config, losses[0] if losses else None)


def kinds_of(stage: str, loss: str) -> tuple[Any, ...]:
    """The dataclasses whose fields are the settings of such a run."""
    if stage == "sft":
        return (ScriptArguments, SftConfig)
    return (ScriptArguments, SlimeConfig) if loss == "slime" else (ScriptArguments, PreferenceConfig, LOSSES[loss])


def make_parser(stage: str, loss: str) -> HfArgumentParser:
    """The parser of such a run's settings."""
    parser = _Parser(kinds_of(stage, loss), prog="slime-train", add_help=False, allow_abbrev=False)
    texts = hyperparameters(loss) if stage == "preference" else {}
    if stage == "preference":
        parser.set_defaults(**DEFAULTS.get(loss, {}))
    optional = _optional_numbers(kinds_of(stage, loss))
    for action in parser._actions:
        if action.dest in optional:
            action.type = _or_none(optional[action.dest])
        if stage == "preference" and action.dest in UNSERVED:
            action.help = argparse.SUPPRESS
        if not action.help and action.dest in texts:
            action.help = texts[action.dest]
        if action.dest == "report_to":
            action.nargs = "+"
        if action.type is string_to_bool and action.nargs is None:
            # Its default is None, for which that parser would want a value.
            action.nargs, action.const = "?", True
    return parser


def _optional_numbers(kinds: Sequence[Any]) -> dict[str, Any]:
    """Type by name, of the settings that are a number or None."""
    hints = {name: typing.get_args(hint) for kind in kinds for name, hint in typing.get_type_hints(kind).items()}
    numbers = {frozenset((int, type(None))): int, frozenset((float, type(None))): float}
    return {name: numbers[frozenset(args)] for name, args in hints.items() if frozenset(args) in numbers}


def _or_none(number: Any) -> Any:
    def parse(text: str) -> Any:
        return None if text.lower() == "none" else number(text)

    parse.__name__ = number.__name__  # for the parser's own errors
    return parse


def _renamed(option: Option) -> Option:
    """``option`` by the name and values that the parser knows."""
    if option.name == "overwrite_output_dir":
        # Releases of `transformers` before 5 have a setting of that name, which their trainer does not read.
        return dataclasses.replace(option, name="overwrite_checkpoints")
    if option.name in _STRATEGIES and option.values == ("false",):
        return dataclasses.replace(option, values=("no",))  # which YAML reads as false
    return option


def _last(options: Sequence[Option], name: str, choices: Sequence[str]) -> str:
    """The choice that counts, of a setting that says what the others are."""
    values = [option.values for option in options if option.name == name]
    if not values:
        return choices[0]
    value = values[-1]
    if name == "loss" and value in (("fused",), ("naive",)):
        raise UsageError(f"loss: expected one of {tuple(choices)}; --loss_impl {value[0]} is how it is computed")
    if len(value) != 1 or value[0] not in choices:
        raise UsageError(f"{name}: expected one of {tuple(choices)}, got {' '.join(value) or 'nothing'}")
    return value[0]


def _unknown(option: Option, known: set[str], stage: str, loss: str) -> str:
    prefix = "config: unknown setting" if option.file else "unknown setting"
    owners = losses_with(option.name)
    if stage == "sft" and owners:
        return f"{option}: a hyperparameter of --loss {', '.join(owners)}, which --stage sft does not take"
    if owners:
        return f"{option}: a hyperparameter of --loss {', '.join(owners)}; this run's is {loss}"
    if option.name in {f.name for f in dataclasses.fields(SftConfig)}:
        return f"{option}: a setting of --stage sft; this run's is {stage}"
    close = difflib.get_close_matches(f"--{option.name}", sorted(known), n=1)
    guess = f"--{_FAMILIAR[option.name]}" if option.name in _FAMILIAR else close[0] if close else None
    return f"{prefix} {option}; " + (f"did you mean {guess}?" if guess else "--help_all lists every setting")


def _check_combinations(options: Sequence[Option], stage: str) -> None:
    """Refuse what was given and would have no effect."""
    given = {option.name: option for option in options}
    for name in _NOT_EMPTY:
        if name in given and given[name].values in ((), ("",)):
            raise UsageError(f"{given[name]}: expected a name or a path, got an empty text")
    if not _is_on(given, "use_peft"):
        for name, option in given.items():
            if name.startswith("lora_"):
                raise UsageError(f"{option}: expected --use_peft with it; without an adapter it has no effect")
        if _is_on(given, "merge_adapter"):
            raise UsageError(
                "merge_adapter: expected --use_peft with it; without an adapter there is nothing to merge"
            )
    if stage == "sft" and "loss" in given:
        raise UsageError(f"{given['loss']}: a setting of --stage preference; --stage sft has one loss")
    for needed, names in (
        ("eval_dataset", ("eval_dataset_split", "eval_dataset_config")),
        ("dataset_slice", ("slice_seed",)),
    ):
        for name in names:
            if name in given and needed not in given:
                raise UsageError(f"{given[name]}: expected --{needed} with it; without one it has no effect")
    if "eval_share" in given and "eval_dataset" in given:
        raise UsageError(f"{given['eval_share']}: has no effect beside {given['eval_dataset']}; give one of them")


def _is_on(given: Mapping[str, Option], name: str) -> bool:
    """Whether a flag was set, as far as that can be said before it is parsed."""
    values = given[name].values if name in given else ("false",)
    return not values or values[0].lower() in ("yes", "true", "t", "y", "1")


def _with_evaluation(options: list[Option]) -> list[Option]:
    """Rows to evaluate on are evaluated on: after each epoch, or every ``eval_steps`` if these are given."""
    given = {option.name for option in options}
    if not given & {"eval_dataset", "eval_share"} or "eval_strategy" in given:
        return options
    return [Option("eval_strategy", ("steps" if "eval_steps" in given else "epoch",)), *options]


def _check_values(script: ScriptArguments, config: HeadConfig) -> None:
    if not 0.0 <= script.eval_share < 1.0:
        raise UsageError(f"eval_share: expected a share in [0, 1), got {script.eval_share}")
    if config.eval_strategy != "no" and script.eval_dataset is None and not script.eval_share:
        strategy = IntervalStrategy(config.eval_strategy).value
        raise UsageError(f"eval_strategy={strategy} needs --eval_dataset or --eval_share")
    twice = sorted({"dtype", "torch_dtype"} & config.model_options().keys())
    if twice:
        raise UsageError(f"model_init_kwargs: expected no {twice[0]!r}, which is a setting of its own: --dtype")
    if script.lora_dropout and config.disable_dropout:
        raise UsageError(
            f"lora_dropout: {script.lora_dropout} has no effect while disable_dropout is on; "
            "add --disable_dropout false"
        )


def full_help(argv: Sequence[str]) -> str:
    """Every setting of the run that ``argv`` begins."""
    options = [option for option in read_options(argv) if option.name in ("stage", "loss")]
    return make_parser(_last(options, "stage", STAGES), _last(options, "loss", tuple(LOSSES))).format_help()
