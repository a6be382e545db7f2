"""Models from a folder, a hub name or a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_model(name: str | Path, **options: Any) -> PreTrainedModel:
    """The causal language model in a folder, under a hub name or in a ``.gguf`` file.

    A GGUF file is dequantised to float32 unless ``dtype`` says otherwise, and the result is an ordinary model that
    can be trained and saved. Raises FileNotFoundError for a path that does not exist, ValueError for what cannot be
    loaded.
    """
    check_exists(name)
    path = Path(name)
    given = {key: value for key, value in options.items() if key != "dtype"}
    options = {"dtype": torch.float32, **options}
    with _named("model", name, f" with model_init_kwargs {given}" if given else ""):
        if path.suffix != ".gguf":
            return AutoModelForCausalLM.from_pretrained(str(name), **options)
        loaded = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, **options)
    # A model read from GGUF still counts as quantised and refuses to be saved; its weights no longer are.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model


def load_tokenizer(name: str | Path, argument: str = "tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model `load_model` finds under ``name``. Raises as that does.

    ``argument`` is what errors call it.
    """
    check_exists(name, argument)
    path = Path(name)
    with _named(argument, name, what="" if argument == "tokenizer" else "the tokenizer of "):
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoTokenizer.from_pretrained(str(name))


@contextmanager
def _named(argument: str, name: str | Path, options: str = "", what: str = "") -> Iterator[None]:
    """Errors of the libraries below as a ValueError of one line that names the argument."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    # Those of safetensors, tokenizers and the hub have no base in common but this one.
    except Exception as error:
        where = "" if Path(name).exists() else " (no folder here, so the hub's)"
        text = str(error).strip()
        # What follows the first line are lists of what would have been possible, some of them very long.
        first = text.partition("\n")[0].strip()
        reason = " ".join(text.split()) if first.endswith(":") else first
        raise ValueError(
            f"{argument}: cannot load {what}{str(name)!r}{where}{options}: {type(error).__name__}: {reason}"
        ) from error


def check_exists(name: str | Path, argument: str = "model") -> None:
    """Refuse what is clearly meant as a path: the hub's own message would speak of a repository id."""
    path = Path(name)
    if path.suffix == ".gguf" and not path.is_file():
        raise FileNotFoundError(f"{argument}: no such file: {path}")
    looks_like_path = path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1
    if looks_like_path and path.suffix != ".gguf" and not path.is_dir():
        raise FileNotFoundError(f"{argument}: no such folder: {path}")
