"""The files of a model directory beside its weights: what an export copies, writes and removes.

A directory that is exported into may hold an older model. What is left of that one is read with the
new one: an old shard, an end token, a chat template, an adapter that `transformers` would apply.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from mesh.lifecycle.json_files import read_object
from mesh.model.safetensors_files import INDEX, SINGLE

COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
GENERATION = "generation_config.json"
OF_A_MODEL = (
    *(GENERATION, "config.json", *COPIED_FILES),
    *(SINGLE, INDEX),
    *("adapter_config.json", "adapter_model.safetensors", "hf_quant_config.json"),
)
"""Names that belong to a model whoever wrote them; a shard's is the other one."""

SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def write_text_files(
    path: Path, tokenizer: Path, model: Path | None, eos_ids: tuple[int, ...]
) -> None:
    """Copy the tokenizer's files, and write generation_config.json with these end ids.

    Its other entries are those of the tokenizer's directory and, first, of `model`, the directory
    whose weights training started from.
    """
    for name in COPIED_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, path / name)
    directories = [tokenizer] if model is None else [tokenizer, model]
    entries = generation_entries([directory / GENERATION for directory in directories])
    entries["eos_token_id"] = one_or_list(eos_ids)
    (path / GENERATION).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def generation_entries(files: Iterable[Path]) -> dict[str, Any]:
    """The entries of those files that exist, a later one's first."""
    found: dict[str, Any] = {}
    for file in files:
        if file.is_file():
            found |= read_object(file)
    return found


def one_or_list(ids: tuple[int, ...]) -> int | list[int]:
    """End ids as the files have them: a list unless there is one."""
    return ids[0] if len(ids) == 1 else list(ids)


def remove_older_model(path: Path, kept: Collection[str]) -> None:
    """Remove what an older model left, but for the names in `kept`; no file of another name."""
    for file in path.iterdir():
        of_a_model = file.name in OF_A_MODEL or SHARD.fullmatch(file.name)
        if of_a_model and file.name not in kept and not file.is_dir():
            file.unlink()
