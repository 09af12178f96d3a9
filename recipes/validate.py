"""The bitwise on-policy validation run: the exactness ladder on this machine, rung by rung.

    torchrun --nproc-per-node=4 recipes/validate.py conf=qwen3_tiny

Run it before you trust a new machine, driver or model. It takes the shapes and layout of `conf`,
and turns batch invariance on. A table lists what was compared, how often, and whether every bit was
equal; if one was not, the first divergent module, the sequence and the position.
RUN_DIR/validation.json holds the same and the machine. The status is 1 if a rung fails that this
world can show. `validate.control=true` repeats everything with ordinary kernels, to show that the
comparisons detect differences.

    L0  the same steps twice: tokens, rewards, logprobs, loss, gradient norm, weights
    L1  a sequence alone or among any others, chunked, cached, preempted, packed: the same logprobs
    L2  trainer logprobs == generator logprobs, in steps of the real loop and at other temperatures
    L3  L2 in every layout of this world, with the same tokens and logprobs in all of them
    L6  with engine=vllm: the native engine's tokens and logprobs, with weights that were trained

Where the task has conversations, the steps have them, and every sequence of the batch has three
turns with replies between them: all rungs are then those of conversations.

Left out: L4 and L5 (whole runs on other meshes, resuming), gradients compared between
layouts, contexts beyond 1,024 prompt tokens, and more than one draw of the weights and prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from dataclasses import replace

from mesh.config.changes import changed
from mesh.config.keys import conf_keys, refusing, value_of
from mesh.config.loading import to_yaml
from mesh.config.schema import Conf
from mesh.exactness.comparison import Rollouts
from mesh.exactness.engines import engine_checks
from mesh.exactness.generator import generator_checks
from mesh.exactness.layout_checks import layout_checks, reference_of
from mesh.exactness.layouts import built
from mesh.exactness.loop import loop_checks, mixed_check, twice_checks
from mesh.exactness.table import Check, as_json, header, line, passed, verdict, with_control
from mesh.exactness.trainer import trainer_checks
from mesh.exactness.uneven import uneven_keys
from mesh.exactness.walk import Walk, mixed_requests, mixed_script, sampling_of
from mesh.invariant.switch import ordinary_kernels
from mesh.lifecycle.process import Process
from mesh.program.assembly import check, launch, read_command, run_self_test
from mesh.program.plan import Plan
from mesh.recipes.grpo import train_step
from mesh.runs.directory import create_run_dir
from mesh.tasks.scorer import num_workers


def main(argv: list[str]) -> None:
    name, conf = read_command(argv)
    conf = replace(conf, batch_invariant=True)
    with launch(conf) as process:
        plan = uneven_plan(conf, process)
        run_dir = create_run_dir(process, conf.run_dir, f"validate-{name}", to_yaml(conf))
        tested = run_self_test(plan, process)
        process.say(f"{tested}\n\n{header()}")
        checks = said(process, ladder(walk_of(conf, plan, process, seek=True)))
        if conf.validate.control:
            with ordinary_kernels():
                control = ladder(walk_of(conf, ordinary(plan), process, seek=False))
                checks = with_control(checks, list(control))
            process.say("\n".join(["", header(control=True), *map(line, checks)]))
        process.say(f"\n{verdict(checks)}; {run_dir / 'validation.json'}")
        process.write(run_dir / "validation.json", as_json(conf, plan, process, tested, checks))
    sys.exit(not passed(checks))


def ordinary(plan: Plan) -> Plan:
    """The plan with ordinary kernels. Steps go on where a token that was drawn lies outside of the
    trainer's truncated set, which they do not prevent."""
    trainer = replace(plan.trainer, on_nonfinite="skip")
    return replace(plan, chunks=None, trainer=trainer)


def uneven_plan(conf: Conf, process: Process) -> Plan:
    """The plan of `conf` with a little more reward, by the response: steps then have a gradient.

    Truncated responses are trained on by their score, so that all tokens are compared; with equal
    bits there is nothing to correct for by importance weights.
    """
    with refusing():
        keys = uneven_keys(conf.task, conf.task_args, num_workers(conf))
    own = {name: value_of(Conf(), name) for name in conf_keys() if name.startswith("importance")}
    keys |= {"truncated": "score", "truncated_reward": None} | own
    return check(changed(conf, keys), process, held_out=False)


def ladder(walk: Walk) -> Iterator[Check]:
    """The rungs from the lowest up, a row at a time."""
    reference = yield from in_own_layout(walk)
    yield from layout_checks(walk, reference)


def in_own_layout(walk: Walk) -> Generator[Check, None, Rollouts]:
    """L0 to L2 in the configuration's layout. Returns the batch as its generator makes it."""
    with built(walk.plan, walk.process) as program:
        yield from twice_checks(walk, program)
        reference, engines = reference_of(walk, program)
        sampling = sampling_of(program.generator)
        yield from generator_checks(walk, program.generator.engine, sampling)
        yield from trainer_checks(walk, program.trainer, reference, sampling.scored)
        yield mixed_check(walk, program, reference, sampling)
        yield from loop_checks(walk, program, walk.conf.validate.steps)
        yield from engine_checks(walk, program.generator.engine, sampling)
    yield engines
    return reference


def walk_of(conf: Conf, plan: Plan, process: Process, seek: bool) -> Walk:
    requests = mixed_requests(conf, plan, process)
    script = mixed_script(conf, plan, requests)
    return Walk(conf, plan, process, requests, train_step, seek, script)


def said(process: Process, checks: Iterator[Check]) -> list[Check]:
    """The checks as a list; each is printed when it is there."""
    found = []
    for row in checks:
        process.say(line(row))
        found.append(row)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
