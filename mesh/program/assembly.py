"""The whole program put together: what every recipe starts from.

`check` refuses what cannot run before anything is built; `assemble` builds both roles, the two
crossings between them, and brings the first weights to the generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mesh.config.keys import Refusal
from mesh.config.loading import load_conf
from mesh.config.schema import Conf, resolve_path
from mesh.exchange.rollouts import Exchange
from mesh.invariant.switch import batch_invariant
from mesh.layout.meshes import Meshes, build_meshes, plan_layout, resolve_device
from mesh.lifecycle.process import Process, refuse_to_start, start
from mesh.model.families import shape_of_directory, shape_of_flavor
from mesh.model.hf import export
from mesh.model.products import self_test_of
from mesh.program.checks import check_start, prompt_problems, readable_json
from mesh.program.connect import connect
from mesh.rl.losses import normaliser
from mesh.rl.step import Advantage, Aggregation, Rules
from mesh.roles.evaluation import held_out_prompts
from mesh.roles.generator import Generator
from mesh.roles.trainer import Start, Trainer
from mesh.tasks import Task, drawn
from mesh.tasks.scorer import checked_task
from mesh.text.tokenizer import CHARACTERS, Tokenizer, check_vocabulary, load_tokenizer
from mesh.types import ModelShape, Prompt
from mesh.weights.bridge import WeightBridge
from mesh.weights.bridge import weights_digest as digest_of

T = TypeVar("T")


@dataclass(frozen=True)
class Parts:
    """What a configuration names, read and checked but not built."""

    shape: ModelShape
    tokenizer: Tokenizer
    task: Task


@dataclass(frozen=True)
class Program:
    """Both roles and the two crossings between them, on this rank."""

    meshes: Meshes
    parts: Parts
    trainer: Trainer
    generator: Generator
    exchange: Exchange
    bridge: WeightBridge


def read_command(argv: list[str], resumes: bool = False) -> tuple[str, Conf]:
    """(config name, configuration) of a command line; one that cannot be read ends the process."""
    try:
        return load_conf(argv, resumes)
    except Refusal as refusal:
        refuse_to_start(refusal)


@contextmanager
def launch(conf: Conf) -> Iterator[Process]:
    """This rank's process for the length of a run, batch-invariant if `conf` asks for it."""
    device = resolve_device(conf)
    with (
        batch_invariant(conf.batch_invariant, device, conf.invariant.chunks),
        start(conf.device, conf.timeout_seconds, conf.stall_seconds) as process,
    ):
        yield process


def check(conf: Conf, world_size: int, training: bool = True, held_out: bool = True) -> Parts:
    """Read what `conf` names. Raises one ValueError that lists everything that cannot run.

    `training` False leaves out what only training asks, `held_out` False the task's held-out
    prompts: for a program that asks others.
    """
    wrong: list[str] = []
    shape = attempt(wrong, read_shape, conf)
    tokenizer = attempt(wrong, read_tokenizer, conf)
    task = attempt(wrong, checked_task, conf, training or held_out)
    prompts: list[Prompt] = []
    if task is not None and training:
        prompts += attempt(wrong, train_prompts, conf, task) or []
    if task is not None and held_out:
        prompts += attempt(wrong, held_out_prompts, conf, task) or []
    if tokenizer is not None:
        wrong += attempt(wrong, prompt_problems, conf, tokenizer, prompts) or []
        wrong += check_vocabulary(tokenizer, shape.vocab_size) if shape is not None else []
    check_start(conf, world_size, shape, wrong, training)
    assert shape is not None and tokenizer is not None, "check_start let a missing file through"
    assert task is not None, "a task that cannot be loaded was not listed"
    return Parts(shape, tokenizer, task)


def attempt(wrong: list[str], read: Callable[..., T], *args: Any) -> T | None:
    """What `read` gives; None where it raises ValueError, whose lines are added to `wrong`."""
    try:
        return read(*args)
    except ValueError as error:
        wrong += str(error).splitlines() or [repr(error)]
        return None


def read_shape(conf: Conf) -> ModelShape | None:
    """The model's shape; ValueError where what names it describes none that we can run.

    None: config.json is missing or no JSON, which is `check_start`'s to report.
    """
    if conf.model.path is None:
        return shape_of_flavor(conf.model.flavor)
    directory = resolve_path(conf.model.path)
    if readable_json(directory / "config.json")[1] is not None:
        return None
    return shape_of_directory(directory)


