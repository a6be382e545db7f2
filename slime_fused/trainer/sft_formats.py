"""The formats of supervised fine-tuning that are understood, brought to one: a prompt and its completion.

Accepted rows::

    {"prompt": str,      "completion": str}                    text
    {"prompt": messages, "completion": messages}               chat; a message is {"role", "content"}
    {"prompt": str,      "completion": messages}               the prompt becomes a user message
    {"messages": messages}                                     the assistant's turns are the completion
    {"text": str}                                              all of it is the completion
    a preference pair, as `slime_fused.trainer.formats` has it   the chosen response is the completion, of token
                                                               ids too

Other columns are ignored, except ``tools`` and ``chat_template_kwargs``, which go to the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slime_fused.trainer.formats import (
    Messages,
    PreferenceFormatError,
    checked_content,
    describe_columns,
    is_tokenised,
    pair_columns,
    parse_pair,
    template_columns,
    template_kwargs,
)

EXPECTED = "'prompt' and 'completion', 'messages', 'text', or a pair whose 'chosen' is the completion"


@dataclass(frozen=True)
class Example:
    """One row in its common form. ``prompt`` and ``completion`` are both texts or both messages."""

    prompt: str | Messages | None
    """None: of a text everything is the completion, of messages the assistant's turns."""
    completion: str | Messages
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def parse_example(row: Mapping[str, Any], where: str) -> Example:
    """The example in ``row``. ``where`` names the row in errors.

    Raises PreferenceFormatError for missing columns, wrong types, and texts mixed with messages.
    """
    kwargs = template_kwargs(row)
    if row.get("completion") is not None:
        if row.get("prompt") is None:
            raise PreferenceFormatError(
                f"{where}: expected 'prompt' with 'completion'; got {describe_columns(row)}"
            )
        prompt, completion = (checked_content(row[name], name, where) for name in ("prompt", "completion"))
        if isinstance(completion, str) and not isinstance(prompt, str):
            raise PreferenceFormatError(f"{where}: 'prompt' holds messages although the completion is a text")
        if isinstance(prompt, str) and not isinstance(completion, str):
            prompt = [{"role": "user", "content": prompt}]
        return Example(prompt, completion, kwargs)
    if row.get("chosen") is not None and row.get("rejected") is not None:
        pair = parse_pair(row, where)
        return Example(pair.prompt, pair.chosen, kwargs)
    if row.get("messages") is not None:
        messages = checked_content(row["messages"], "messages", where)
        if isinstance(messages, str):
            raise PreferenceFormatError(f"{where}: 'messages' must be a list of messages, got {messages!r:.80}")
        return Example(None, messages, kwargs)
    if row.get("text") is not None:
        if not isinstance(row["text"], str):
            raise PreferenceFormatError(f"{where}: 'text' must be a text, got {row['text']!r:.80}")
        return Example(None, row["text"], kwargs)
    raise PreferenceFormatError(f"{where}: expected {EXPECTED}; got {describe_columns(row)}")


def example_columns(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``row`` in its common form, as columns of a dataset; a tokenised pair as it is. Raises as `parse_example`."""
    if is_tokenised(row):
        return pair_columns(row, where)
    example = parse_example(row, where)
    extra = template_columns(row)
    if example.prompt is not None:
        return {"prompt": example.prompt, "completion": example.completion} | extra
    return {"text" if isinstance(example.completion, str) else "messages": example.completion} | extra
