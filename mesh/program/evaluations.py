"""Named evaluation sets, read and checked at the start like the run's own held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mesh.config.evaluation_sets import PREFIX, SetConf, as_own, ks_of, of_set, set_confs
from mesh.config.keys import attempt, problem
from mesh.config.schema import Conf
from mesh.engine.kinds import engine_problems
from mesh.lifecycle.process import Process
from mesh.program.checks import invariant_problems, length_problems
from mesh.program.encoding import form_problems, stop_problems, turn_ends
from mesh.program.first_calls import first_call_problems
from mesh.program.limits import limit_problems
from mesh.program.plan import prompt_source, task_spec
from mesh.program.prompt_checks import prompt_problems
from mesh.program.shared import of_user_code, refuse_differences
from mesh.rl.samples import fixed_prompts
from mesh.roles.evaluation import Draws, EvaluationSet
from mesh.tasks import Task, TaskSpec, draw_held_out, task_notes
from mesh.tasks.calls import TaskSource
from mesh.tasks.replying import converses
from mesh.tasks.scorer import checked_task, num_workers, reward_problems, scoring_of
from mesh.text.encoding import PromptEncoder
from mesh.text.stopping import StopStrings
from mesh.text.tokenizer import Tokenizer
from mesh.types import ModelShape, Prompt

Tasks = list[tuple[TaskSpec, Task]]
"""Tasks that have been made and checked."""

HELD_OUT = "held-out prompts"


@dataclass(frozen=True)
class Known:
    """What has been read of the run; None: that could not be, and is listed."""

    task: Task | None
    encoder: PromptEncoder | None
    shape: ModelShape | None


def named_sets(
    conf: Conf, process: Process, wrong: list[str], known: Known
) -> dict[str, EvaluationSet]:
    """The sets of eval.sets, by name. What is wrong with them is added to `wrong`, on every rank
    alike; a Refusal where ranks have different tasks. Collective.
    """
    sets = attempt(wrong, set_confs, conf) or {}
    tasks: Tasks = [] if known.task is None else [(task_spec(conf), known.task)]
    found = {}
    for name, keys in sets.items():
        own, lines = as_own(conf, keys), greedy_problems(keys)
        lines += setting_problems(conf, own, process.device.type, known)
        task = task_of(f"{PREFIX}{name}", own, process, lines, known, tasks)
        if task is not None:
            prompts = held_out_prompts(own, process, lines, known, task)
            if prompts and known.encoder is not None:
                found[name] = evaluation_set(own, keys, task, prompts, known.encoder.tokenizer)
        wrong += of_set(name, keys, lines)
    return found


def task_of(
    name: str, own: Conf, process: Process, wrong: list[str], known: Known, tasks: Tasks
) -> Task | None:
    """The set's task; one that the run or another set has is not made again. Collective."""
    spec, problems = task_spec(own), list[str]()
    task = next((made for other, made in tasks if other == spec), None)
    if task is not None:
        return task
    told = spec if known.encoder is not None else replace(spec, tokenizer=None)
    made = attempt(problems, checked_task, told, num_workers(own))
    task = None if made is None else made[0]
    code = of_user_code(task, None, own.scores, problems)
    refuse_differences(process, replace(code, name=f"the task of {name}"))
    wrong += problems
    if task is not None:
        tasks.append((spec, task))
    return task


def held_out_prompts(
    own: Conf, process: Process, wrong: list[str], known: Known, task: Task
) -> list[Prompt]:
    """The set's prompts, and what is wrong with them. Collective."""
    prompts = attempt(wrong, draw_held_out, task, own.eval.num_prompts) or []
    encoder, shape = known.encoder, known.shape
    if encoder is None:
        return prompts
    ends = stop_problems(own, encoder.tokenizer, task)
    wrong += [line for line in ends if line not in wrong]
    wrong += limit_problems(own, task) if converses(task) else []
    if shape is not None and not form_problems(own, encoder):
        source = prompt_source(own, task, encoder, shape)
        wrong += attempt(wrong, prompt_problems, process, source, prompts, HELD_OUT) or []
        asked = [] if task is known.task else prompts
        wrong += first_call_problems(process, own, task, encoder, asked)
    return prompts


def evaluation_set(
    own: Conf, keys: SetConf, task: Task, prompts: Sequence[Prompt], tokenizer: Tokenizer
) -> EvaluationSet:
    """The set, resolved. own: the configuration in which its keys are the run's."""
    drawn, ends = own.generator, turn_ends(own, task)
    greedy = keys.temperature == 0
    draws = Draws(
        0.0 if greedy else drawn.temperature, drawn.top_k, drawn.top_p, drawn.max_new_tokens,
        StopStrings(ends, tokenizer) if ends else None,
    )  # fmt: skip
    source = TaskSource(task, task_spec(own), scoring_of(own))
    num = own.eval.num_samples
    kept = fixed_prompts(len(prompts), num, own.log.samples, own.seed)
    return EvaluationSet(source, tuple(prompts), num, ks_of(own), own.eval.greedy, draws, kept)


def set_notes(sets: Mapping[str, EvaluationSet], own: Task) -> list[str]:
    """The notes of tasks other than the run's own, each with its set."""
    return [
        f"{PREFIX}{name}: {line}"
        for name, one in sets.items()
        if one.source.task is not own
        for line in task_notes(one.source.task)
    ]


def setting_problems(conf: Conf, own: Conf, device: str, known: Known) -> list[str]:
    """Problems of a set's keys with each other, the engine and the model, those left out that the
    run has without it.
    """
    without = key_problems(conf, device, known)
    return [*k_problems(own), *(x for x in key_problems(own, device, known) if x not in without)]


def key_problems(conf: Conf, device: str, known: Known) -> list[str]:
    """Problems with what a set may have of its own."""
    shape = known.shape
    exact = invariant_problems(conf, device, shape) if conf.batch_invariant else []
    engine = engine_problems(conf, shape, device)
    return [*length_problems(conf, shape), *reward_problems(conf), *engine, *exact]


def greedy_problems(keys: SetConf) -> list[str]:
    """Several greedy answers to one prompt."""
    num = keys.num_samples
    if keys.temperature != 0 or num in (None, 1):
        return []
    wrong = "with temperature=0 all answers to a prompt are the same"
    return [problem("eval.num_samples", num, wrong, "leave it out, or set a temperature")]


def k_problems(conf: Conf) -> list[str]:
    """A k above the samples, or twice."""
    ks, num = conf.eval.k, conf.eval.num_samples
    if max(ks, default=0) > num:
        wrong = f"pass@{max(ks)} needs as many samples, and a prompt has eval.num_samples={num}"
        remedy = f"use at most {num}, or raise eval.num_samples"
        return [problem("eval.k", ks, wrong, remedy)]
    if len(set(ks)) < len(ks):
        return [problem("eval.k", ks, "has a k twice", "name it once")]
    return []
