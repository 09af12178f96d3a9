"""What the files beside a tokenizer and a model say about its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from mesh.lifecycle.json_files import read_object


def unknown_id(path: Path, backend: Backend) -> int | None:
    """The id that a tokenizer.json has for what it does not know."""
    model = read_settings(path)["model"]
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return backend.token_to_id(model["unk_token"]) if model.get("unk_token") else None


def named_eos(directory: Path, backend: Backend, model: Path) -> list[int]:
    """What the files, each of which may be absent, name as the end, in their order."""
    ids: list[int] = []
    names = ("generation_config.json", "config.json")
    for path in (folder / name for folder in (model, directory) for name in names):
        value = read_settings(path).get("eos_token_id")
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(item) is int for item in listed):
            raise ValueError(f"{path}: eos_token_id {value!r} is not an id or a list; correct it")
        ids += listed
    path = directory / "tokenizer_config.json"
    token = read_settings(path).get("eos_token")
    if token is None:
        return ids
    text = token.get("content") if isinstance(token, dict) else token
    token_id = backend.token_to_id(text) if isinstance(text, str) else None
    if token_id is None:
        raise ValueError(f"{path}: eos_token {token!r} is not in tokenizer.json; correct it")
    return [*ids, token_id]


def read_settings(path: Path) -> dict[str, Any]:
    """The entries of a file, none where it does not exist. ValueError naming a damaged one."""
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except ValueError as error:
        raise ValueError(f"{path.parent}/{error}: copy it from the model again") from error
