"""Stop strings: texts that end an answer, each of which may be several tokens, or part of one.

What ends is decided on tokens: the tail of those that were sampled is decoded, and nothing else is
looked at, so that every engine and every rank stops at the same token. Most tokens cannot complete
a stop string whatever stands before them, which a table of the vocabulary knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mesh.text.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # decoded from the bytes of a part of a character


@dataclass(frozen=True)
class StopStrings:
    """The stop strings of a tokenizer. Two are equal if their strings are."""

    strings: tuple[str, ...]
    tokenizer: Tokenizer = field(compare=False, repr=False)

    def __call__(self, tokens: Sequence[int], start: int = 0) -> bool:
        """True if the last of `tokens` completes a stop string, in the text of `tokens[start:]`.

        The token may hold more text behind the string.
        """
        if tokens[-1] not in self.endings:
            return False
        text = self.tokenizer.decode(list(tokens[max(start, len(tokens) - self.reach) :]))
        return any(string in text for string in self.strings)

    @cached_property
    def reach(self) -> int:
        """Tokens that a stop string may lie in, and one before them: a decoder may strip the space
        of the first. A token holds a byte at least."""
        return 1 + max(len(string.encode()) for string in self.strings)

    @cached_property
    def endings(self) -> frozenset[int]:
        """Tokens in which a stop string may end."""
        ids = [i for i in range(self.tokenizer.vocab_size) if self.tokenizer.has(i)]
        backend = self.tokenizer.backend
        alone = backend.decode_batch([[i] for i in ids], skip_special_tokens=False)
        twice = backend.decode_batch([[i, i] for i in ids], skip_special_tokens=False)
        return frozenset(
            token_id
            for token_id, first, both in zip(ids, alone, twice, strict=True)
            if self._may_end(first, both)
        )

    def _may_end(self, first: str, both: str) -> bool:
        """True if a stop string may end in a token, by its text at the beginning of a text, and by
        that of the token twice: amid a text it may have a space in front, or be joined."""
        if UNFINISHED in both or not both.startswith(first):
            return True
        texts = (first, both[len(first) :])
        return any(ends_in(string, text) for string in self.strings for text in texts)


def ends_in(string: str, text: str) -> bool:
    """True if `string` may end within `text`, whatever stands before it."""
    lengths = range(1, min(len(string), len(text)) + 1)
    return string in text or any(string.endswith(text[:n]) for n in lengths)
