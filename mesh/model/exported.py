"""The files of a model directory beside its weights: what an export keeps of the directory that a
run started from, and what it removes.

An exported model is the same function in `transformers` as here. So config.json has every entry of
the source's, but for those that were read as if they were not there, and only the end ids and the
dtype are ours. What is read of the source is read at the start: it may be gone at the end.

A directory that is exported into may hold an older model. What is left of that one is read with the
new one: an old shard, an end token, a chat template, an adapter that `transformers` would apply.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mesh.lifecycle.json_files import read_object
from mesh.model.config_entries import FAMILIES, Entries, without
from mesh.model.rope_entries import ROPE_DICTS
from mesh.model.safetensors_files import INDEX, SINGLE
from mesh.text.template import TEMPLATE_FILE, TEMPLATE_FOLDER

COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tekken.json",
    TEMPLATE_FILE,
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
CONFIG, GENERATION = "config.json", "generation_config.json"
OF_A_MODEL = (
    *(GENERATION, CONFIG, *COPIED_FILES),
    *(SINGLE, INDEX),
    *("adapter_config.json", "adapter_model.safetensors", "hf_quant_config.json"),
)
"""Names that belong to a model whoever wrote them; a shard's is the other one."""

SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
DTYPE_ENTRIES = ("dtype", "torch_dtype")
"""Names of the entry for the dtype of the weights: the present one and that of transformers 4."""


@dataclass(frozen=True)
class Export:
    """An exported directory but for its weights' values. config, generation: the entries of the two
    JSON files; files: those that are copied from the directory `tokenizer`; dtype: of the weights.
    """

    config: Entries
    generation: Entries
    dtype: torch.dtype
    files: tuple[str, ...]
    tokenizer: Path = field(repr=False)  # its place may differ between machines


def source_entries(directory: Path, ignored: Collection[str] = ()) -> dict[str, Any]:
    """The entries of a directory's config.json that describe its model as it was read: without the
    `ignored` ones (model.ignore_config).
    """
    read = without(read_object(directory / CONFIG), ignored)
    for name in ROPE_DICTS:
        if name in ignored and name in read:  # what still counts of it, in the other form
            read["rope_theta"] = read.pop(name)["rope_theta"]
    if read.get("architectures") is None:  # vLLM asks for it
        read["architectures"] = [FAMILIES[read["model_type"]].architecture]
    return read


def planned_export(
    config: Entries,
    eos_ids: tuple[int, ...],
    dtype: torch.dtype,
    tokenizer: Path,
    start: Path | None = None,
) -> Export:
    """The export of a model that `config` describes.

    `tokenizer`: the directory whose tokenizer files are copied; `start`: that of the weights which
    training started from, whose generation_config.json counts first, before the tokenizer's.
    """
    ends, name = one_or_list(eos_ids), str(dtype).removeprefix("torch.")
    directories = [tokenizer] if start is None else [tokenizer, start]
    generation = generation_entries([directory / GENERATION for directory in directories])
    named = [entry for entry in DTYPE_ENTRIES if entry in config] or DTYPE_ENTRIES[:1]
    return Export(
        {**config, "eos_token_id": ends, **dict.fromkeys(named, name)},
        {**generation, "eos_token_id": ends},
        dtype,
        tokenizer_files(tokenizer),
        tokenizer,
    )


def tokenizer_files(directory: Path) -> tuple[str, ...]:
    """Paths, within the directory, of the files that belong to its tokenizer and its templates."""
    templates = sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))
    names = [*COPIED_FILES, *(f"{TEMPLATE_FOLDER}/{template.name}" for template in templates)]
    return tuple(name for name in names if (directory / name).is_file())


def write_text_files(path: Path, export: Export) -> None:
    """Write all but the weights. Raises FileNotFoundError for a file that is gone since the
    start."""
    for name in export.files:
        (path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(export.tokenizer / name, path / name)
    for name, entries in ((CONFIG, export.config), (GENERATION, export.generation)):
        (path / name).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


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
    folder = path / TEMPLATE_FOLDER
    if folder.is_symlink():
        folder.unlink()
    for template in folder.glob("*.jinja"):
        template.unlink()
