"""Whether two tokenizers have the same tokens for the same ids."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as Backend


def token_difference(ours: Backend, theirs: Backend) -> str | None:
    """The first id whose tokens differ, in words about the other one; None: all are the same.

    How a text is cut into tokens is not compared: only ids cross from one model to the other.
    """
    mine, others = by_id(ours), by_id(theirs)
    if mine == others:
        return None
    first = min(i for i in {*mine, *others} if mine.get(i) != others.get(i))
    has = f"has {others[first]!r} as token {first}" if first in others else f"has no token {first}"
    runs = f"{mine[first]!r}" if first in mine else "none"
    return f"its tokenizer {has}, and the run's has {runs}"


def by_id(backend: Backend) -> dict[int, str]:
    """Every token by its id, added and special ones too."""
    return {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}


def read_backend(directory: Path) -> Backend:
    """The tokenizer of a directory, for its tokens alone. ValueError where it cannot be read."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError("tokenizer.json is missing, by which its vocabulary is compared")
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"tokenizer.json is not a tokenizer ({error})") from error
