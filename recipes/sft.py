"""Supervised learning: train a model until it answers some prompts as the task's solutions do.

    torchrun --nproc-per-node=2 recipes/sft.py conf=qwen3_tiny model.init=random

prompts -> solutions -> pack -> forward, cross entropy, backward -> optimizer -> saved model.

It reads the configuration of the GRPO run that it prepares, with three differences. It takes
sft.steps steps of sft.batch_size examples at learning rate sft.lr, not `steps` of `num_prompts` at
trainer.lr (the other trainer.* keys hold); with sft.epochs it takes everything that the task's
`all_prompts` returns, once in each epoch. There is no reference model. A word of the command line
that cannot be obeyed for that reason is refused.

An example has the tokens of a rollout whose policy says the solution: what the policy says carries
loss, with the token that ends each of its turns, and what a reply says does not. The cross entropy
is that of the policy at generator.temperature, so that rollouts drawn at this temperature have the
probabilities that were taught.

Left out: checkpoints and resuming, evaluations between the first and the last step, packing by
length; a warm start of minutes needs none of them. It also made the checkpoint that ships with the
package (one process, `model.init=random sft.output=mesh/data/qwen3_tiny`, and `model.path=null`
where there was none yet).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from mesh.config.changes import changed
from mesh.config.keys import problem, refuse, refusing, value_of
from mesh.config.loading import read_words, to_yaml
from mesh.config.schema import Conf, resolve_path
from mesh.config.sections import ProfileConf
from mesh.lifecycle.memory import trim
from mesh.lifecycle.process import Process
from mesh.lifecycle.timers import Phases
from mesh.program.assembly import (
    Program,
    assemble,
    check,
    launch,
    read_command,
    save_model,
    sync,
)
from mesh.program.encoding import dated
from mesh.program.plan import Plan, optimizer_settings
from mesh.program.prompt_checks import training_problems
from mesh.program.records import together
from mesh.program.text_warnings import prompt_warnings
from mesh.program.timings import Timings
from mesh.recipes.grpo import held_out
from mesh.rl.cutting import assign
from mesh.rl.losses import CROSS_ENTROPY
from mesh.rl.objective import Objective
from mesh.rl.packing import leaves
from mesh.rl.samples import StepRecord
from mesh.rl.step import passes_of
from mesh.runs.directory import create_run_dir
from mesh.runs.metrics import MetricsLogger
from mesh.runs.profiles import profile_problems, profiled
from mesh.runs.sample_rows import row_of
from mesh.tasks import Draw, data_set, numbered
from mesh.tasks.epochs import batch_of, steps_per_epoch
from mesh.tasks.prompts import PromptSource, digest_of, step_prompts, usable
from mesh.types import NumberedPrompt, Prompt, Rollout

# metrics that compare with the policy that generated the tokens, which here is nobody's
OF_A_GENERATOR = ("logprob_diff/", "ratio/", "clip_fraction", "approx_kl")
# what to do instead of setting a key that `supervised` sets, for most to its default
INSTEAD = {
    "steps": "set sft.steps",
    "trainer.lr": "set sft.lr",
    "kl_coef": "leave it out, there is no reference model",
    "entropy_coef": "leave it out, solutions are learned by their cross entropy",
    "teacher.path": "leave it out, solutions are learned, and no teacher",
    "teacher.coef": "leave it out, solutions are learned, and no teacher",
    "teacher.kl": "leave it out, solutions are learned, and no teacher",
    "check": "leave it out, there is no generator to agree with",
    "truncated_logprobs": "leave it out, answers are not drawn from a set",
    "refill_rounds": "leave it out, solutions have no rewards",
    "refill_on": "leave it out, solutions have no rewards",
    "difficulty.min": "leave it out, every prompt is taught",
    "difficulty.max": "leave it out, every prompt is taught",
    "difficulty.forget": "leave it out, every prompt is taught",
    "updates_per_step": "leave it out, a supervised step has one update",
    "kl_stop": "leave it out, a supervised step has one update",
    **dict.fromkeys(
        (
            "loss",
            "advantage",
            "advantage_eps",
            "aggregation",
            "clip_low",
            "clip_high",
            "dual_clip",
            "importance",
            "importance_level",
            "importance_low",
            "importance_high",
            "length_penalty",
            "length_penalty_tokens",
            "length_penalty_limit",
            "drop_equal_groups",
            "truncated",
            "truncated_reward",
        ),
        "leave it out, solutions are learned by their cross entropy",
    ),
    "stop.metric": "leave it out, the first and the last step alone are evaluated",
    "stop.above": "leave it out, the first and the last step alone are evaluated",
    "stop.after": "leave it out, the first and the last step alone are evaluated",
}


def main(argv: list[str]) -> None:
    name, conf = read_command(argv)
    with launch(conf) as process:
        conf = dated(supervised(conf, argv), process)
        plan = check(replace(conf, profile=ProfileConf()), process)
        with refusing():  # what does not fit is refused before anything is built
            end = answer_end(plan)
            plan = teaching(plan)
            refuse(training_problems(process, plan.prompts, conf.sft.batch_size))
            examples = examples_of(conf, plan.prompts, process)
        conf, plan = scheduled(conf, plan, len(examples))
        refuse(profile_problems(conf, process.world_size))
        for line in prompt_warnings(process, plan.prompts, (), conf.sft.batch_size):
            process.say(line)
        process.say(f"an answer ends with {plan.tokenizer.backend.id_to_token(end)!r} (id {end})")
        run_dir = create_run_dir(process, conf.run_dir, f"sft-{name}", to_yaml(conf))
        program = assemble(plan, process)
        phases = Phases(process.device)
        words = asdict(conf)
        timings = Timings(program, process, phases, run_dir if conf.log.timeline else None)
        rows = partial(row_of, plan.tokenizer, conf.log.tokens)
        with MetricsLogger(
            run_dir, conf.log, process.rank, conf.steps, words, row_of=rows
        ) as logger:
            process.listen()
            sync(program)
            record = held_out(program, process)
            logger.log(0, record.metrics, together(process, conf.seed, 0, record.samples))
            steps = range(conf.steps)
            for step in profiled(steps, conf.profile, run_dir, process, logger.leave_out):
                prompts, drawn = prompts_of(conf, plan.prompts, process, examples, step)
                with phases("train", plan.meetings.passes):
                    record = StepRecord(drawn | train_step(program, prompts))
                measured = timings(step + 1, record.metrics)
                if step + 1 == conf.steps:
                    sync(program)
                    record += held_out(program, process)
                trim(step + 1)
                samples = together(process, conf.seed, step, record.samples)
                logger.log(step + 1, record.metrics | measured, samples)
                if process.should_stop():
                    break
            output = conf.sft.output
            save_model(program, resolve_path(output) if output else run_dir / "model")


def supervised(conf: Conf, argv: Sequence[str]) -> Conf:
    """The configuration with the supervised steps and learning rate.

    Raises ValueError that lists the arguments of `argv` which this overrides.
    """
    words, _ = read_words(list(argv))
    names = {word.name for word in words}
    typed = {name: value_of(conf, name) for name in INSTEAD if name in names}
    # settings that are refused without what they set, which is the run's that this prepares
    unread = [*INSTEAD, "kl_in", "kl_estimator", "loss_args"]
    keys = {name: value_of(Conf(), name) for name in unread}
    conf = changed(conf, keys | {"steps": conf.sft.steps, "trainer.lr": conf.sft.lr})
    overruled = [name for name in typed if typed[name] != value_of(conf, name)]
    wrong = "recipes/sft.py does not read it"
    found = [problem(name, typed[name], wrong, INSTEAD[name]) for name in overruled]
    if conf.sft.epochs and "sft.steps" in names:
        wrong = f"sft.epochs={conf.sft.epochs} says how long to train"
        found.append(problem("sft.steps", conf.sft.steps, wrong, "leave out one of the two"))
    refuse(found)
    return conf


def teaching(plan: Plan) -> Plan:
    """The plan with the cross entropy of solutions as its objective, and no frozen models."""
    trainer, prompts = replace(plan.trainer, frozen={}), replace(plan.prompts, teaches=True)
    return replace(plan, trainer=trainer, objective=Objective(CROSS_ENTROPY), prompts=prompts)


def scheduled(conf: Conf, plan: Plan, num_examples: int) -> tuple[Conf, Plan]:
    """Both with the number of steps that sft.epochs makes of the examples, where it is set."""
    if not conf.sft.epochs:
        return conf, plan
    steps = conf.sft.epochs * steps_per_epoch(num_examples, conf.sft.batch_size)
    conf = changed(conf, {"steps": steps})
    trainer = replace(plan.trainer, optimizer=optimizer_settings(conf))
    return conf, replace(plan, trainer=trainer)


def examples_of(conf: Conf, source: PromptSource, process: Process) -> list[Prompt]:
    """Everything that is trained on in an epoch; nothing without sft.epochs. ValueError where the
    task has no data set. Collective.
    """
    if not conf.sft.epochs:
        return []
    examples = data_set(source.task)
    if not examples:
        wrong = f"task={conf.task} draws prompts without end: it has no all_prompts"
        refuse([problem("sft.epochs", conf.sft.epochs, wrong, "set sft.steps instead")])
    return usable(source, process, examples)


def prompts_of(
    conf: Conf, source: PromptSource, process: Process, examples: Sequence[Prompt], step: int
) -> tuple[list[NumberedPrompt], dict[str, Any]]:
    """The prompts of a step, drawn or by their turn in the epoch, and the metrics of that."""
    size = conf.sft.batch_size
    if not examples:
        return step_prompts(source, process, Draw(step, size))
    prompts = [examples[i] for i in batch_of(len(examples), size, conf.seed, step)]
    epoch = (step + 1) / steps_per_epoch(len(examples), size)
    return numbered(prompts), {"digest/prompts": digest_of(prompts), "epoch": epoch}


def train_step(program: Program, prompts: Sequence[NumberedPrompt]) -> dict[str, Any]:
    """Cross entropy of the solutions of these prompts, and one update."""
    plan, trainer = program.plan, program.trainer
    rollouts = [example(plan, prompt) for prompt in prompts]
    ones_R = torch.ones(len(rollouts))
    batch = leaves(rollouts, ones_R, ones_R)
    shares = [[batch[i] for i in ids] for ids in assign(range(len(batch)), trainer.dp)]
    counts = [[leaf.num_tokens for leaf in share] for share in shares]
    tokens = sum(rollout.length for rollout in rollouts)
    rank = trainer.dp_rank or 0
    passes = passes_of(shares[rank], counts, rank, plan.step.pass_tokens)
    trainer.accumulate(passes, plan.objective, trainer.score(passes, plan.objective.needs))
    metrics = trainer.update(plan.objective.normaliser(tokens, len(rollouts)), tokens)
    return {k: value for k, value in metrics.items() if not k.startswith(OF_A_GENERATOR)}


def example(plan: Plan, prompt: NumberedPrompt) -> Rollout:
    """The rollout of a policy that says the solution."""
    question, taught = plan.encoder.tokens(prompt.prompt), plan.prompts.taught(prompt.prompt)
    made = Rollout(
        prompt.prompt_id, 0, question, taught.tokens, (), 1.0, "stop", turns=taught.turns
    )
    return replace(made, logprobs=(0.0,) * made.length)  # unknown


def answer_end(plan: Plan) -> int:
    """The token that ends an answer: the one with which the chat template ends an assistant's turn,
    else the first that generation_config.json names. ValueError where the template fails.
    """
    tokenizer = plan.tokenizer
    if tokenizer.template_problem:
        raise ValueError(
            f"model.tokenizer={tokenizer.directory}: its chat template, which says what ends an "
            f"answer, cannot be rendered: {tokenizer.template_problem}; correct the template, or "
            "remove it: then the first eos_token_id of generation_config.json ends an answer"
        )
    return tokenizer.eos_ids[0]


if __name__ == "__main__":
    main(sys.argv[1:])
