"""Start-up checks: everything that keeps a run from starting, in one list, before it is built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from mesh.config.keys import problem, range_problems, refuse, unset
from mesh.config.schema import Conf, resolve_path
from mesh.engine.kinds import engine_problems, kind_of
from mesh.layout.meshes import layout_problems
from mesh.lifecycle.files import run_dir_problems
from mesh.lifecycle.json_files import read_object
from mesh.model.attention import HEAD_DIMS
from mesh.model.hf import code_problems
from mesh.model.weight_checks import weight_problems
from mesh.program.optimizer_checks import optimizer_problems
from mesh.program.refill_checks import difficulty_problems, refill_problems
from mesh.program.update_checks import update_problems
from mesh.tasks.scorer import reward_problems
from mesh.types import ModelShape

NO_CODE = "code that ships with a model is never run (trust_remote_code): use a model without any"


def check_start(
    conf: Conf,
    device: str,
    world_size: int,
    shape: ModelShape | None,
    found: Sequence[str] = (),
    training: bool = True,
) -> None:
    """Raises one ValueError that lists everything which keeps the run from starting.

    `shape` None leaves out what the model's sizes ask; `found`: problems that are known already;
    device: cpu or cuda, resolved; `training` False leaves out what only training asks. Call it
    before rank 0 writes into `run_dir`, on every rank.
    """
    layout = layout_problems(conf, world_size, shape, training)
    exact = invariant_problems(conf, device, shape) if conf.batch_invariant else []
    refuse([*found, *conf_problems(conf, device, shape, training), *layout, *exact])


def conf_problems(
    conf: Conf, device: str, shape: ModelShape | None = None, training: bool = True
) -> list[str]:
    """Every problem that `conf` has on this machine, whatever the world's size."""
    return [
        *range_problems(conf),
        *device_problems(conf, device),
        *graph_problems(conf, device),
        *length_problems(conf, shape),
        *page_problems(conf, device),
        *reward_problems(conf),
        *engine_problems(conf, shape, device),
        *(training_problems(conf) if training else []),
        *model_problems(conf, shape),
    ]


def training_problems(conf: Conf) -> list[str]:
    """Problems of a program that trains, beyond those of one that only generates."""
    return [
        *strict_problems(conf),
        *truncation_problems(conf),
        *sequence_problems(conf),
        *microbatch_problems(conf),
        *optimizer_problems(conf),
        *update_problems(conf),
        *run_dir_problems(conf),
        *log_problems(conf),
        *refill_problems(conf),
        *difficulty_problems(conf),
    ]


def invariant_problems(conf: Conf, device: str, shape: ModelShape | None) -> list[str]:
    """Settings that cannot be exact: tp beyond the chunks, dtypes that differ, fp32 on a GPU."""
    chunks, found = conf.invariant.chunks, []
    for name, tp in (("trainer.tp", conf.trainer.tp), ("generator.tp", conf.generator.tp)):
        if chunks % tp:
            wrong = f"tp must divide invariant.chunks={chunks}, up to which kernels are tested"
            remedy = f"use a divisor of {chunks}, or set invariant.chunks={tp}"
            found.append(problem(name, tp, wrong, remedy))
    if shape is not None:
        heads = (shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim)
        uneven = [width for width in (*heads, shape.ffn_dim, shape.dim) if width % chunks]
        if uneven:
            wrong = f"does not divide the model's widths {', '.join(map(str, uneven))}"
            found.append(problem("invariant.chunks", chunks, wrong, "use a smaller power of two"))
    on_gpu = gpu_problems(conf, shape) if device == "cuda" else []
    return [*found, *dtype_problems(conf, device), *on_gpu]


def dtype_problems(conf: Conf, device: str) -> list[str]:
    """Roles of different dtypes, whose bits cannot be equal."""
    default = "bfloat16" if device == "cuda" else "float32"
    of_trainer, of_generator = conf.trainer.dtype, conf.generator.dtype
    if (of_trainer or default) == (of_generator or default):
        return []
    remedy = "give both roles one dtype"
    if of_generator is None:
        wrong = f"generator.dtype is {default} where it is unset, so their bits cannot be equal"
        return [problem("trainer.dtype", of_trainer, wrong, remedy)]
    wrong = f"differs from trainer.dtype={of_trainer or default}, so their bits cannot be equal"
    return [problem("generator.dtype", of_generator, wrong, remedy)]


