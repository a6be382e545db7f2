"""The preference formats that are understood, brought to one: prompt, chosen and rejected as text or as messages.

Accepted rows::

    {"prompt": str,      "chosen": str,      "rejected": str}            text
    {"prompt": messages, "chosen": messages, "rejected": messages}       chat; a message is {"role", "content"}
    {"chosen": str | messages, "rejected": str | messages}               the prompt is their common beginning
    {"prompt": str, "chosen": messages, "rejected": messages}            as above; a prompt they do not repeat
                                                                         becomes a user message
    {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids}          token ids as TRL makes them: responses
                                                                         without the prompt

Other columns are ignored, except ``tools`` and ``chat_template_kwargs``, which go to the chat template, and
`REFERENCE_COLUMNS`, which a loss with a reference takes as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slime_fused.model.reference import REFERENCE_COLUMNS

Messages = list[dict[str, Any]]

TOKENISED = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Columns of a pair that is tokenised already."""


EXPECTED = "'chosen' and 'rejected', and usually 'prompt', each a text or a list of {role, content} messages"


class PreferenceFormatError(ValueError):
    """A row that is no preference pair; the message names the row, what was expected and what came."""


@dataclass(frozen=True)
class PreferencePair:
    """One row in its common form. ``prompt``, ``chosen`` and ``rejected`` are all texts or all messages."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def parse_pair(row: Mapping[str, Any], where: str) -> PreferencePair:
    """The pair in ``row``. ``where`` names the row in errors ("line 3 of pairs.jsonl").

    Raises PreferenceFormatError for missing columns, wrong types, texts mixed with messages, and responses that
    do not differ although the prompt has to be taken from them.
    """
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise PreferenceFormatError(f"{where}: expected {EXPECTED}; got {describe_columns(row)}")
    prompt = row.get("prompt")
    prompt = None if prompt is None else checked_content(prompt, "prompt", where)
    chosen, rejected = (checked_content(row[name], name, where) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise PreferenceFormatError(f"{where}: 'chosen' and 'rejected' must both be texts or both be messages")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None and not isinstance(prompt, str):
            raise PreferenceFormatError(f"{where}: 'prompt' holds messages although the responses are texts")
        if prompt is None:
            prompt, chosen, rejected = _split_texts(chosen, rejected, where)
        return PreferencePair(prompt, chosen, rejected)
    assert not isinstance(chosen, str)
    assert not isinstance(rejected, str)
    if not isinstance(prompt, list):
        prompt, chosen, rejected = _split_messages(prompt, chosen, rejected, where)
    return PreferencePair(prompt, chosen, rejected, template_kwargs(row))


def pair_columns(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``row`` in its common form, as columns of a dataset: those of `parse_pair`, or `TOKENISED`; and
    `REFERENCE_COLUMNS`, if it has them.

    Some rows may repeat the prompt as a text or leave it out, and one column holds one type.
    Raises as `parse_pair`.
    """
    sums = {name: row[name] for name in REFERENCE_COLUMNS if row.get(name) is not None}
    if is_tokenised(row):
        return sums | {name: token_ids(row[name], name, where) for name in TOKENISED}
    pair = parse_pair(row, where)
    return sums | {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} | template_columns(row)


def is_tokenised(row: Mapping[str, Any]) -> bool:
    """Whether a row holds token ids in place of texts."""
    return all(row.get(name) is not None for name in TOKENISED)


def token_ids(value: Any, name: str, where: str) -> list[int]:
    """``value``, which has to be a list of token ids."""
    if not isinstance(value, (list, tuple)) or not all(type(item) is int and item >= 0 for item in value):
        raise PreferenceFormatError(f"{where}: {name!r} must be a list of token ids, got {value!r:.80}")
    return list(value)


def template_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that go to the chat template, where a row has them."""
    return {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}


def template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template that a row brings."""
    kwargs = dict(row.get("chat_template_kwargs") or {})
    if row.get("tools"):
        kwargs["tools"] = row["tools"]
    return kwargs


def is_empty(response: str | Messages) -> bool:
    """Whether a response says nothing: no text, or messages with nothing in them but their role."""
    if isinstance(response, str):
        return not response
    return not any(value for message in response for name, value in message.items() if name != "role")


def describe_columns(row: Mapping[str, Any]) -> str:
    """What a row holds, for errors."""
    present = [name for name, value in row.items() if value is not None]
    return f"columns {sorted(present)}" if present else "no columns"


def checked_content(value: Any, name: str, where: str) -> str | Messages:
    """``value``, which has to be a text or a list of messages; one message becomes a list."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value:
        raise PreferenceFormatError(
            f"{where}: {name!r} must be a text or a non-empty list of messages, got {value!r:.80}"
        )
    for message in value:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise PreferenceFormatError(
                f"{where}: each message of {name!r} must have 'role' and 'content', got {message!r:.80}"
            )
    # Columnar storage fills the keys that only some messages have with None; chat templates test for presence.
    return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in value]


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Of how many items the common beginning of two sequences consists."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _split_texts(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    size = common_length(chosen, rejected)
    if chosen == rejected:
        raise PreferenceFormatError(f"{where}: without a 'prompt', 'chosen' and 'rejected' must differ")
    # Most tokenizers glue a space to the word that follows it, so it belongs to the responses.
    if size and chosen[size - 1] == " ":
        size -= 1
    return chosen[:size], chosen[size:], rejected[size:]


def _split_messages(
    prompt: str | None, chosen: Messages, rejected: Messages, where: str
) -> tuple[Messages, Messages, Messages]:
    size = common_length(chosen, rejected)
    if size == len(chosen) == len(rejected):
        raise PreferenceFormatError(f"{where}: 'chosen' and 'rejected' hold the same messages; they must differ")
    if size == 0:
        if prompt is None:
            raise PreferenceFormatError(f"{where}: no 'prompt', and 'chosen' and 'rejected' share no first message")
        return [{"role": "user", "content": prompt}], chosen, rejected
    return chosen[:size], chosen[size:], rejected[size:]
