"""What a tokenizer makes of a text that is given to a model: control tokens, and what it loses.

Neither is an error of its own. Chat templates write control tokens on purpose, and an uncased model
has a tokenizer that folds case. But the same characters in the data of a user end a turn that they
were to be part of, and a task scores the text as it was.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass

from mesh.text.tokenizer import Tokenizer, UnknownText

EXCERPT = 60  # characters of a text in a message


Controls = tuple[tuple[int, int], ...]
"""Pairs (id, how often), by id."""


@dataclass(frozen=True)
class Reading:
    """A text as a model reads it. controls: the control tokens in it; came_back: the text of its
    tokens where that is another, around the first difference, else None.
    """

    controls: Controls
    came_back: str | None


def read_text(tokenizer: Tokenizer, text: str, controls: frozenset[int]) -> Reading | None:
    """The reading of a text; None where it cannot be encoded, which is a fault of its own."""
    try:
        ids = tokenizer.encode(text)
    except UnknownText:
        return None
    counts = Counter(i for i in ids if i in controls)
    return Reading(tuple(sorted(counts.items())), lost(text, tokenizer.decode(ids)))


def control_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that their characters in a text encode to and that are no text to the model: special
    tokens, and added tokens that end a response.
    """
    added = tokenizer.backend.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special or i in tokenizer.eos_ids)


def lost(text: str, back: str) -> str | None:
    """What came back in place of a text, around the first difference; None: nothing was lost.

    Canonical Unicode forms (NFC) are one text, and so are texts with and without the space that
    some tokenizers put in front of the first word. Compatibility forms are not: in NFKC x² is x2.
    """
    ours, theirs = (unicodedata.normalize("NFC", x).removeprefix(" ") for x in (text, back))
    if ours == theirs:
        return None
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    place = min(len(ours), len(theirs)) if same is None else same
    return theirs[max(0, place - EXCERPT // 2) :][:EXCERPT]
