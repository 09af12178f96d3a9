"""Re-run one step of a run, and compare it with the logs.

    torchrun --nproc-per-node=2 recipes/replay.py RUN_DIR step=12

From the newest complete checkpoint before the step, or from the start of the run, `train_step` of
recipes/grpo.py takes the steps in between again. Then prompts, answers, rewards, advantages, the
loss, the digest of the weights and everything else that `metrics.jsonl` and `samples.jsonl` hold of
the step are compared to the bit, except timings. The status is 0 if all are equal, 1 if anything
differs, 2 if the step cannot be replayed. Nothing is written into RUN_DIR. Other arguments are the
overrides that resume=RUN_DIR accepts; equal bits are promised for batch_invariant=true, on the mesh
of the run.

Left out: samples that were not logged (`log.samples`); tokens and gradients, which are not logged.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from mesh.checkpoint.keeper import Checkpointer
from mesh.config.changes import changed
from mesh.config.keys import Refusal
from mesh.config.schema import Conf
from mesh.exactness.strict import stop_at_difference
from mesh.lifecycle.process import Process, refuse_to_start
from mesh.lifecycle.timers import Phases
from mesh.program.assembly import Program, assemble, check, launch, read_command, sync
from mesh.program.records import together
from mesh.program.shared import inputs_of
from mesh.recipes.grpo import held_out, train_step
from mesh.runs.replay import LoggedStep, ReplayComparison, as_logged, cautions, logged_step
from mesh.runs.sample_rows import row_of

USAGE = "torchrun --nproc-per-node=RANKS recipes/replay.py RUN_DIR step=K"


def main(argv: list[str]) -> None:
    run_dir, step, words = read_words(argv)
    _, conf = read_command([f"resume={run_dir}", *words], resumes=True)
    logged = or_refuse(logged_step, run_dir, step)
    shown, conf = conf.log.samples, only_reading(conf)
    with launch(conf) as process:
        plan = check(conf, process)
        for caution in cautions(run_dir, conf.batch_invariant, words, process.world_size):
            process.say(caution)
        program = assemble(plan, process)
        inputs = inputs_of(conf, plan)
        keeper = Checkpointer(conf, run_dir, process, program.trainer, inputs, program.pass_rates)
        first = keeper.load_before(step)
        process.say(f"step {step} of {run_dir}, run again from {origin(conf, first)}")
        again = run_again(program, process, range(first, step), logged.evaluated)
        compared = ReplayComparison(logged, again)
        for table in (compared.sample_table(shown), compared.metric_table()):
            process.say("\n".join(["", *table]))
        process.say(f"\n{compared.verdict()}")
    sys.exit(not compared.equal)


def run_again(program: Program, process: Process, steps: range, evaluates: bool) -> LoggedStep:
    """Take these steps; the last one as rank 0 would log it, on every rank."""
    plan, phases = program.plan, Phases(process.device)
    inspect = stop_at_difference if program.plan.strict else None
    sync(program)
    for step in steps:
        record = train_step(program, process, phases, step, inspect)
    if evaluates:
        record += held_out(program, process)
    rows = [
        row_of(plan.tokenizer, plan.step.log_tokens, one)
        for one in together(process, plan.step.seed, step, record.samples)
    ]
    return as_logged(process.from_rank0(record.metrics), process.from_rank0(rows))


def only_reading(conf: Conf) -> Conf:
    """The configuration without anything that writes. Every sample is made, whichever were kept."""
    silent = {
        "log.tensorboard": False,
        "log.wandb": None,
        "log.trackio": None,
        "checkpoint.every": 0,
    }
    return changed(conf, {"run_dir": None, "resume": None, "log.samples": -1} | silent)


def origin(conf: Conf, first: int) -> str:
    """The start of a replay, in words."""
    if first:
        return f"checkpoints/step-{first}"
    weights = f"of seed {conf.seed}" if conf.model.init == "random" else f"in {conf.model.path}"
    return f"the run's beginning, step 0 (the weights {weights}): no earlier checkpoint is there"


def read_words(argv: list[str]) -> tuple[Path, int, list[str]]:
    """RUN_DIR, the step, and the arguments that are the run's."""
    named = [word for word in argv if word.startswith("step=")]
    number = named[-1].removeprefix("step=") if named else ""
    no_run = not argv or argv[0].startswith(("-", "step=", "run_dir=", "resume=", "conf="))
    if no_run or not number.isdecimal():
        given = shlex.join(argv) or "no word"
        refuse_to_start(Refusal(f"{given}: write {USAGE}, where K is a step that was taken"))
    return Path(argv[0]).expanduser(), int(number), [w for w in argv[1:] if w not in named]


def or_refuse(read: Any, *words: Any) -> Any:
    """The result of `read`; its ValueError ends the process as one of the command line does."""
    try:
        return read(*words)
    except ValueError as error:
        refuse_to_start(Refusal(str(error)))


if __name__ == "__main__":
    main(sys.argv[1:])
