"""From a preference pair to token ids: templates, end tokens, the prompt's length, truncation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from slime_fused.trainer.formats import Messages, PreferencePair, common_length

Truncation = Literal["keep_start", "keep_end", "drop"]
RULES = {
    "keep_start": "the end of the response gives way",
    "keep_end": "the start of the prompt gives way, then the end of the response",
    "drop": "the row gives way",
}
"""What each `Truncation` does to a row that is too long."""


@dataclass(frozen=True)
class TokenizedResponse:
    """Token ids of prompt and response together, and how many of them are the prompt's."""

    ids: list[int]
    prompt_length: int

    @property
    def num_targets(self) -> int:
        """Response tokens that have a token before them to be predicted from."""
        return len(self.ids) - max(self.prompt_length, 1)


def tokenize_pair(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenizedResponse, TokenizedResponse, bool]:
    """(chosen, rejected, whether the prompt's tokens begin both sequences unchanged).

    Prompt and response are tokenised together, since a text cut in two need not give the same tokens; the
    response begins where the ids leave those of the prompt alone. A text ends with one EOS; a chat ends as its
    template ends it.
    """
    ids = prompt_ids(pair.prompt, tokenizer, pair.template_kwargs)
    chosen, rejected = (
        respond(pair.prompt, response, ids, tokenizer, pair.template_kwargs)
        for response in (pair.chosen, pair.rejected)
    )
    is_prefix = min(chosen.prompt_length, rejected.prompt_length) >= len(ids)
    return chosen, rejected, is_prefix


def truncate_pair(
    chosen: TokenizedResponse, rejected: TokenizedResponse, max_length: int | None, truncation: Truncation
) -> tuple[TokenizedResponse, TokenizedResponse] | None:
    """Both responses within ``max_length`` tokens, or None where ``truncation`` drops the pair.

    ``keep_start`` cuts the end of a response. ``keep_end`` first drops the same number of tokens from the start
    of both prompts, as many as the longer sequence needs but never the prompt's last token. ``drop`` cuts nothing.
    """
    longest = max(len(chosen.ids), len(rejected.ids))
    if max_length is None or longest <= max_length:
        return chosen, rejected
    if truncation == "drop":
        return None
    start = 0
    if truncation == "keep_end":
        shortest_prompt = min(chosen.prompt_length, rejected.prompt_length)
        start = max(min(longest - max_length, shortest_prompt - 1), 0)
    cut = [
        TokenizedResponse(r.ids[start : start + max_length], min(r.prompt_length - start, max_length))
        for r in (chosen, rejected)
    ]
    return cut[0], cut[1]


def prompt_ids(
    prompt: str | Messages, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> list[int]:
    """The tokens of a prompt alone, up to where a response begins."""
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        # A tokenizer that ends every text would put an EOS between the prompt and the response.
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    continues = prompt[-1]["role"] == "assistant"
    return apply_template(
        tokenizer, prompt, template_kwargs, add_generation_prompt=not continues, continue_final_message=continues
    )


def respond(
    prompt: str | Messages,
    response: str | Messages,
    ids_of_prompt: list[int],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
) -> TokenizedResponse:
    """Prompt and response in one sequence; ``ids_of_prompt`` are those of `prompt_ids`."""
    if isinstance(response, str):
        assert isinstance(prompt, str)
        ids = list(tokenizer(prompt + response)["input_ids"])
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids.append(tokenizer.eos_token_id)
    else:
        assert not isinstance(prompt, str)
        ids = apply_template(tokenizer, [*prompt, *response], template_kwargs)
    return TokenizedResponse(ids, common_length(ids_of_prompt, ids))


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, template_kwargs: Mapping[str, Any], **options: Any
) -> list[int]:
    """The tokens of a chat. Raises ValueError for a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "processing_class: the dataset holds chat messages, but the tokenizer has no chat template; "
            "set tokenizer.chat_template or use a tokenizer of an instruct model"
        )
    return list(
        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options, **template_kwargs)
    )