def read_tokenizer(conf: Conf) -> Tokenizer | None:
    """The tokenizer; ValueError where its files are damaged.

    None: tokenizer.json is missing, or the model's config.json, which may name end tokens, is not
    what it should be; both are reported elsewhere.
    """
    directory = tokenizer_directory(conf)
    config = directory / "config.json"
    of_model = conf.model.tokenizer is None and config.is_file()
    if of_model and not isinstance(readable_json(config)[0], dict):
        return None
    return load_tokenizer(directory) if (directory / "tokenizer.json").is_file() else None


def train_prompts(conf: Conf, task: Task) -> list[Prompt]:
    """The first step's prompts."""
    return drawn(task.train_prompts(0, conf.num_prompts), conf.num_prompts, "train_prompts")


def without_training(conf: Conf) -> Conf:
    """The configuration of a program that only generates: no run directory, one wave."""
    conf.run_dir, conf.waves = None, 1
    return conf


def tokenizer_directory(conf: Conf) -> Path:
    """Where the tokenizer is read from: model.tokenizer, else model.path, else the shipped one."""
    named = conf.model.tokenizer or conf.model.path
    return CHARACTERS if named is None else resolve_path(named)


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype a configuration asks for; unset: bfloat16 on CUDA, float32 on CPU."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def assemble(
    conf: Conf,
    process: Process,
    parts: Parts,
    with_optimizer: bool = True,
    self_test: bool = True,
) -> Program:
    """Build both roles and sync the first weights. A collective of the world.

    self_test: of the batch-invariant kernels, which one a process is enough of.
    """
    if conf.batch_invariant and self_test:
        dtype = dtype_of(conf.trainer.dtype, process.device)
        pieces = conf.invariant.chunks
        process.say(self_test_of(parts.shape, pieces, dtype, process.device, process.cpu_group))
    timeout = timedelta(seconds=conf.timeout_seconds)
    layout = plan_layout(conf, process.world_size)
    meshes = build_meshes(layout, process.device.type, timeout)
    path = None
    if conf.model.init == "checkpoint":
        assert conf.model.path is not None, "check let init=checkpoint without a path through"
        path = resolve_path(conf.model.path)
    trainer = Trainer(
        conf, meshes, parts.shape, process.device, dtype_of(conf.trainer.dtype, process.device),
        Start(path, conf.seed), with_optimizer, process.guard.run_dir,
    )  # fmt: skip
    dtype = dtype_of(conf.generator.dtype, process.device)
    generator = Generator(conf, meshes, parts.shape, process.device, dtype, parts.tokenizer)
    process.closers.append(generator.close)
    exchange = Exchange(layout, conf.group_size, timeout)
    bridge = connect(conf, process, trainer, generator, dtype)
    return Program(meshes, parts, trainer, generator, exchange, bridge)


def sync(program: Program) -> float:
    """The trainer's weights become the generator's, and what was cached is dropped. Seconds."""
    report = program.bridge.sync()
    program.generator.reset(report.version)
    return report.seconds


def weights_digest(program: Program) -> str:
    """One number of all master weights, the same on any mesh and on every rank. Collective."""
    trainer = program.trainer
    names = trainer.weight_names
    layouts = [layout for layout in trainer.layouts if layout.name in names]
    return digest_of(trainer.parameters(), layouts, program.bridge.cpu_group)


def rules_of(conf: Conf) -> Rules:
    """The loss preset with what the configuration says otherwise.

    grpo: arXiv:2402.03300; dr_grpo: arXiv:2503.20783.
    """
    presets: dict[str, tuple[Advantage, Aggregation]] = {
        "grpo": ("std", "sequence"),
        "dr_grpo": ("centred", "constant"),
    }
    advantage, aggregation = presets[conf.loss]
    return Rules(
        conf.group_size,
        conf.advantage or advantage,
        conf.aggregation or aggregation,
        conf.drop_equal_groups,
        conf.trainer.microbatch_tokens,
    )


def step_normaliser(conf: Conf, rules: Rules, tokens: int, sequences: int) -> float:
    """What a step's gradient is divided by; the constant length is the longest response."""
    return normaliser(tokens, sequences, rules.aggregation, conf.generator.max_new_tokens)


def save_model(conf: Conf, program: Program, path: Path) -> None:
    """Export the trainer's weights as a Hugging Face directory. A collective of the trainer."""
    trainer = program.trainer
    if trainer.model is None:
        return
    export(
        path,
        trainer.parameters(),
        program.parts.shape,
        tokenizer_directory(conf),
        program.parts.tokenizer.eos_ids,
        write=dist.get_rank() == program.meshes.layout.trainer_ranks[0],
    )