def gpu_problems(conf: Conf, shape: ModelShape | None) -> list[str]:
    """Settings that cannot be exact on a GPU: fp32, no Hopper GPU, head dims without a kernel."""
    found = []
    for role in ("trainer", "generator"):
        if getattr(conf, role).dtype == "float32":
            wrong = "fp32 matrix products on CUDA depend on the batch"
            remedy = "use bfloat16, or device=cpu"
            found.append(problem(f"{role}.dtype", "float32", wrong, remedy))
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        wrong = f"{torch.cuda.get_device_name()} is not a Hopper GPU, which the exact kernels need"
        found.append(
            problem("batch_invariant", "true", wrong, "use an H100 or H200, or device=cpu")
        )
    if shape is not None and shape.head_dim not in HEAD_DIMS:
        wrong = f"the exact attention kernels do not take its heads of {shape.head_dim}"
        remedy = f"use a model with heads of {', '.join(map(str, HEAD_DIMS))}, or device=cpu"
        which = "flavor" if conf.model.path is None else "path"
        found.append(problem(f"model.{which}", getattr(conf.model, which), wrong, remedy))
    return found


def device_problems(conf: Conf, device: str) -> list[str]:
    """CUDA asked for without it, or more processes on this machine than it has GPUs."""
    if conf.device == "cuda" and not torch.cuda.is_available():
        wrong = "torch finds no CUDA device here"
        return [
            problem("device", "cuda", wrong, "set device=cpu, or install a CUDA build of torch")
        ]
    if device == "cpu":
        return []
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if local <= gpus:
        return []
    wrong = f"{local} processes on this machine, which has {gpus} GPUs"
    return [problem("device", conf.device, wrong, f"start at most {gpus}, or set device=cpu")]


def graph_problems(conf: Conf, device: str) -> list[str]:
    """Our attention in fp32 under captured graphs, for which it is not made."""
    captured = device == "cuda" and conf.generator.cuda_graphs
    ours = kind_of(conf).runs_policy
    if conf.generator.dtype != "float32" or not captured or not ours:
        return []
    wrong = "its decode steps cannot be captured as CUDA graphs"
    remedy = "use bfloat16, or set generator.cuda_graphs=false"
    return [problem("generator.dtype", "float32", wrong, remedy)]


def length_problems(conf: Conf, shape: ModelShape | None) -> list[str]:
    """A context that leaves no room for a prompt, or is longer than the model's own."""
    limit, response = conf.model.max_length, conf.generator.max_new_tokens
    found = []
    if shape is not None and limit > shape.max_positions:
        own, entries = shape.max_positions, "max_position_embeddings, or a sliding_window"
        wrong = f"the model's own context is {own} tokens ({entries})"
        found.append(problem("model.max_length", limit, wrong, f"use at most {own}"))
    if response >= limit:
        wrong = f"leaves no room for a prompt in model.max_length={limit}"
        remedy = f"use at most {limit - 1}, or raise model.max_length"
        found.append(problem("generator.max_new_tokens", response, wrong, remedy))
    return found


def strict_problems(conf: Conf) -> list[str]:
    """Equal logprobs asked for without the kernels that give them."""
    if conf.check is None or conf.batch_invariant:
        return []
    wrong = "with ordinary kernels trainer and generator round differently"
    return [problem("check", conf.check, wrong, "set batch_invariant=true, or leave it out")]


def truncation_problems(conf: Conf) -> list[str]:
    """Truncated logprobs without a truncation, or without the equal bits that give both sides the
    same sets."""
    if not conf.truncated_logprobs:
        return []
    found, keys = [], conf.generator
    if keys.top_k == 0 and keys.top_p == 1:
        remedy = "set generator.top_k or generator.top_p, or leave it out"
        found.append(problem("truncated_logprobs", True, "nothing is truncated", remedy))
    if not conf.batch_invariant:
        wrong = (
            "the trainer derives the sets from its own logits, and with ordinary kernels those are "
            "not the generator's: a token that was drawn could lie outside of its set"
        )
        remedy = "set batch_invariant=true, or leave it out"
        if not kind_of(conf).exact:
            remedy = f"{kind_of(conf)} cannot be exact: use engine=native and {remedy}"
        found.append(problem("truncated_logprobs", True, wrong, remedy))
    return found


