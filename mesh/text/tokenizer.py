"""Text to token ids and back, from a Hugging Face `tokenizer.json`.

A thin noun over the `tokenizers` library, which gives the same ids as `transformers` without
loading it. Text that the tokenizer cannot represent is an error here: most tokenizers drop such
characters silently, and a model would be trained on a different question from the one it is scored
on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from mesh.text.files import named_eos, read_settings, unknown_id
from mesh.text.template import ChatTemplate, read_template, special_tokens
from mesh.text.turn import turn_end
from mesh.types import Completion, IdSpans, Rollout

CHARACTERS = Path(__file__).resolve().parents[1] / "data" / "characters"
"""The tokenizer that ships with the package; `make_character_tokenizer` writes it."""

OTHER_TOKENIZER = "set model.tokenizer to one that can"

CACHED_WORDS = 4096  # of the 10,000 that the library keeps for ever, 300 bytes each


class Unencodable(ValueError):
    """A prompt without tokens for it. wrong: the message without a remedy."""

    def __init__(self, wrong: str, remedy: str) -> None:
        super().__init__(f"{wrong}: {remedy}")
        self.wrong, self.remedy = wrong, remedy


class UnknownText(Unencodable):
    """A text with a part that the tokenizer does not know."""

    def __init__(self, wrong: str) -> None:
        super().__init__(wrong, f"change the text, or {OTHER_TOKENIZER}")


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer.

    `eos_ids` end a response: all those named in the files of its directory and of the model's. The
    first is the one to teach: with what the chat template ends an assistant's turn, else the first
    that generation_config.json names. `template`: of chats, if there is one;
    `template_problem`: why it could not be read, or rendered for a question and its answer.
    """

    directory: Path
    backend: Backend
    eos_ids: tuple[int, ...]
    unknown_id: int | None
    template_problem: str = ""
    template: ChatTemplate | None = None
    bos_id: int | None = None

    @property
    def vocab_size(self) -> int:
        """Largest id + 1; a model's vocabulary may be padded beyond it."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def has(self, token_id: int) -> bool:
        """True if the id has a token, an added or special one too: ids may have holes."""
        return 0 <= token_id < 1 << 32 and self.backend.id_to_token(token_id) is not None

    @property
    def beginning(self) -> tuple[int, ...]:
        """Tokens that the tokenizer's own rule, the post-processor of tokenizer.json, puts in front
        of a text: as in `transformers`, whatever add_bos_token says, which is for slow tokenizers.
        """
        for text in ("a", "1"):
            plain = self.backend.encode(text, add_special_tokens=False).ids
            whole = self.backend.encode(text, add_special_tokens=True).ids
            for start in range(len(whole) - len(plain) + 1) if plain else ():
                if whole[start : start + len(plain)] == plain:
                    return tuple(whole[:start])
        return ()

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens. Raises UnknownText naming what it cannot encode."""
        encoding = _try_encode(self.backend, text)
        unknown = _unknown_part(self, text, encoding)
        if unknown is not None or encoding is None:
            raise UnknownText(
                f"the tokenizer in {self.directory} cannot encode {unknown!r} in {text!r}"
            )
        return encoding.ids

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """Text of the ids. A special token is its own text; an id without a token is left out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def response(self, answer: Completion | Rollout) -> str:
        """The text that is scored, logged and shown: all tokens but the stop token that ended it.

        Special tokens stay, since they are trained on; a stop token goes, special or not. A stop
        string stays, with what its last token holds beside it.
        """
        return self.decode(self._before_stop(answer))

    def texts(self, answer: Completion | Rollout) -> tuple[str, str]:
        """`response`, and the same without special tokens; decoded once where there are none."""
        ids = self._before_stop(answer)
        text = self.decode(ids)
        return text, text if self._special.isdisjoint(ids) else self.backend.decode(list(ids))

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder().items()
        return frozenset(token_id for token_id, token in added if token.special)

    def _before_stop(self, answer: Completion | Rollout) -> tuple[int, ...]:
        stopped = answer.finish_reason == "stop" and answer.tokens[-1] in self.eos_ids
        return answer.tokens[:-1] if stopped else answer.tokens


def load_tokenizer(directory: str | Path, model: Path | None = None) -> Tokenizer:
    """Load the tokenizer of a Hugging Face directory. Raises ValueError naming the faulty file.

    model: the directory of the weights, whose end tokens count too, before the tokenizer's own.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: set model.tokenizer (or model.path) to a directory with "
            "tokenizer.json, or leave both unset to use the built-in character tokenizer"
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{path} is not a tokenizer ({error}): copy the file from the model again"
        ) from error
    # a file may contain truncation and padding settings of some earlier training run
    backend.no_truncation()
    backend.no_padding()
    if hasattr(backend.model, "_resize_cache"):
        backend.model._resize_cache(CACHED_WORDS)
    named = named_eos(directory, backend, model or directory)
    settings = read_settings(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # of older versions of transformers, as it reads it
        settings |= read_settings(directory / "special_tokens_map.json")
    first, problem, template = [], "", None
    try:
        template = read_template(directory, settings)
        end = turn_end(template, backend, named)
        first = [] if end is None else [end]
    except ValueError as error:  # whoever needs the end of a turn reports it
        problem = str(error)
    eos_ids = tuple(dict.fromkeys([*first, *named]))
    bos = special_tokens(settings).get("bos_token")
    return Tokenizer(
        directory, backend, eos_ids, unknown_id(path, backend), problem, template,
        None if bos is None else backend.token_to_id(bos),
    )  # fmt: skip


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> list[str]:
    """List the mismatches between a tokenizer and a model of `model_vocab_size` ids."""
    problems = []
    if tokenizer.vocab_size > model_vocab_size:
        problems.append(
            f"model.tokenizer={tokenizer.directory}: its ids go up to {tokenizer.vocab_size - 1}, "
            f"the model's vocabulary up to {model_vocab_size - 1}; use the model's own tokenizer"
        )
    if not tokenizer.eos_ids:
        problems.append(
            f"model.tokenizer={tokenizer.directory}: has no end-of-sequence token; add "
            "eos_token to tokenizer_config.json"
        )
    size = tokenizer.vocab_size
    without = [str(i) for i in tokenizer.eos_ids if i >= size or not tokenizer.has(i)]
    if without:
        problems.append(
            f"model.tokenizer={tokenizer.directory}: eos ids {', '.join(without)} have "
            "no token in it, so that no response could end with them; correct eos_token_id in "
            "generation_config.json and config.json, or use the model's own tokenizer"
        )
    return problems


def textless_ids(tokenizer: Tokenizer, model_vocab_size: int) -> IdSpans:
    """Ids of a model without a token: the rows that pad its vocabulary, and holes."""
    known = [token_id for token_id in range(model_vocab_size) if tokenizer.has(token_id)]
    gaps = pairwise([-1, *known, model_vocab_size])
    return tuple((before + 1, after) for before, after in gaps if before + 1 < after)


def make_character_tokenizer(directory: str | Path) -> None:
    """Write a character tokenizer: <pad>, <eos>, newline and all printable ASCII.

    The files are not saved by the library, so no version of it changes a byte of them.
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
    """First part of `text` without a token of its own, or None."""
    if encoding is None:
        return _failing_character(tokenizer.backend, text) or text
    spans = zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
    for token_id, token, (start, stop) in spans:
        # the unknown token written out in the text is valid
        if token_id == tokenizer.unknown_id and text[start:stop] != token:
            return text[start:stop]
    if tokenizer.backend.decode(encoding.ids, skip_special_tokens=False) == text:
        return None
    # a round trip may differ legitimately (Unicode normal forms), but not by a lost character
    return _dropped_character(tokenizer.backend, text)


def _failing_character(backend: Backend, text: str) -> str | None:
    """First character that fails alone and is in no token; the library does not report it."""
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


def _special_token(token_id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": True}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
