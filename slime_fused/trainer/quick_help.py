"""``slime-train --help``, at once: settings are read off the source of the classes that declare them.

Importing those classes would mean importing `transformers`, four seconds for a page of text. Parsing their source
is quick; it has to hold lines ``name: type = field(...)``. Where the `TrainingArguments` of a release have another
form, they are imported after all.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from slime_fused.losses import Slime
from slime_fused.trainer.loss_choice import DEFAULTS, LOSSES, hyperparameters

_COMMON = (
    "output_dir",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "seed",
    "resume_from_checkpoint",
    "report_to",
    "bf16",
    "gradient_checkpointing",
)
"""Of the settings of `transformers`, over a hundred, the everyday ones."""

EXAMPLE = """\
examples:
  slime-train --model ./my-model --dataset pairs.jsonl --output_dir out --max_length 1024
  slime-train --model org/model --dataset org/pairs --loss simpo --beta 2.5 --use_peft --output_dir out
  slime-train --stage sft --model ./my-model --dataset texts.jsonl --output_dir sft
  slime-train --config run.yaml --loss_impl naive

pairs.jsonl holds one pair per line, as text or as chat messages:
  {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."}

run.yaml holds the same names without dashes (options on the command line win):
  model: ./my-model
  dataset: pairs.jsonl
  learning_rate: 1e-6
"""


@dataclass(frozen=True)
class Setting:
    """A setting as its class declares it."""

    name: str
    help: str
    default: str
    """As text; "required" for none."""


def short_help(arguments: Sequence[str] = ()) -> str:
    """The settings of this package and the everyday ones of the base class, for the run that begins so."""
    stage = _value(arguments, "--stage", ("preference", "sft"))
    loss = _value(arguments, "--loss", tuple(LOSSES))
    base = _of_transformers()
    inherited = {setting.name for setting in base}
    head = declared("config", "HeadConfig")
    stage_class = ("sft_config", "SftConfig") if stage == "sft" else ("config", "PreferenceConfig")
    of_stage = declared(*stage_class)
    lines = [
        "usage: slime-train --model MODEL --dataset ROWS [--config FILE.yaml] [settings]",
        "",
        "Trains a language model on preference pairs (SLIME, other losses), or on texts before that (--stage sft).",
        "",
        "settings (--help_all lists every one):",
        f"  {'--config':<32}YAML file of settings",
        *map(_line, declared("arguments", "ScriptArguments")),
    ]
    if stage == "sft":
        lines += ["", "of supervised fine-tuning:", *(_line(s) for s in of_stage if s.name not in inherited)]
        of_data = head
    else:
        lines += ["", f"of --loss {loss}:", *map(_line, _of_loss(loss))]
        lines += ["", "of the other losses (--loss NAME --help says what they are):"]
        others = {name: ", ".join(hyperparameters(name)) for name in LOSSES if name != loss}
        lines += [_wrapped(f"  --loss {name}", names) for name, names in others.items()]
        of_data = head + of_stage
    lines += ["", "of the head and the data:", *(_line(s) for s in of_data if s.name not in inherited)]
    lines += ["", "of the training loop (--help_all: over a hundred more):"]
    # The nearest declaration counts.
    by_name = {setting.name: setting for setting in (*base, *head, *of_stage)}
    lines += [_line(by_name[name]) for name in _COMMON if name in by_name]
    return "\n".join([*lines, "", EXAMPLE])


def _value(arguments: Sequence[str], option: str, choices: Sequence[str]) -> str:
    values = [value for name, value in pairwise(arguments) if name == option]
    values += [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{option}=")]
    return values[-1] if values and values[-1] in choices else choices[0]


def _of_loss(loss: str) -> list[Setting]:
    if loss == "slime":
        return [
            dataclasses.replace(setting, default=str(getattr(Slime, setting.name)))
            for setting in declared("config", "SlimeConfig")
        ]
    fields: Any = dataclasses.fields(LOSSES[loss])  # type: ignore[arg-type]
    texts = hyperparameters(loss)
    own = DEFAULTS.get(loss, {})
    return [Setting(f.name, texts[f.name], str(own.get(f.name, f.default))) for f in fields if f.name in texts]


def declared(module: str, name: str) -> list[Setting]:
    """The settings that a class of this folder declares itself, without importing it."""
    return list(_declared(Path(__file__).with_name(f"{module}.py"), name))


def _of_transformers() -> list[Setting]:
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return []
    try:
        found = _declared(Path(spec.origin).with_name("training_args.py"), "TrainingArguments")
    except (OSError, SyntaxError):
        found = ()
    # Two that every release has.
    return list(found) if {"output_dir", "seed"} <= {setting.name for setting in found} else _imported()


def _imported() -> list[Setting]:
    cls: Any = importlib.import_module("transformers").TrainingArguments
    return [
        Setting(f.name, str(f.metadata.get("help", "")).replace("%%", "%"), str(f.default))
        for f in dataclasses.fields(cls)
        if f.default is not dataclasses.MISSING
    ]


@cache
def _declared(path: Path, name: str) -> tuple[Setting, ...]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    return tuple(_settings(classes[0])) if classes else ()


def _settings(cls: ast.ClassDef) -> Iterator[Setting]:
    for node in cls.body:
        # name: type = field(default=..., metadata={"help": ...})
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if not (isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "field"):
            continue
        given = {keyword.arg: keyword.value for keyword in node.value.keywords}
        metadata = given.get("metadata")
        texts = (
            {ast.unparse(key): value for key, value in zip(metadata.keys, metadata.values, strict=True) if key}
            if isinstance(metadata, ast.Dict)
            else {}
        )
        help_text = texts.get("'help'")
        if help_text is not None:
            yield Setting(node.target.id, _constant(help_text).replace("%%", "%"), _default(given))


def _default(given: dict[str | None, ast.expr]) -> str:
    if "default" in given:
        return _constant(given["default"])
    factory = given.get("default_factory")
    return _constant(factory.body) if isinstance(factory, ast.Lambda) else "required"


def _constant(node: ast.expr) -> str:
    try:
        return str(ast.literal_eval(node))
    except ValueError:
        return ast.unparse(node)


def _line(setting: Setting) -> str:
    default = setting.default if setting.default == "required" else f"default: {setting.default}"
    text = " ".join(setting.help.split())
    return _wrapped(f"  --{setting.name}", f"{text} ({default})")


def _wrapped(name: str, text: str) -> str:
    lines = textwrap.wrap(text, 84) or [""]
    indent = "\n" + " " * 34
    return f"{name:<33} " + indent.join(lines)