def sequence_problems(conf: Conf) -> list[str]:
    """Sequence parallelism without the ranks that would share the tokens."""
    if not conf.trainer.sequence_parallel or conf.trainer.tp > 1:
        return []
    wrong = f"trainer.tp={conf.trainer.tp} has no ranks to share the tokens"
    remedy = "set trainer.tp=2 or more, or leave it out"
    return [problem("trainer.sequence_parallel", True, wrong, remedy)]


def microbatch_problems(conf: Conf) -> list[str]:
    """A packed row that is too short for one whole sequence."""
    limit, packed = conf.model.max_length, conf.trainer.microbatch_tokens
    if packed >= limit:
        return []
    wrong = f"one sequence of model.max_length={limit} does not fit"
    remedy = f"use at least {limit}, or lower model.max_length"
    return [problem("trainer.microbatch_tokens", packed, wrong, remedy)]


def log_problems(conf: Conf) -> list[str]:
    """Loggers that are asked for and not installed."""
    log, found = conf.log, []
    asked = {"wandb": log.wandb, "trackio": log.trackio, "tensorboard": log.tensorboard or None}
    for name, value in asked.items():
        if value is not None and find_spec(name) is None:
            off = "set log.tensorboard=false" if value is True else "unset it (null)"
            wrong, remedy = f"{name} is not installed", f"pip install {name}, or {off}"
            found.append(problem(f"log.{name}", value, wrong, remedy))
    return found


def page_problems(conf: Conf, device: str) -> list[str]:
    """A KV cache too small for one whole sequence."""
    found, tokens = [], conf.generator.kv_tokens
    page = max(conf.generator.page_size, 0) or kind_of(conf).pages[device].default
    needed = -(-conf.model.max_length // page) * page
    if tokens > 0 and tokens // page * page < needed:
        wrong = (
            f"in pages of {page} it does not hold one sequence of "
            f"model.max_length={conf.model.max_length}"
        )
        remedy = f"use at least {needed}, or 0 for the default"
        found.append(problem("generator.kv_tokens", tokens, wrong, remedy))
    return found


def model_problems(conf: Conf, shape: ModelShape | None) -> list[str]:
    """Files that `model.path` and `model.tokenizer` lack or that were cut short."""
    model = conf.model
    if model.path is None and model.init == "checkpoint":
        wrong = "there are no weights to start from"
        remedy = "set model.path=DIRECTORY (Hugging Face form), or model.init=random"
        found = [unset("model.path", wrong, remedy)]
    else:
        found = [] if model.path is None else directory_problems(conf, model.path, shape)
    if model.tokenizer is not None:
        path = resolve_path(model.tokenizer)
        remedy = "name a directory that has one, or unset it (null)"
        if not (path / "tokenizer.json").is_file():
            found.append(problem("model.tokenizer", model.tokenizer, "no tokenizer.json", remedy))
        found += [
            problem("model.tokenizer", model.tokenizer, line, NO_CODE)
            for line in code_problems(path)
        ]
    return found


def directory_problems(conf: Conf, name: str, shape: ModelShape | None) -> list[str]:
    """Missing parts of the directory `model.path`, of all that this configuration reads from it.

    A tokenizer.json that is there and cannot be read is `load_tokenizer`'s to report.
    """
    path = resolve_path(name)
    if not path.is_dir():
        remedy = "name a Hugging Face model directory on this machine"
        return [problem("model.path", name, f"no such directory ({path})", remedy)]
    wrong = [(json_problem(path / "config.json"), "copy it from the model's source")]
    wrong += [(line, NO_CODE) for line in code_problems(path)]
    if conf.model.tokenizer is None and not (path / "tokenizer.json").is_file():
        remedy = "copy it there, or set model.tokenizer=DIRECTORY"
        wrong.append(("tokenizer.json is missing", remedy))
    if conf.model.init == "checkpoint":
        remedy = "copy it from the model's source, or set model.init=random"
        found = weight_problems(path, shape, conf.model.ignore_tensors)
        wrong += [(line, remedy) for line in found]
    return [problem("model.path", name, line, remedy) for line, remedy in wrong if line]


def json_problem(path: Path) -> str | None:
    """What keeps a file from being read as a JSON object; None: nothing."""
    try:
        read_object(path)
    except ValueError as error:
        return str(error)
    return None
