"""Settings as they were given, on a command line and in YAML files, before anything knows what they mean."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


class UsageError(Exception):
    """A command line or configuration file that cannot be used; the message is for its author."""


@dataclass(frozen=True)
class Option:
    """One setting: its name with underscores, its values as text, and where it stands."""

    name: str
    values: tuple[str, ...]
    file: str | None = None
    """The YAML file; None for the command line."""

    def __str__(self) -> str:
        return f"{self.name!r} in {self.file}" if self.file else f"--{self.name}"


def read_options(arguments: Sequence[str]) -> list[Option]:
    """The settings of a command line, after those of the files that ``--config`` names: what comes later wins.

    Raises UsageError for a value without a setting and for what `read_yaml` refuses.
    """
    given = list(_split(arguments))
    from_files: list[Option] = []
    for option in given:
        if option.name == "config":
            if len(option.values) != 1:
                raise UsageError(f"--config: expected a YAML file, got {list(option.values) or 'nothing'}")
            from_files += read_yaml(Path(option.values[0]).expanduser())
    return from_files + [option for option in given if option.name != "config"]


def _split(arguments: Sequence[str]) -> Iterator[Option]:
    name, values = None, []
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            if name is not None:
                yield Option(name, tuple(values))
            text, equals, value = argument[2:].partition("=")
            name, values = text.replace("-", "_"), [value] if equals else []
        elif name is None:
            raise UsageError(f"expected --setting value, got {argument!r} before any setting")
        else:
            values.append(argument)
    if name is not None:
        yield Option(name, tuple(values))


def as_arguments(options: Sequence[Option]) -> list[str]:
    """The command line that says the same."""
    return [text for option in options for text in (f"--{option.name}", *option.values)]


def read_yaml(path: Path) -> list[Option]:
    """The ``name: value`` lines of a YAML file. A value that is null counts as not given.

    Raises UsageError for a missing file, text that is no YAML or no UTF-8, and a key given twice.
    """
    if not path.is_file():
        raise UsageError(f"config: no such file: {path}")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1} of " if error.problem_mark else ""
        raise UsageError(f"config: {line}{path} is not readable as YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config: {path} is not readable as YAML: {error}") from error
    except _RepeatedKeyError as error:
        raise UsageError(f"config: line {error.line} of {path}: {error.key!r} is there twice") from None
    if not isinstance(settings, dict):
        raise UsageError(f"config: expected 'name: value' lines in {path}, got {type(settings).__name__}")
    options = []
    for name, value in settings.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            options.append(Option(str(name).replace("-", "_"), tuple(map(_as_text, values)), str(path)))
    return options


class _RepeatedKeyError(Exception):
    def __init__(self, key: Any, line: int) -> None:
        super().__init__(key, line)
        self.key, self.line = key, line


class _Loader(yaml.SafeLoader):
    """That of PyYAML, which lets the last of two equal keys win without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse keys that were there before."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise _RepeatedKeyError(key_node.value, key_node.start_mark.line + 1)
            if isinstance(key_node.value, str):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)
