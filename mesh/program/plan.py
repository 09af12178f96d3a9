"""The plan: a resolved configuration, from which the program is built.

`resolve` is called once, after everything that could be wrong has been refused. What it decides -
device, dtypes, layout, engine sizes, loss, which syncs are verified - is decided nowhere else, and
every constructor takes the part that it uses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from mesh.config.evaluation_sets import ks_of
from mesh.config.schema import Conf, resolve_path
from mesh.engine.kinds import kind_of
from mesh.engine.settings import engine_settings
from mesh.layout.meetings import Meetings, meetings_of
from mesh.layout.meshes import Layout, plan_layout
from mesh.model.exported import Export, planned_export, source_entries
from mesh.model.families import config_entries
from mesh.model.weight_checks import exact_dtype
from mesh.program.encoding import prompt_encoder, tokenizer_directory, tokenizer_files, turn_ends
from mesh.program.limits import limits_of
from mesh.program.loss import run_objective
from mesh.program.teacher import frozen_models
from mesh.rl.losses import Loss
from mesh.rl.objective import Objective
from mesh.rl.samples import fixed_prompts
from mesh.rl.step import StepSettings
from mesh.roles.evaluation import EvaluationSet
from mesh.roles.generator import GeneratorSettings
from mesh.roles.optimizer import OptimizerSettings
from mesh.roles.trainer_settings import Start, TrainerSettings
from mesh.tasks import Task, TaskSpec
from mesh.tasks.calls import TaskSource
from mesh.tasks.difficulty import Bounds
from mesh.tasks.held_out import HeldOut
from mesh.tasks.prompts import PromptSource
from mesh.tasks.scorer import scoring_of
from mesh.text.encoding import PromptEncoder
from mesh.text.stopping import StopStrings
from mesh.text.tokenizer import Tokenizer, textless_ids
from mesh.types import ModelShape, Prompt
from mesh.weights.bridge import Verify

Device = Literal["cpu", "cuda"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Found:
    """The things that a configuration names, read and checked. held_out: of the task, sets: other
    ones by name; none where nothing is evaluated. teacher: as its directory has it; None: there is
    none."""

    shape: ModelShape
    tokenizer: Tokenizer
    task: Task
    loss: Loss
    held_out: Sequence[Prompt] = ()
    sets: Mapping[str, EvaluationSet] = field(default_factory=dict)
    teacher: ModelShape | None = None


@dataclass(frozen=True)
class Plan:
    """One run, resolved. evaluations: sets of held-out prompts by name; "" is the task's own.

    chunks: tensor-parallel degrees that the self-test of the batch-invariant kernels covers; None:
    ordinary kernels.
    """

    device: Device
    layout: Layout
    trainer: TrainerSettings
    generator: GeneratorSettings
    objective: Objective
    step: StepSettings
    difficulty: Bounds | None
    training: TaskSource
    prompts: PromptSource
    evaluations: Mapping[str, EvaluationSet]
    tokenizer: Tokenizer
    export: Export
    verify: Verify
    bucket_bytes: int
    timeout_seconds: int
    chunks: int | None
    strict: bool

    @property
    def shape(self) -> ModelShape:
        return self.trainer.shape

    @property
    def meetings(self) -> Meetings:
        """Who waits for whom in the phases of a step."""
        return meetings_of(self.layout)

    @property
    def task(self) -> Task:
        """The task that is trained on."""
        return self.training.task

    @property
    def encoder(self) -> PromptEncoder:
        """Encodes prompts, in the form that the run gives them."""
        return self.prompts.encoder


def resolve(
    conf: Conf, found: Found, world_size: int, device: Device, training: bool = True
) -> Plan:
    """The plan of a validated configuration. training: False for programs that
    only generate: there is neither optimizer nor reference."""
    kind, layout = kind_of(conf), plan_layout(conf, world_size)
    textless = textless_ids(found.tokenizer, found.shape.vocab_size)
    shape = replace(found.shape, textless=textless)
    objective, encoder = run_objective(conf, found.loss), prompt_encoder(conf, found.tokenizer)
    source = TaskSource(found.task, task_spec(conf), scoring_of(conf))
    evaluations = {**evaluation_sets(conf, source, found.held_out), **found.sets}
    held_out = [prompt for one in evaluations.values() for prompt in one.prompts]
    ends = turn_ends(conf, found.task)
    return Plan(
        device=device,
        layout=layout,
        trainer=trainer_settings(
            conf, shape, device, objective if training else None, found.teacher
        ),
        generator=generator_settings(conf, shape, found.tokenizer, device, ends),
        objective=objective,
        step=StepSettings(
            conf.num_prompts, conf.group_size, conf.waves, conf.drop_equal_groups,
            conf.trainer.microbatch_tokens, conf.truncated == "mask", conf.truncated_reward,
            conf.log.tokens, conf.updates_per_step,
            math.inf if conf.kl_stop is None else conf.kl_stop, conf.seed, conf.refill_rounds,
            conf.refill_on, conf.log.samples,
        ),
        difficulty=difficulty_bounds(conf),
        training=source,
        prompts=prompt_source(conf, found.task, encoder, found.shape, held_out),
        evaluations=evaluations,
        tokenizer=found.tokenizer,
        export=export_plan(conf, found.shape, found.tokenizer),
        verify=conf.sync.verify or kind.verify[device],
        bucket_bytes=conf.sync.bucket_mb << 20,
        timeout_seconds=conf.timeout_seconds,
        chunks=conf.invariant.chunks if conf.batch_invariant else None,
        strict=conf.check == "strict",
    )  # fmt: skip


def trainer_settings(
    conf: Conf,
    shape: ModelShape,
    device: Device,
    objective: Objective | None,
    teacher: ModelShape | None = None,
) -> TrainerSettings:
    """The trainer's part; objective None: nothing is trained. teacher: as its directory has it."""
    keys, start = conf.trainer, Start(start_path(conf), conf.seed)
    dtype = dtype_of(keys.dtype, device)
    return TrainerSettings(
        shape=shape,
        max_length=conf.model.max_length,
        dtype=dtype,
        start=start,
        temperature=conf.generator.temperature,
        optimizer=None if objective is None else optimizer_settings(conf),
        frozen={}
        if objective is None
        else frozen_models(conf, shape, start, teacher, objective, dtype),
        sequence_parallel=keys.sequence_parallel,
        activation_checkpointing=keys.activation_checkpointing,
        on_nonfinite=conf.on_nonfinite,
        top_k=conf.generator.top_k if conf.truncated_logprobs else 0,
        top_p=conf.generator.top_p if conf.truncated_logprobs else 1.0,
    )


