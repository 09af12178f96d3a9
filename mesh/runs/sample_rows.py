"""The line of `samples.jsonl.gz` that a record becomes: with the texts of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mesh.rl.samples import Record
from mesh.tasks.transcript import turn_texts
from mesh.text.pieces import token_texts
from mesh.text.tokenizer import Tokenizer
from mesh.types import Rollout, Turn

EXACT = ("logprobs", "logprob_diffs", "token_advantages")
TOKENS = ("prompt_tokens", "tokens", "token_texts", *EXACT, "entropies")
"""Fields that are null with `log.tokens=false`."""

FIELDS = (
    *("split", "set", "chosen", "prompt_id", "sample_id", "prompt", "messages", "prompt_text"),
    *("response", "turns", "answer", "reward", "parts", "correct", "advantage", "finish_reason"),
    *("left_out", "task_prompt_id", "length", *TOKENS),
)
"""The fields of a line beside its step, all of them in every line; null: it has none. With lines of
different fields `datasets` could not load the file."""


def row_of(tokenizer: Tokenizer, with_tokens: bool, record: Record) -> Record:
    """The line of a record. Numbers of float32 have as many digits as tell them from others."""
    if "response" in record:
        return record  # of a step that an older version has trained and not logged
    known = record | {"prompt_text": tokenizer.decode(record["prompt_tokens"])}
    known |= {"turns": None, **said(tokenizer, record)}
    if with_tokens:
        known["token_texts"] = token_texts(tokenizer.decode, record["tokens"])
        known |= {name: shortest(record[name]) for name in EXACT if name in record}
        if "entropies" in record:
            known["entropies"] = [round(x, 4) for x in record["entropies"]]
    else:
        known |= dict.fromkeys(TOKENS)
    return {name: known.get(name) for name in FIELDS}


def said(tokenizer: Tokenizer, record: Record) -> dict[str, Any]:
    """`response`, as it was scored, and the turns of a conversation."""
    turns = tuple(Turn(*turn) for turn in record.get("turns", ()))
    rollout = Rollout(
        record["prompt_id"], record["sample_id"], (), tuple(record["tokens"]), (), 0.0,
        record["finish_reason"], turns,
    )  # fmt: skip
    if not turns:
        return {"response": tokenizer.response(rollout)}
    texts = [turn.text for turn in turn_texts(tokenizer, rollout)]
    listed = [
        {"text": text, "sampled": turn.sampled, "num_tokens": turn.num_tokens}
        for text, turn in zip(texts, turns, strict=True)
    ]
    return {"response": texts[-1], "turns": listed}


def shortest(numbers: Sequence[float]) -> list[float]:
    """The float32 numbers as the decimals that are the shortest to have their bits."""
    return [float(text) for text in np.asarray(numbers, dtype=np.float32).astype("U")]
