"""The command line of ``slime-train``: every setting as an option, or in a YAML file of the same names."""

# Annotations stay unquoted here: the parser reads the types of the fields.
import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from slime_fused.trainer.config import SlimeConfig

_COMMON_TEXT = (
    "--output_dir --per_device_train_batch_size --gradient_accumulation_steps --learning_rate --num_train_epochs "
    "--max_steps --logging_steps --eval_strategy --eval_steps --save_strategy --save_steps --seed "
    "--resume_from_checkpoint --report_to --bf16"
)
_COMMON = frozenset(_COMMON_TEXT.split())

EXAMPLE = """\
example:
  slime-train --model ./my-model --dataset pairs.jsonl --output_dir out --learning_rate 1e-6 --max_length 1024
  slime-train --config run.yaml --loss naive

pairs.jsonl holds one pair per line, as text or as chat messages:
  {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."}

run.yaml holds the same names without dashes (options on the command line win):
  model: ./my-model
  dataset: pairs.jsonl
  learning_rate: 1e-6
"""


@dataclass
class ScriptArguments:
    """What to train, on what, and with which adapter."""

    model: str = field(
        metadata={"help": "Model folder, .gguf file or hub name.", "aliases": ["--model_name_or_path"]}
    )
    dataset: str = field(metadata={"help": "Pairs: .jsonl, .json or .parquet file, or a datasets folder."})
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not with the model."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Pairs to evaluate on, as for --dataset."})
    eval_share: float = field(
        default=0.0, metadata={"help": "Without --eval_dataset: share of the pairs held out for evaluation."}
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


_KINDS: tuple[Any, ...] = (ScriptArguments, SlimeConfig)


class UsageError(Exception):
    """A command line or configuration file that cannot be used; the message is for its author."""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[ScriptArguments, SlimeConfig]:
    """Settings from ``argv`` (the process's own if None) and the YAML file that ``--config`` names.

    Prints help and exits for ``--help`` and ``--help_all``. Raises UsageError for unknown or missing names,
    values of the wrong type, and an unreadable file.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(_KINDS, prog="slime-train", add_help=False, allow_abbrev=False, epilog=EXAMPLE)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(_short_help(parser))
        raise SystemExit(0)
    if {"--help_all", "--help-all"} & set(arguments):
        parser.print_help()
        raise SystemExit(0)
    arguments = _expand_config(arguments)
    known = {option for action in parser._actions for option in action.option_strings}
    for argument in arguments:
        name = argument.split("=")[0]
        if name.startswith("--") and name not in known:
            raise UsageError(f"unknown setting {name}{_suggestion(name, known)}")
    try:
        script, config, spare = parser.parse_args_into_dataclasses(
            arguments, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    if spare:
        raise UsageError(f"values that belong to no setting: {spare}; a setting that takes one value got several")
    if not 0.0 <= script.eval_share < 1.0:
        raise UsageError(f"eval_share: expected a share in [0, 1), got {script.eval_share}")
    if script.merge_adapter and not script.use_peft:
        raise UsageError("merge_adapter: expected --use_peft with it; without an adapter there is nothing to merge")
    return script, config


def _expand_config(arguments: list[str]) -> list[str]:
    """Replace ``--config FILE`` by the file's settings, in front: what comes later wins."""
    rest: list[str] = []
    from_files: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        name, equals, value = argument.partition("=")
        if name != "--config":
            rest.append(argument)
            continue
        path = value if equals else next(pending, None)
        if path is None:
            raise UsageError("--config: expected a YAML file")
        from_files += _options_of(Path(path).expanduser())
    return from_files + rest


def _options_of(path: Path) -> list[str]:
    if not path.is_file():
        raise UsageError(f"config: no such file: {path}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config: {path} is not readable as YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"config: expected 'name: value' lines in {path}, got {type(settings).__name__}")
    fields = [f for kind in _KINDS for f in dataclasses.fields(kind)]
    names = {f.name for f in fields} | {
        alias.lstrip("-") for f in fields for alias in f.metadata.get("aliases", [])
    }
    options: list[str] = []
    for name, value in settings.items():
        if name not in names:
            raise UsageError(f"config: unknown setting {name!r} in {path}{_suggestion(str(name), names)}")
        if value is None:
            continue
        options.append(f"--{name}")
        options += [_as_text(item) for item in value] if isinstance(value, list) else [_as_text(value)]
    return options


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _suggestion(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]}?" if close else "; --help_all lists every setting"


def _short_help(parser: HfArgumentParser) -> str:
    """The settings of this package and the everyday ones of the base class; all of them are over a hundred."""
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    own = {f.name for kind in _KINDS for f in dataclasses.fields(kind)} - inherited
    lines = [
        "usage: slime-train --model MODEL --dataset PAIRS [--config FILE.yaml] [settings]",
        "",
        "Trains a language model on preference pairs with the SLIME loss, without a reference model.",
        "",
        "settings (--help_all lists every one):",
        f"  {'--config':<32}YAML file of settings",
    ]
    for action in parser._actions:
        if action.dest in own and action.option_strings[0] == f"--{action.dest}":
            lines.append(_help_line(action))
    lines += ["", "of the training loop (--help_all: over a hundred more):"]
    lines += [_help_line(action) for action in parser._actions if action.option_strings[0] in _COMMON]
    return "\n".join([*lines, "", EXAMPLE])


def _help_line(action: Any) -> str:
    text = " ".join(str(action.help or "").split())
    text = text if len(text) <= 90 or action.option_strings[0] not in _COMMON else text[:87] + "..."
    default = "required" if action.required else f"default: {action.default}"
    return f"  {action.option_strings[0]:<32}{text} ({default})"
