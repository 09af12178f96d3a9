"""The token with which a chat template ends an assistant's turn.

A chat model has learnt to stop there, which need not be the tokenizer's eos_token: a Qwen3 ends a
turn with <|im_end|>, and a text with <|endoftext|>. The template is rendered for a question and an
answer.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import date

from tokenizers import Tokenizer as Backend

from mesh.text.template import ChatTemplate

ANSWER = "a8c1e5-answer"  # in no template
CHAT = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
SOME_DAY = date(2000, 1, 1)


def turn_end(
    template: ChatTemplate | None, backend: Backend, known_ends: Collection[int]
) -> int | None:
    """The id of the special token that follows an answer; None where there is no template, or none
    follows.

    known_ends: ids that count although they are not special. Raises ValueError for a template that
    cannot be rendered.
    """
    if template is None:
        return None
    chat = template.render(CHAT, SOME_DAY)
    rest = chat[chat.rindex(ANSWER) + len(ANSWER) :].lstrip() if ANSWER in chat else ""
    ends = {
        token.content: token_id
        for token_id, token in backend.get_added_tokens_decoder().items()
        if rest.startswith(token.content) and (token.special or token_id in known_ends)
    }
    return ends[max(ends, key=len)] if ends else None
