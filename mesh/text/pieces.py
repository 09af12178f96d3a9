"""The text of each token of a sequence, so that all of them together are the decoded whole."""

from __future__ import annotations

from collections.abc import Callable

MOST_TOKENS = 16  # that may add no text of their own, one after the other
Decode = Callable[[list[int]], str]


def token_texts(decode: Decode, tokens: list[int]) -> list[str]:
    """One text for each token, whose concatenation is `decode(tokens)`.

    A token that ends inside a character has "", and the one that completes it has the character.
    Each is decoded behind those of the last text, as a decoder looks at neighbours, and compared
    with the whole. With a decoder that looks farther, the last token has the rest.
    """
    whole, texts = decode(tokens), list[str]()
    done, start, known, before = 0, 0, 0, ""
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[start:end])[len(before) :]
        if not whole.startswith(text, done):
            if end - known > MOST_TOKENS:
                break
            texts.append("")
            continue
        texts.append(text)
        done, start, known = done + len(text), known, end
        before = decode(tokens[start:known])
    texts += [""] * (len(tokens) - len(texts))
    if texts:
        texts[-1] += whole[done:]
    return texts
