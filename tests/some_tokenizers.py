"""Tokenizers of the kinds that models have, trained on a few sentences in a moment."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from mesh.text.tokenizer import CHARACTERS, Tokenizer, load_tokenizer

SENTENCES = [
    "The answer is 12*7 = 84, and <calc>12*7</calc> gives it.\n\nQuestion: what is the answer?\n",
    "Größe, naïve café, 中文 and emoji 🙂 in a text; a tool, a turn, a token.",
    "the theory of these things is that they are there\n  indented code: x = {'a': 1}\n",
] * 3
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
KINDS = ("characters", "byte-level", "sentencepiece", "word pieces")


def byte_level() -> Backend:
    """As GPT-2, Llama 3 and Qwen: every byte is a character of the vocabulary."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def sentencepiece() -> Backend:
    """As Llama 2 and Mistral: a space in front of the first word, bytes for what is not known."""
    trained = Backend(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    trained.train_from_iterator([f" {text}" for text in SENTENCES], trainer)
    learnt = json.loads(trained.to_str())["model"]
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in learnt["merges"]]
    backend = Backend(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIALS]
    )
    return backend


def word_pieces() -> Backend:
    """As BERT: words and their continuations, joined with spaces, which a decoder cleans up."""
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=SPECIALS, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


MADE = {"byte-level": byte_level, "sentencepiece": sentencepiece, "word pieces": word_pieces}


def starting(backend: Backend) -> Backend:
    """With the rule that a text begins with <s>."""
    begin = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[begin]
    )
    return backend


def write(backend: Backend, path: Path, **settings: object) -> Path:
    """A directory of a tokenizer. settings: of tokenizer_config.json, over the usual ones."""
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return path


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "characters":
        return load_tokenizer(CHARACTERS)
    return load_tokenizer(write(MADE[kind](), Path(mkdtemp(prefix="mesh-tokenizer-"))))
