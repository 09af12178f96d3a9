"""The teacher of a run: its shape, and what keeps its directory from being one.

A teacher may be of another family and size. It has the tokens of the run, id by id; a vocabulary
that is padded otherwise is cut or padded to the policy's, since ids without a token have
probability 0 on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from mesh.config.keys import problem
from mesh.config.schema import Conf, resolve_path
from mesh.layout.sizes import uneven_parts
from mesh.model.attention import HEAD_DIMS
from mesh.model.families import shape_of_directory
from mesh.model.hf import code_problems
from mesh.model.weight_checks import weight_problems
from mesh.rl.objective import Objective
from mesh.roles.trainer_settings import REFERENCE, TEACHER, ModelSource, Start
from mesh.text.files import named_eos
from mesh.text.tokenizer import Tokenizer
from mesh.text.vocabulary import read_backend, token_difference
from mesh.types import ModelShape

COPY = "copy it from the model's source"


def read_teacher(
    conf: Conf, device: str, policy: ModelShape | None, tokenizer: Tokenizer | None
) -> ModelShape | None:
    """The shape in teacher.path; None: there is no teacher. ValueError, a line for each problem of
    its directory. policy, tokenizer: of the run; None: they cannot be read.
    """
    if conf.teacher.path is None:
        return None
    path, name = resolve_path(conf.teacher.path), conf.teacher.path
    if not path.is_dir():
        remedy = "name a Hugging Face model directory on this machine"
        raise ValueError(problem("teacher.path", name, f"no such directory ({path})", remedy))
    keys = conf.teacher
    shape = shape_of_directory(path, keys.ignore_config, "teacher")
    found = [(x, COPY) for x in weight_problems(path, shape, keys.ignore_tensors, "teacher")]
    found += [(line, "use a model without any code") for line in code_problems(path)]
    found += vocabulary_problems(path, tokenizer)
    if policy is not None:
        found += fit_problems(conf, device, shape_beside(shape, policy), shape)
    if found:
        raise ValueError("\n".join(problem("teacher.path", name, *one) for one in found))
    return shape


def vocabulary_problems(path: Path, tokenizer: Tokenizer | None) -> list[tuple[str, str]]:
    """Tokens that are others than the run's, each with a remedy."""
    try:
        theirs = read_backend(path)
    except ValueError as error:
        return [(str(error), COPY)]
    different = None if tokenizer is None else token_difference(tokenizer.backend, theirs)
    if different is None:
        return []
    wrong = f"{different}: it would be asked about other tokens than those that were drawn"
    return [(wrong, "use a teacher of the run's vocabulary")]


def fit_problems(
    conf: Conf, device: str, shape: ModelShape, stored: ModelShape
) -> list[tuple[str, str]]:
    """What keeps a model of this shape from running beside the policy, each with a remedy."""
    found, other = [], "use another teacher"
    if conf.model.max_length > stored.max_positions:
        wrong = f"its context is {stored.max_positions} tokens, model.max_length is "
        remedy = f"lower that to {stored.max_positions}, or {other}"
        found.append((f"{wrong}{conf.model.max_length}", remedy))
    if uneven := uneven_parts(conf.trainer.tp, shape):
        wrong = f"trainer.tp={conf.trainer.tp} does not divide its {', '.join(uneven)}"
        found.append((wrong, f"lower trainer.tp, or {other}"))
    if not conf.batch_invariant:
        return found
    chunks = conf.invariant.chunks
    heads = (shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim)
    uneven = [str(width) for width in (*heads, shape.ffn_dim, shape.dim) if width % chunks]
    if uneven:
        wrong = f"invariant.chunks={chunks} does not divide its widths {', '.join(uneven)}"
        found.append((wrong, f"use a smaller power of two, or {other}"))
    if device == "cuda" and shape.head_dim not in HEAD_DIMS:
        dims = ", ".join(map(str, HEAD_DIMS))
        wrong = f"the exact attention kernels do not take its heads of {shape.head_dim}"
        found.append((wrong, f"use one with heads of {dims}"))
    return found


def shape_beside(teacher: ModelShape, policy: ModelShape) -> ModelShape:
    """The teacher's shape with the policy's vocabulary, whose ids without a token are masked."""
    pad = teacher.pad_id
    return replace(
        teacher,
        vocab_size=policy.vocab_size,
        textless=policy.textless,
        pad_id=None if pad is None or pad >= policy.vocab_size else pad,
    )


def frozen_models(
    conf: Conf,
    policy: ModelShape,
    start: Start,
    teacher: ModelShape | None,
    objective: Objective,
    dtype: torch.dtype,
) -> Mapping[str, ModelSource]:
    """The models that are scored beside the policy, by name. teacher: as its directory has it.

    The reference is kept in fp32, as the policy is; a teacher in the dtype of the computation, to
    which it would be rounded anyway.
    """
    models = {}
    if "reference_logprobs" in objective.needs:
        models[REFERENCE] = ModelSource(policy, start)
    if teacher is not None:
        assert conf.teacher.path is not None, "a teacher without a directory"
        source = Start(resolve_path(conf.teacher.path), 0)
        beside = shape_beside(teacher, policy)
        models[TEACHER] = ModelSource(beside, source, dtype, teacher.vocab_size)
    return models


def teacher_warnings(conf: Conf, tokenizer: Tokenizer) -> list[str]:
    """A teacher that ends its answers with other tokens than the run does."""
    if conf.teacher.path is None:
        return []
    path = resolve_path(conf.teacher.path)
    theirs = named_eos(path, read_backend(path), path)
    if not theirs or set(theirs) & set(tokenizer.eos_ids):
        return []
    ours, other = (
        ", ".join(repr(tokenizer.backend.id_to_token(i)) for i in ids)
        for ids in (tokenizer.eos_ids, theirs)
    )
    return [
        f"warning: teacher.path={conf.teacher.path}: it ends an answer with {other}, the run with "
        f"{ours}: where a response ends, the teacher may give that little probability"
    ]
