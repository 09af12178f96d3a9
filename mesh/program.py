"""The whole program put together: what every recipe starts from.

`check` refuses what cannot run before anything is built; `assemble` builds both roles, the two
crossings between them, and brings the first weights to the generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mesh.checks import check_start, readable_json
from mesh.cli import load_conf
from mesh.conf import Conf, resolve_path
from mesh.exchange import Exchange, Wave
from mesh.generator import Generator
from mesh.invariant.switch import batch_invariant
from mesh.keys import problem, refuse
from mesh.layout import Meshes, build_meshes, plan_layout, resolve_device
from mesh.loss import normaliser
from mesh.model.hf import export
from mesh.model.qwen3 import shape_of_directory, shape_of_flavor
from mesh.process import Process, refuse_to_start, start
from mesh.step import Advantage, Aggregation, Rules
from mesh.tasks import Task, load_task
from mesh.tokenizer import CHARACTERS, Tokenizer, check_vocabulary, load_tokenizer
from mesh.trainer import Start, Trainer
from mesh.types import ModelShape, Prompt
from mesh.weights import Verify, WeightBridge
from mesh.weights import weights_digest as digest_of


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


def read_command(argv: list[str]) -> tuple[str, Conf]:
    """(config name, configuration) of a command line; one that cannot be read ends the process."""
    try:
        return load_conf(argv)
    except ValueError as error:
        refuse_to_start(error)


@contextmanager
def launch(conf: Conf) -> Iterator[Process]:
    """This rank's process for the length of a run, batch-invariant if `conf` asks for it."""
    device = resolve_device(conf)
    with (
        batch_invariant(conf.batch_invariant, device, conf.invariant.chunks),
        start(conf.device, conf.timeout_seconds) as process,
    ):
        yield process


def check(conf: Conf, world_size: int) -> Parts:
    """Read what `conf` names. Raises one ValueError that lists everything that cannot run."""
    shape, wrong = read_shape(conf)
    check_start(conf, world_size, shape, wrong)
    assert shape is not None, "check_start let a directory without config.json through"
    tokenizer = load_tokenizer(tokenizer_directory(conf))
    task = load_task(conf.task, conf.seed, conf.task_args)
    prompts = task.train_prompts(0, conf.num_prompts) + task.eval_prompts(conf.eval.num_prompts)
    too_long = prompt_problems(conf, tokenizer, prompts)
    refuse(check_vocabulary(tokenizer, shape.vocab_size) + too_long)
    return Parts(shape, tokenizer, task)


def read_shape(conf: Conf) -> tuple[ModelShape | None, list[str]]:
    """The model's shape, or None and what is wrong with what names it.

    A config.json that is missing or no JSON is `check_start`'s to report.
    """
    try:
        if conf.model.path is None:
            return shape_of_flavor(conf.model.flavor), []
        directory = resolve_path(conf.model.path)
        if readable_json(directory / "config.json")[1] is not None:
            return None, []
        return shape_of_directory(directory), []
    except ValueError as error:
        return None, [str(error)]


def without_training(conf: Conf) -> Conf:
    """The configuration of a program that only generates: no run directory, one wave."""
    conf.run_dir, conf.waves = None, 1
    return conf


def tokenizer_directory(conf: Conf) -> Path:
    """Where the tokenizer is read from: model.tokenizer, else model.path, else the shipped one."""
    named = conf.model.tokenizer or conf.model.path
    return CHARACTERS if named is None else resolve_path(named)


def prompt_problems(conf: Conf, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[str]:
    """Whether the longest of these prompts leaves no room for a response."""
    room = conf.model.max_length - conf.generator.max_new_tokens
    longest = max(prompts, key=lambda prompt: len(tokenizer.encode(prompt.text)))
    length = len(tokenizer.encode(longest.text))
    if length <= room:
        return []
    wrong = (
        f"the prompt {longest.text[:200]!r} has {length} tokens, which with "
        f"generator.max_new_tokens={conf.generator.max_new_tokens} is longer than the context"
    )
    remedy = f"use at least {length + conf.generator.max_new_tokens}, or shorter prompts"
    return [problem("model.max_length", conf.model.max_length, wrong, remedy)]


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype a configuration asks for; unset: bfloat16 on CUDA, float32 on CPU."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def assemble(conf: Conf, process: Process, parts: Parts, with_optimizer: bool = True) -> Program:
    """Build both roles and sync the first weights. A collective of the world."""
    meshes = build_meshes(plan_layout(conf, process.world_size), process.device.type)
    path = None
    if conf.model.init == "checkpoint":
        assert conf.model.path is not None, "check let init=checkpoint without a path through"
        path = resolve_path(conf.model.path)
    trainer = Trainer(
        conf, meshes, parts.shape, process.device, dtype_of(conf.trainer.dtype, process.device),
        Start(path, conf.seed), with_optimizer,
    )  # fmt: skip
    dtype = dtype_of(conf.generator.dtype, process.device)
    generator = Generator(conf, meshes, parts.shape, process.device, dtype, parts.tokenizer)
    process.closers.append(generator.close)
    exchange = Exchange(meshes.layout, conf.group_size)
    bridge = connect(conf, process, trainer, generator, dtype)
    return Program(meshes, parts, trainer, generator, exchange, bridge)


def connect(
    conf: Conf, process: Process, trainer: Trainer, generator: Generator, dtype: torch.dtype
) -> WeightBridge:
    """The weight bridge; where both roles' layouts and dtypes match, the engine takes the trainer's
    storage instead of its own.
    """
    default: Verify = "first" if resolve_device(conf) == "cuda" else "every"
    assert dist.group.WORLD is not None, "the process group is not there"
    bridge = WeightBridge(
        trainer.weights(),
        generator.weights(),
        trainer.layouts,
        generator.layouts,
        dtype=dtype,
        group=dist.group.WORLD,
        cpu_group=process.cpu_group,
        verify=conf.sync.verify or default,
        bucket_bytes=conf.sync.bucket_mb << 20,
        device=process.device,
    )
    if bridge.aliased:
        generator.bind(bridge.aliases())
        bridge.bind(generator.weights())
    return bridge


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
        conf.model.max_length,
        tokenizer_directory(conf),
        program.parts.tokenizer.eos_ids,
        write=dist.get_rank() == program.meshes.layout.trainer_ranks[0],
    )


def samples_of(
    program: Program, prompts: Sequence[Prompt], waves: Sequence[Wave]
) -> list[dict[str, Any]]:
    """What a person reads of a step: this trainer rank's rollouts as text, with their rewards."""
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    decode = program.parts.tokenizer.decode
    return [
        {
            "prompt_id": r.prompt_id,
            "sample_id": r.sample_id,
            "prompt": by_id[r.prompt_id].text,
            "response": decode(r.tokens),
            "answer": by_id[r.prompt_id].answer,
            "reward": r.reward,
            "finish_reason": r.finish_reason,
        }
        for wave in waves
        for r in wave.rollouts
    ]
