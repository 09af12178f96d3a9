"""The whole program put together: what every recipe starts from.

`launch` starts this rank, `check` refuses what cannot run and resolves the rest into a plan,
`assemble` builds both roles from it, the exchange and the weight bridge between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from mesh.checkpoint.best import best_metric_problems
from mesh.checkpoint.state import refuse_own
from mesh.config.keys import Refusal, attempt
from mesh.config.loading import load_conf
from mesh.config.schema import Conf, resolve_path
from mesh.exchange.rollouts import Exchange
from mesh.invariant.switch import batch_invariant
from mesh.layout.meshes import Meshes, build_meshes, resolve_device
from mesh.lifecycle.process import Process, refuse_to_start, start
from mesh.lifecycle.running import running
from mesh.model.families import shape_of_directory, shape_of_flavor
from mesh.model.hf import export
from mesh.model.products import self_test_of
from mesh.program.checks import check_start, json_problem
from mesh.program.connect import connect
from mesh.program.encoding import (
    dated,
    form_problems,
    prompt_encoder,
    stop_problems,
    tokenizer_files,
)
from mesh.program.evaluations import Known, k_problems, named_sets, set_notes
from mesh.program.first_calls import first_call_problems
from mesh.program.limits import limit_problems, penalty_problems
from mesh.program.loss_checks import read_loss
from mesh.program.optimizer_checks import own_problems
from mesh.program.plan import (
    Found,
    Plan,
    prompt_source,
    resolve,
    task_spec,
)
from mesh.program.prompt_checks import held_out_notes, prompt_problems, training_problems
from mesh.program.refill_checks import round_problems
from mesh.program.shared import of_plan, of_start, of_user_code, refuse_differences
from mesh.program.teacher import read_teacher, teacher_warnings
from mesh.program.text_warnings import prompt_warnings
from mesh.program.warnings import model_warnings
from mesh.rl.losses import CROSS_ENTROPY
from mesh.roles.generator import Generator
from mesh.roles.trainer import Trainer
from mesh.runs.profiles import profile_problems
from mesh.tasks import draw_held_out, task_notes
from mesh.tasks.difficulty import PassRates
from mesh.tasks.scorer import Scorer, checked_task, num_workers
from mesh.text.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from mesh.types import ModelShape, Prompt
from mesh.weights.bridge import SyncReport, WeightBridge
from mesh.weights.bridge import weights_digest as digest_of


@dataclass(frozen=True)
class Program:
    """Both roles of a plan on this rank, and what crosses between them.

    scorer: of the task that is trained on; pass_rates: of its questions, so far;
    evaluation_scorers: by the names of the plan's sets.
    """

    plan: Plan
    meshes: Meshes
    trainer: Trainer
    generator: Generator
    scorer: Scorer
    pass_rates: PassRates
    evaluation_scorers: Mapping[str, Scorer]
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
    """This rank's process for the length of a run, with batch-invariant kernels if `conf` asks for
    them.
    """
    device = resolve_device(conf.device)
    with (
        batch_invariant(conf.batch_invariant, device, conf.invariant.chunks),
        start(device, conf.timeout_seconds, conf.stall_seconds) as process,
    ):
        yield process


def check(conf: Conf, process: Process, training: bool = True, held_out: bool = True) -> Plan:
    """The plan of `conf`. Raises one Refusal that lists everything that cannot run, or everything
    that ranks do not have alike. Collective.

    `training` False leaves out what only training asks, `held_out` False the task's held-out
    prompts: for a program that asks others.
    """
    refuse_differences(process, *of_start(conf))
    conf = dated(conf, process)
    device, world_size = process.device.type, process.world_size
    wrong: list[str] = []
    shape = attempt(wrong, read_shape, conf)
    tokenizer = attempt(wrong, read_tokenizer, conf)
    workers = num_workers(conf) if training or held_out else 0
    drawn = conf.num_prompts if training else 0
    spec = task_spec(conf)
    spec = spec if tokenizer is not None else replace(spec, tokenizer=None)
    asked_for = spec, workers, drawn, training or held_out
    made = attempt(wrong, checked_task, *asked_for)
    task, elsewhere = made or (None, [])
    loss = attempt(wrong, read_loss, conf) if training else CROSS_ENTROPY
    teacher = attempt(wrong, read_teacher, conf, device, shape, tokenizer) if training else None
    wrong += best_metric_problems(conf) + own_problems(conf) if training else []
    wrong += profile_problems(conf, world_size) if training else []
    code = of_user_code(task, loss, conf.scores, wrong, conf.trainer.optimizer)
    refuse_differences(process, code)
    own: list[Prompt] = []
    if task is not None and held_out:
        own += attempt(wrong, draw_held_out, task, conf.eval.num_prompts) or []
        wrong += k_problems(conf)
    encoder = attempt(wrong, prompt_encoder, conf, tokenizer) if tokenizer is not None else None
    sets = named_sets(conf, process, wrong, Known(task, encoder, shape)) if held_out else {}
    prompts = [*own, *(prompt for one in sets.values() for prompt in one.prompts)]
    if task is not None and encoder is not None and shape is not None:
        source = prompt_source(conf, task, encoder, shape, prompts)
        formed = form_problems(conf, encoder)
        if not formed:
            held = source, own, "held-out prompts"
            wrong += attempt(wrong, prompt_problems, process, *held) or []
            wrong += first_call_problems(process, conf, task, encoder, own)
        if training:
            wrong += attempt(wrong, round_problems, conf, task) or []
            drawn_by = source, conf.num_prompts, elsewhere
            wrong += [] if formed else attempt(wrong, training_problems, process, *drawn_by) or []
        wrong += check_vocabulary(encoder.tokenizer, shape.vocab_size)
        wrong += formed + stop_problems(conf, encoder.tokenizer, task) + limit_problems(conf, task)
        wrong += penalty_problems(conf, task) if training else []
    check_start(conf, device, world_size, shape, wrong, training)
    assert shape is not None and tokenizer is not None, "check_start let a missing file through"
    assert task is not None and loss is not None, "a task or loss that failed was not listed"
    found = Found(shape, tokenizer, task, loss, own, sets, teacher)
    plan = resolve(conf, found, world_size, "cuda" if device == "cuda" else "cpu", training)
    plan = replace(plan, prompts=source)  # which knows what has been warned about
    refuse_differences(process, of_plan(plan))
    notes = model_warnings(conf) + (teacher_warnings(conf, tokenizer) if training else [])
    notes += [*(task_notes(task) if training or held_out else []), *set_notes(sets, task)]
    notes += held_out_notes(conf, len(own))
    for line in [*notes, *prompt_warnings(process, plan.prompts, prompts, drawn)]:
        process.say(line)
    return plan


def read_shape(conf: Conf) -> ModelShape | None:
    """The model's shape; ValueError where what names it describes none that we can run.

    None: config.json is missing or no JSON, which is `check_start`'s to report.
    """
    if conf.model.path is None:
        return shape_of_flavor(conf.model.flavor)
    directory = resolve_path(conf.model.path)
    if json_problem(directory / "config.json") is not None:
        return None
    return shape_of_directory(directory, conf.model.ignore_config)


def read_tokenizer(conf: Conf) -> Tokenizer | None:
    """The tokenizer; ValueError where its files are damaged.

    Weights that are trained on have learnt the end tokens that their own directory names, wherever
    the tokenizer lies. None: tokenizer.json is missing, or the model's config.json, which may name
    end tokens, is not readable; both are reported elsewhere.
    """
    files = tokenizer_files(conf)
    directory, model = files.directory, files.model
    of_model = directory if conf.model.tokenizer is None else model
    config = None if of_model is None else of_model / "config.json"
    if config is not None and config.is_file() and json_problem(config) is not None:
        return None
    return load_tokenizer(directory, model) if (directory / "tokenizer.json").is_file() else None


def assemble(plan: Plan, process: Process, self_test: bool = True) -> Program:
    """Build both roles and what connects them. A collective of the world.

    self_test: of the batch-invariant kernels, which one a process is enough of.
    """
    if plan.chunks is not None and self_test:
        process.say(run_self_test(plan, process))
    timeout = timedelta(seconds=plan.timeout_seconds)
    meshes = build_meshes(plan.layout, process.device.type, timeout)
    trainer = Trainer(plan.trainer, meshes, process.device, process.guard.run_dir)
    refuse_own(process, trainer)
    generator = Generator(plan.generator, meshes, process.device, plan.encoder)
    scorer = Scorer(plan.training)
    others = evaluation_scorers(plan, scorer)
    scorers = {id(one): one for one in (scorer, *others.values())}.values()
    process.closers += [*(one.close for one in scorers), generator.close]
    exchange = Exchange(plan.layout, plan.step.group_size, timeout)
    bridge = connect(plan, process, trainer, generator)
    rates = PassRates(plan.difficulty)
    return Program(plan, meshes, trainer, generator, scorer, rates, others, exchange, bridge)


def evaluation_scorers(plan: Plan, training: Scorer) -> dict[str, Scorer]:
    """The scorers of the evaluation sets, by name; one for all that have the same task."""
    made, found = [(plan.training.spec, training)], {}
    for name, held in plan.evaluations.items():
        spec = held.source.spec
        same = next((scorer for other, scorer in made if other == spec), None)
        found[name] = same or Scorer(held.source)
        made.append((spec, found[name]))
    return found


def run_self_test(plan: Plan, process: Process) -> str:
    """The self-test of the batch-invariant kernels on the products of all models, as lines that say
    what was done. Collective; RuntimeError where results depend on the batch.
    """
    assert plan.chunks is not None, "the plan is not batch-invariant"
    where = (plan.chunks, plan.trainer.dtype, process.device, process.cpu_group)
    lines = [self_test_of(plan.shape, *where)]
    lines += [
        f"{name}: {self_test_of(source.shape, *where)}"
        for name, source in plan.trainer.frozen.items()
        if source.shape != plan.shape
    ]
    return "\n".join(lines)


def sync(program: Program, weights: Mapping[str, Tensor] | None = None) -> SyncReport:
    """Make the trainer's weights the generator's, and drop what was cached.

    weights: other ones than its newest.
    """
    with running("sync"):
        report = program.bridge.sync(weights)
        program.generator.reset(report.version)
    return report


def weights_digest(program: Program) -> str:
    """One number of all master weights, the same on any mesh and on every rank. Collective."""
    trainer = program.trainer
    names = trainer.weight_names
    layouts = [layout for layout in trainer.layouts if layout.name in names]
    return digest_of(trainer.parameters(), layouts, program.bridge.cpu_group)


def save_model(program: Program, path: Path) -> None:
    """Export the trainer's weights, of a run that averages them the averaged ones, as a Hugging
    Face directory. A collective of the trainer."""
    trainer, plan = program.trainer, program.plan
    if trainer.model is None:
        return
    write = dist.get_rank() == plan.layout.trainer_ranks[0]
    export(path, trainer.answering(), plan.shape, plan.export, write)
