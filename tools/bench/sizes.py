"""The size of a step that suits the machine: of the tiny task, or of Qwen3-0.6B on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

TINY = ["conf=qwen3_tiny"]
ON_GPU = [
    *("conf=qwen3", "model.init=random", "generator.max_sequences=512", "num_prompts=64"),
    *("group_size=8", "generator.max_new_tokens=256"),
]


def sized(words: Sequence[str], *more: str) -> list[str]:
    """A recipe's arguments, before them a size, unless they name a `conf`, and these others, unless
    they are given: random weights without a tokenizer want `with_tokenizer`, too."""
    given = {word.partition("=")[0] for word in words}
    size = [] if "conf" in given else ON_GPU if torch.cuda.is_available() else TINY
    return [w for w in (*size, *more) if w.partition("=")[0] not in given] + list(words)
