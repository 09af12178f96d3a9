"""What a directory's weights must be before they are read: whole, of the model's shapes, in a float
that fp32 holds exactly, and nothing that the model does not ask for.

A tensor that nobody reads is part of another function than ours: the scale of a quantised weight, a
bias, an adapter, a layer too many.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import safe_open

from mesh.lifecycle.heartbeat import heartbeat
from mesh.model.families import global_shapes, hf_names
from mesh.model.safetensors_files import Stored, stored_tensors
from mesh.types import ModelShape

FLOATS = ("F32", "F16", "BF16")
"""Dtypes that are read: their values are exact in the fp32 of the master weights."""

COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Buffers of old checkpoints that `transformers` ignores too: the model computes them."""

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ADAPTER = "adapter_config.json"
COMPARED_BYTES = 1 << 26


def weight_problems(
    path: Path, shape: ModelShape | None, ignored: Sequence[str] = (), role: str = "model"
) -> list[str]:
    """Missing or damaged weight files of a directory; if all are intact, what they hold that a
    model of `shape` cannot take. `shape` None skips the latter.

    ignored: patterns of tensors that are left out on purpose (model.ignore_tensors); role: whose
    keys a message names.
    """
    stored, wrong = stored_tensors(path)
    if wrong or shape is None:
        return wrong
    sizes = global_shapes(shape)
    expected = {name: sizes[ours] for ours, name in hf_names(list(sizes), shape).items()}
    extra = [name for name in stored if name not in expected and not COMPUTED.search(name)]
    extra = [name for name in extra if not any(fnmatchcase(name, one) for one in ignored)]
    copied = shape.tied and HEAD in extra and EMBEDDING in stored
    if copied:
        extra.remove(HEAD)
    found = [*_mismatches(stored, expected), *_unread(stored, extra, role)]
    if copied and not found:
        found += _tied_head(stored, role)
    if (path / ADAPTER).is_file():
        found.append(f"{ADAPTER}: adapters are not applied (merge it into the weights first)")
    return found


def exact_dtype(path: Path, shape: ModelShape) -> torch.dtype:
    """The dtype of exports that holds the weights of a directory: bfloat16 if the model's are all
    of it, else float32.
    """
    stored, _ = stored_tensors(path)
    names = hf_names(list(global_shapes(shape)), shape).values()
    return torch.bfloat16 if all(stored[n].dtype == "BF16" for n in names) else torch.float32


def _mismatches(stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Weights that are missing, or of another shape or dtype than can be read."""
    missing = [name for name in expected if name not in stored]
    held = {name: stored[name] for name in expected if name in stored}
    other = [
        f"{name} {list(tensor.shape)} instead of {list(expected[name])}"
        for name, tensor in held.items()
        if tensor.shape != expected[name]
    ]
    dtypes = [f"{n} {x.dtype} ({x.file.name})" for n, x in held.items() if x.dtype not in FLOATS]
    found = [f"the safetensors files lack {_shortened(missing)}"] if missing else []
    if other:
        found.append(f"shapes that do not match config.json: {_shortened(other)}")
    if dtypes:
        read = ", ".join(FLOATS)
        found.append(f"dtypes that are not read (only {read} are): {_shortened(dtypes)}")
    return found


def _unread(stored: Mapping[str, Stored], extra: Sequence[str], role: str) -> list[str]:
    """Tensors that the model does not ask for."""
    if not extra:
        return []
    named = [f"{name} {stored[name].dtype} {list(stored[name].shape)}" for name in extra]
    return [
        f"tensors that the model of config.json does not have: {_shortened(named)} (if it is the "
        f"same model without them: {role}.ignore_tensors=[{','.join(extra[:4])}], or a pattern)"
    ]


def _tied_head(stored: Mapping[str, Stored], role: str) -> list[str]:
    """A head of its own beside tie_word_embeddings=true. A copy of the embedding is redundant, and
    common; with other values `transformers` 5 does not tie, so the model is another one.
    """
    head, embedding = stored[HEAD], stored[EMBEDDING]
    equal = head.shape == embedding.shape and _equal_rows(head, embedding)
    wrong = f"{HEAD} is not {EMBEDDING}, though config.json has tie_word_embeddings=true"
    remedy = f"correct config.json, or leave the head out: {role}.ignore_tensors=[{HEAD}]"
    return [] if equal else [f"{wrong} ({remedy})"]


def _equal_rows(head: Stored, embedding: Stored) -> bool:
    rows = max(1, COMPARED_BYTES // (4 * max(head.shape[1], 1)))
    with safe_open(head.file, "pt") as one, safe_open(embedding.file, "pt") as other:
        ours, theirs = one.get_slice(HEAD), other.get_slice(EMBEDDING)
        for first in range(0, head.shape[0], rows):
            heartbeat()
            part, other_part = (x[first : first + rows] for x in (ours, theirs))
            if not torch.equal(*_of_one_dtype(part, other_part)):
                return False
    return True


def _of_one_dtype(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    alike = len({x.dtype for x in tensors}) == 1
    return tensors if alike else [x.float() for x in tensors]


def _shortened(items: Sequence[str]) -> str:
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(items[:4]) + more