def optimizer_settings(conf: Conf) -> OptimizerSettings:
    """The optimizer's part; its schedule is over the steps of the run."""
    keys = conf.trainer
    return OptimizerSettings(
        lr=keys.lr,
        betas=keys.betas,
        eps=keys.eps,
        weight_decay=keys.weight_decay,
        warmup_steps=keys.warmup_steps,
        clip_norm=keys.clip_norm,
        decay=keys.decay,
        steps=keys.decay_steps or conf.steps,
        lr_floor=keys.lr_floor,
        weight_decay_on=keys.weight_decay_on,
        fused=keys.fused,
        ema=conf.ema,
        name=keys.optimizer,
        args=keys.optimizer_args,
    )


def generator_settings(
    conf: Conf, shape: ModelShape, tokenizer: Tokenizer, device: Device, ends: Sequence[str] = ()
) -> GeneratorSettings:
    """The generator's part. ends: texts that end a turn, beside the tokenizer's stop tokens."""
    keys = conf.generator
    return GeneratorSettings(
        shape=shape,
        dtype=dtype_of(keys.dtype, device),
        kind=kind_of(conf),
        engine=engine_settings(conf, device),
        seed=conf.seed,
        temperature=keys.temperature,
        top_k=keys.top_k,
        top_p=keys.top_p,
        truncated_logprobs=conf.truncated_logprobs,
        max_new_tokens=keys.max_new_tokens,
        stop_tokens=tokenizer.eos_ids,
        stops=StopStrings(tuple(ends), tokenizer) if ends else None,
        timeout_seconds=conf.timeout_seconds,
        limits=limits_of(conf),
    )


def task_spec(conf: Conf) -> TaskSpec:
    """The task by name, with the functions that are added to its score."""
    weights = conf.score_weights or [1.0] * len(conf.scores)
    scores = dict(zip(conf.scores, weights, strict=False))
    return TaskSpec(conf.task, conf.seed, conf.task_args, scores, tokenizer_files(conf))


def evaluation_sets(
    conf: Conf, source: TaskSource, held_out: Sequence[Prompt]
) -> dict[str, EvaluationSet]:
    """The task's own set; none where nothing is evaluated."""
    if not held_out:
        return {}
    keys = conf.eval
    return {
        "": EvaluationSet(
            source, tuple(held_out), keys.num_samples, ks_of(conf), keys.greedy,
            kept=fixed_prompts(len(held_out), keys.num_samples, conf.log.samples, conf.seed),
        )
    }  # fmt: skip


def difficulty_bounds(conf: Conf) -> Bounds | None:
    """The pass rates of questions that are drawn; None: all are."""
    keys = conf.difficulty
    if keys.min is None and keys.max is None:
        return None
    highest = 1.0 if keys.max is None else keys.max
    return Bounds(keys.min or 0.0, highest, keys.forget)


def prompt_source(
    conf: Conf,
    task: Task,
    encoder: PromptEncoder,
    shape: ModelShape,
    held_out: Sequence[Prompt] = (),
) -> PromptSource:
    """The prompts that are trained on. held_out: those of all evaluations."""
    lengths = (conf.model.max_length, shape.max_positions, conf.generator.max_new_tokens)
    stops, held = turn_ends(conf, task), HeldOut(held_out)
    return PromptSource(task, encoder, conf.overlong, *lengths, stops=stops, held_out=held)


def start_path(conf: Conf) -> Path | None:
    """The directory whose weights are read; None: they are random."""
    if conf.model.init == "random":
        return None
    assert conf.model.path is not None, "check let init=checkpoint without a path through"
    return resolve_path(conf.model.path)


def export_plan(conf: Conf, shape: ModelShape, tokenizer: Tokenizer) -> Export:
    """The export of the run's model, but for its weights' values."""
    start, eos_ids = start_path(conf), tokenizer.eos_ids
    if conf.model.path is None:
        config = config_entries(shape, eos_ids)
    else:
        config = source_entries(resolve_path(conf.model.path), conf.model.ignore_config)
    if conf.export.dtype is not None:
        dtype = DTYPES[conf.export.dtype]
    else:
        dtype = torch.float32 if start is None else exact_dtype(start, shape)
    return planned_export(config, eos_ids, dtype, tokenizer_directory(conf), start)


def dtype_of(name: str | None, device: Device) -> torch.dtype:
    """The dtype that a configuration asks for; unset: bfloat16 on CUDA, float32 on CPU."""
    if name is None:
        return torch.bfloat16 if device == "cuda" else torch.float32
    return DTYPES[name]
