"""What every rank derives by itself, compared: ranks that differ would wait for each other, or
train on different things without a word.

A part is a number of named texts. Ranks exchange one digest of it; the texts themselves cross only
where digests differ, so that the message can show what does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import partial
from itertools import chain
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a scoring process, which has no torch, makes texts of prompts
    from mesh.lifecycle.process import Process

LONGEST = 160  # characters shown of a text
BEFORE = 40  # of them before the first that differs
MOST_RANKS = 8  # that a message names


@dataclass(frozen=True)
class Part:
    """Something that all ranks must have alike. `items`: texts by name, with equal bytes on ranks
    that agree (`text_of`); remedy: what to do where they differ.
    """

    name: str
    items: Mapping[str, str]
    remedy: str

    @property
    def digest(self) -> int:
        """64 bits, signed as an int64 tensor holds them."""
        sizes_and_texts = (f"{len(text)}:{text}" for pair in self.items.items() for text in pair)
        whole = "".join(sizes_and_texts).encode(errors="surrogatepass")
        digest = hashlib.blake2b(whole, digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


def disagreements(process: Process, *parts: Part) -> list[str]:
    """One line for each part that is not the same on all ranks; the same lines on every rank.
    Collective, with the same parts on all ranks.
    """
    digests = process.gather([part.digest for part in parts])
    of_parts = zip(parts, zip(*digests, strict=True), strict=True)
    return [line for part, by_rank in of_parts if (line := difference(process, part, by_rank))]


def difference(process: Process, part: Part, digests: Sequence[int]) -> str:
    """Ranks whose digest is not rank 0's, and the first item that differs, on both; empty where all
    are equal. Collective where they are not.
    """
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not others:
        return ""
    texts = process.gather(dict(part.items))
    first, other = texts[0], texts[others[0]]
    name = next((n for n in dict.fromkeys(chain(first, other)) if first.get(n) != other.get(n)), "")
    ours, theirs = excerpts(first.get(name, "missing"), other.get(name, "missing"))
    named = ", ".join(map(str, others[:MOST_RANKS]))
    named += f" and {len(others) - MOST_RANKS} more" if len(others) > MOST_RANKS else ""
    differ = "rank {} differs" if len(others) == 1 else "ranks {} differ"
    return (
        f"{differ.format(named)} from rank 0 in {part.name}: {name} is {ours} on rank 0 and "
        f"{theirs} on rank {others[0]}; {part.remedy}"
    )


def excerpts(*texts: str) -> list[str]:
    """The texts, long ones from shortly before the first character in which they differ."""
    same = len(commonprefix(texts))
    start = max(0, same - BEFORE) if max(map(len, texts)) > LONGEST else 0
    found = []
    for text in texts:
        shown = text[start : start + LONGEST]
        found.append(f"{'...' * (start > 0)}{shown}{'...' * (start + LONGEST < len(text))}")
    return found


def text_of(value: Any) -> str:
    """A text of `value` that processes with equal values have alike: plain data and dataclasses
    with all they hold, of anything else what it says of itself, without addresses.
    """
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{text_of(k)}: {text_of(v)}' for k, v in value.items())}}}"
    if isinstance(value, set | frozenset):  # hashes of texts, and so the order, differ
        return f"{{{', '.join(sorted(map(text_of, value)))}}}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(text_of, value))})"
    if isinstance(value, partial):
        return f"partial{text_of([value.func, value.args, value.keywords])}"
    if is_dataclass(value) and not isinstance(value, type):
        told = [f for f in fields(value) if f.repr and not _is_left_out(f, getattr(value, f.name))]
        pairs = (f"{f.name}={text_of(getattr(value, f.name))}" for f in told)
        return f"{type(value).__qualname__}({', '.join(pairs)})"
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _is_left_out(field: Field[Any], value: Any) -> bool:
    """True for a keyword-only field with its default, so that a later version may add some: what
    has none of them keeps its text.
    """
    if not field.kw_only:
        return False
    made: Any = field.default_factory
    return bool(value == (field.default if made is MISSING else made()))
