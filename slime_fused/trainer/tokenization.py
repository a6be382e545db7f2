"""From a preference pair to token ids: templates, end tokens, the prompt's length, truncation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from slime_fused.trainer.formats import Messages, PreferencePair

Truncation = Literal["keep_start", "keep_end", "drop"]


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
    prompt_ids = _prompt_ids(pair, tokenizer)
    chosen = _respond(pair, pair.chosen, prompt_ids, tokenizer)
    rejected = _respond(pair, pair.rejected, prompt_ids, tokenizer)
    is_prefix = min(chosen.prompt_length, rejected.prompt_length) >= len(prompt_ids)
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


def _prompt_ids(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(pair.prompt, str):
        ids = list(tokenizer(pair.prompt)["input_ids"])
        # A tokenizer that ends every text would put an EOS between the prompt and the response.
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    continues = pair.prompt[-1]["role"] == "assistant"
    return _apply_template(
        tokenizer, pair.prompt, pair, add_generation_prompt=not continues, continue_final_message=continues
    )


def _respond(
    pair: PreferencePair, response: str | Messages, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> TokenizedResponse:
    if isinstance(response, str):
        assert isinstance(pair.prompt, str)
        ids = list(tokenizer(pair.prompt + response)["input_ids"])
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids.append(tokenizer.eos_token_id)
    else:
        assert not isinstance(pair.prompt, str)
        ids = _apply_template(tokenizer, [*pair.prompt, *response], pair)
    return TokenizedResponse(ids, _common_length(prompt_ids, ids))


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, pair: PreferencePair, **options: Any
) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "processing_class: the dataset holds chat messages, but the tokenizer has no chat template; "
            "set tokenizer.chat_template or use a tokenizer of an instruct model"
        )
    return list(
        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options, **pair.template_kwargs)
    )


def _common_length(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
