"""A vocabulary for random weights of which a tokenizer knows as large a part as Qwen3's does.

With the tokenizer of characters alone a random model would draw its 98 ids only, and so the end of
the response within some hundred tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mesh.model.families import shape_of_flavor
from mesh.program.assembly import read_command
from mesh.text.tokenizer import make_character_tokenizer

KNOWN, ROWS = 151_669, 151_936  # tokens of Qwen3's tokenizer, and rows of its models


def known_ids(vocab_size: int) -> int:
    """Ids with a text of a model of this vocabulary: the first ones."""
    return vocab_size * KNOWN // ROWS


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write the tokenizer of characters, with a token for each of the other `known_ids`."""
    make_character_tokenizer(directory)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    others = range(len(vocabulary), known_ids(vocab_size))
    tokenizer["model"]["vocab"] |= {f"<{token_id}>": token_id for token_id in others}
    path.write_text(json.dumps(tokenizer))


def with_tokenizer(words: Sequence[str], directory: Path) -> list[str]:
    """A recipe's arguments; where they name neither a model nor a tokenizer, with one that is
    written to `directory`. Ones that cannot be read end the process."""
    model = read_command(list(words))[1].model
    if model.path is not None or model.tokenizer is not None:
        return list(words)
    write_tokenizer(directory, shape_of_flavor(model.flavor).vocab_size)
    return [*words, f"model.tokenizer={directory}"]
