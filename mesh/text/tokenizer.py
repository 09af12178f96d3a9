"""Text to token ids and back, from a Hugging Face `tokenizer.json`.

A thin noun over the `tokenizers` library, which gives the ids that `transformers` gives, without
loading it. Text the tokenizer cannot represent is an error here: most tokenizers drop such
characters silently, and a model would be trained on another question than the one it is scored on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

CHARACTERS = Path(__file__).resolve().parents[1] / "data" / "characters"
"""The tokenizer that ships with the package; `make_character_tokenizer` writes it."""


@dataclass(frozen=True)
class Tokenizer:
    """`eos_ids` end a response: every end-of-sequence id that the directory's files name."""

    directory: Path
    backend: Backend
    eos_ids: tuple[int, ...]
    unknown_id: int | None

    @property
    def vocab_size(self) -> int:
        """The largest id + 1; a model's vocabulary may be padded beyond it."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids, no special tokens added; ValueError naming a character it does not know."""
        encoding = _try_encode(self.backend, text)
        unknown = _unknown_part(self, text, encoding)
        if unknown is not None or encoding is None:
            raise ValueError(
                f"the tokenizer in {self.directory} does not know {unknown!r}, which is in "
                f"{text!r}: change the text, or set model.tokenizer to one that knows it"
            )
        return encoding.ids

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """The text of ids, without special tokens and without ids that stand for nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in a Hugging Face directory; ValueError naming the file that is at fault."""
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: set model.tokenizer (or model.path) to a directory with "
            "tokenizer.json, or leave both unset for the characters that ship with the package"
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{path} is not a tokenizer ({error}): copy the file from the model again"
        ) from error
    # a file may carry the truncation and padding of some past training run
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(directory, backend, _eos_ids(directory, backend), _unknown_id(path, backend))


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> list[str]:
    """The problems, if any, between this tokenizer and a model of `model_vocab_size` ids."""
    problems = []
    if tokenizer.vocab_size > model_vocab_size:
        problems.append(
            f"model.tokenizer={tokenizer.directory}: its ids go up to {tokenizer.vocab_size - 1}, "
            f"the model's vocabulary up to {model_vocab_size - 1}; use the tokenizer that belongs "
            "to the model"
        )
    if not tokenizer.eos_ids:
        problems.append(
            f"model.tokenizer={tokenizer.directory}: no end of sequence is named; add eos_token "
            "to tokenizer_config.json"
        )
    if any(eos_id >= tokenizer.vocab_size for eos_id in tokenizer.eos_ids):
        problems.append(
            f"model.tokenizer={tokenizer.directory}: eos ids {tokenizer.eos_ids} go beyond its "
            f"{tokenizer.vocab_size} ids; correct eos_token_id in generation_config.json and "
            "config.json"
        )
    return problems


def make_character_tokenizer(directory: str | Path) -> None:
    """Write a tokenizer of single characters: <pad>, <eos>, newline and all printable ASCII.

    The files are spelt out, not saved by the library, so that no version of it changes a byte.
    """
    specials = ["<pad>", "<eos>"]
    characters = ["\n", *(chr(code) for code in range(ord(" "), ord("~") + 1))]
    vocabulary = {token: index for index, token in enumerate([*specials, *characters])}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special_token(vocabulary[token], token) for token in specials],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        # without a decoder the library puts spaces between tokens
        "decoder": {"type": "Fuse"},
        # a BPE without merges cuts text into characters
        "model": {"type": "BPE", "unk_token": None, "vocab": vocabulary, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "tokenizer.json", tokenizer)
    _write_json(directory / "tokenizer_config.json", config)


def _try_encode(backend: Backend, text: str) -> Encoding | None:
    try:
        return backend.encode(text, add_special_tokens=False)
    except Exception:  # a word-level model raises a bare Exception on a word it does not know
        return None


def _unknown_part(tokenizer: Tokenizer, text: str, encoding: Encoding | None) -> str | None:
    """The first part of `text` that has no token of its own, None if there is none."""
    if encoding is None:
        return _failing_character(tokenizer.backend, text) or text
    spans = zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
    for token_id, token, (start, stop) in spans:
        # the unknown token spelt out in the text is known
        if token_id == tokenizer.unknown_id and text[start:stop] != token:
            return text[start:stop]
    if tokenizer.backend.decode(encoding.ids, skip_special_tokens=False) == text:
        return None
    # the round trip may differ for good reasons (Unicode normal forms), drops are not one
    return _dropped_character(tokenizer.backend, text)


def _failing_character(backend: Backend, text: str) -> str | None:
    """The first character that fails alone and is in no token; the library does not tell."""
    known = set("".join(backend.get_vocab()))
    for character in dict.fromkeys(text):
        if character not in known and _try_encode(backend, character) is None:
            return character
    return None


def _dropped_character(backend: Backend, text: str) -> str | None:
    for character in dict.fromkeys(text):
        alone = _try_encode(backend, character)
        if alone is not None and not alone.ids:
            return character
    return None


def _unknown_id(path: Path, backend: Backend) -> int | None:
    model = _read_json(path)["model"]
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return backend.token_to_id(model["unk_token"]) if model.get("unk_token") else None


def _eos_ids(directory: Path, backend: Backend) -> tuple[int, ...]:
    """The union over the files, each of which may be absent: chat models name a second one."""
    ids: set[int | None] = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(directory / name).get("eos_token_id")
        ids.update(value if isinstance(value, list) else [value])
    path = directory / "tokenizer_config.json"
    token = _read_json(path).get("eos_token")
    token = token["content"] if isinstance(token, dict) else token
    if token is not None and backend.token_to_id(token) is None:
        raise ValueError(f"{path}: eos_token {token!r} is not in tokenizer.json; correct it there")
    ids.add(backend.token_to_id(token) if token is not None else None)
    return tuple(sorted(i for i in ids if i is not None))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it from the model again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: copy it from the model again")
    return value


def _special_token(token_id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": True}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
