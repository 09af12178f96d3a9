"""Supervised warm start: train a random model until it answers some prompts correctly.

    torchrun --nproc-per-node=2 recipes/sft.py conf=qwen3_tiny

prompts -> solutions -> pack -> forward, cross entropy, backward -> optimizer -> saved model.

It reads the configuration of the GRPO run that it prepares, with three differences. It takes
sft.steps steps of sft.batch_size examples at learning rate sft.lr, not `steps` of `num_prompts` at
trainer.lr (the other trainer.* keys hold). It starts from random weights: model.path, where it is
set, gives shape and tokenizer, and its weights are not read. There is no reference model. A word of
the command line that cannot be obeyed for that reason is refused.

The cross entropy is that of the policy at generator.temperature, so that rollouts drawn at this
temperature have the probabilities that were taught.

Left out: starting from a checkpoint, epochs, learning-rate decay, packing by length; the warm start
of a small task needs none of them. It also made the checkpoint that ships with the package (one
process, `sft.output=mesh/data/qwen3_tiny`, and `model.path=null` where there was none yet).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from mesh.config.changes import changed
from mesh.config.keys import problem, refuse, refusing, value_of
from mesh.config.loading import read_words, to_yaml
from mesh.config.schema import Conf, resolve_path
from mesh.lifecycle.memory import trim
from mesh.lifecycle.process import Process
from mesh.lifecycle.timers import Phases, phase_metrics
from mesh.program.assembly import (
    Program,
    assemble,
    check,
    launch,
    read_command,
    save_model,
    sync,
)
from mesh.program.plan import Plan
from mesh.program.prompt_checks import training_problems
from mesh.program.text_warnings import prompt_warnings
from mesh.recipes.grpo import held_out
from mesh.rl.cutting import assign
from mesh.rl.losses import CROSS_ENTROPY
from mesh.rl.objective import Objective
from mesh.rl.packing import leaves
from mesh.rl.step import passes_of
from mesh.runs.directory import create_run_dir
from mesh.runs.metrics import MetricsLogger
from mesh.tasks import Draw, solution_of
from mesh.tasks.prompts import step_prompts
from mesh.types import NumberedPrompt, Rollout

# metrics that compare with the policy that generated the tokens, which here is nobody's
OF_A_GENERATOR = ("logprob_diff/", "ratio/", "clip_fraction")
# what to do instead of setting a key that `supervised` sets
INSTEAD = {
    "steps": "set sft.steps",
    "trainer.lr": "set sft.lr",
    "kl_coef": "leave it out, there is no reference model",
    "model.init": "leave it out, the weights start random",
    "check": "leave it out, there is no generator to agree with",
}


def main(argv: list[str]) -> None:
    name, conf = read_command(argv)
    with launch(conf) as process:
        conf = supervised(conf, argv)
        plan = check(conf, process)
        trainer = replace(plan.trainer, reference=False)
        prompts = replace(plan.prompts, teaches=True)
        plan = replace(plan, trainer=trainer, objective=Objective(CROSS_ENTROPY), prompts=prompts)
        with refusing():  # what does not fit is refused before anything is built
            end = answer_end(plan)
            refuse(training_problems(process, prompts, conf.sft.batch_size))
        for line in prompt_warnings(process, prompts, (), conf.sft.batch_size):
            process.say(line)
        process.say(f"an answer ends with {plan.tokenizer.backend.id_to_token(end)!r} (id {end})")
        run_dir = create_run_dir(process, conf.run_dir, f"sft-{name}", to_yaml(conf))
        program = assemble(plan, process)
        phases = Phases(process.device)
        words = asdict(conf)
        with MetricsLogger(run_dir, conf.log, process.rank, conf.steps, words) as logger:
            process.listen()
            for step in range(conf.steps):
                with phases("train"):
                    metrics = train_step(conf, program, process, step)
                seconds = phases.seconds(process.cpu_group)
                metrics |= phase_metrics(seconds, {"train": int(metrics.get("tokens/trained", 0))})
                if step + 1 == conf.steps:
                    sync(program)
                    metrics |= held_out(program, process)
                trim(step + 1)
                logger.log(step + 1, metrics)
                if process.should_stop():
                    break
            output = conf.sft.output
            save_model(program, resolve_path(output) if output else run_dir / "model")


def supervised(conf: Conf, argv: Sequence[str]) -> Conf:
    """The configuration with the supervised steps and learning rate, from random weights.

    Raises ValueError that lists the arguments of `argv` which this overrides.
    """
    words, _ = read_words(list(argv))
    typed = {word.name: value_of(conf, word.name) for word in words if word.name in INSTEAD}
    conf = changed(conf, {
        "steps": conf.sft.steps, "trainer.lr": conf.sft.lr, "kl_coef": 0.0, "model.init": "random",
    })  # fmt: skip
    overruled = [name for name in typed if typed[name] != value_of(conf, name)]
    wrong = "recipes/sft.py does not read it"
    refuse([problem(name, typed[name], wrong, INSTEAD[name]) for name in overruled])
    return conf


def train_step(conf: Conf, program: Program, process: Process, step: int) -> dict[str, float]:
    """Cross entropy of the solutions of one batch of training prompts, and one update."""
    plan, trainer = program.plan, program.trainer
    prompts, drawn = step_prompts(plan.prompts, process, Draw(step, conf.sft.batch_size))
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
    metrics = {k: value for k, value in metrics.items() if not k.startswith(OF_A_GENERATOR)}
    return metrics | drawn


def example(plan: Plan, prompt: NumberedPrompt) -> Rollout:
    """The rollout of a generator that knows the solution."""
    question = plan.encoder.tokens(prompt.prompt)
    answer = tuple(plan.tokenizer.encode(solution_of(plan.task, prompt.prompt)))
    tokens = (*answer, answer_end(plan))
    unknown = (0.0,) * len(tokens)
    return Rollout(prompt.prompt_id, 0, question, tokens, unknown, 1.0, "stop")


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
