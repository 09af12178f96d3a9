"""Training's part of a step with each loss, in turn and on the same rollouts of one program.

    python -m tools.bench.loss_time [losses=grpo,dapo,...] [updates=1] [rounds=5]
        [optimizer=true|false] [key=value ...]

One process, one rank. A step is generated once, with the recipe's keys: `conf=qwen3_tiny`, on a GPU
`conf=qwen3 model.init=random` with 64 prompts x 8 samples x 256 tokens; other arguments are keys
too. Every second rollout is then called right, so that a random model has something to learn. In
each round every loss trains once on these rollouts, `updates` times (a list, as `updates=1,4`):
`grpo` first, and once more at the end (`grpo again`), which shows the noise. A learning rate of
1e-12, unless one is given, leaves the weights as they are: all losses do the same work. Seconds are
the GPU's, from the first kernel's start to the last one's end; without a GPU, CPU time of this
process. A whole step adds what `grpo` and all others share: generate, exchange, sync and digest,
measured once.

On a GPU, `rounds` further rounds are profiled, and the durations of their kernels added up. A small
model's training waits for the host, whose time jitters by more than a loss costs; that of kernels
does not. Exit status 1 where a whole step is not within 3% of grpo's: in time of kernels on a GPU,
in CPU time without. What a loss takes of the host alone is then seen in the seconds of training
only, and not judged. `optimizer=true` also times AdamW's update alone, on the same gradients, with
`trainer.fused` true and false. Left out: waves, several ranks, losses that need a teacher.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

from mesh.config.changes import changed
from mesh.config.keys import attempt, refuse
from mesh.config.schema import Conf
from mesh.lifecycle.process import Process
from mesh.lifecycle.timers import Phases
from mesh.program.assembly import (
    Program,
    assemble,
    check,
    launch,
    read_command,
    sync,
    weights_digest,
)
from mesh.program.groups import groups_of
from mesh.program.loss import run_objective
from mesh.program.loss_checks import read_loss
from mesh.rl.objective import Objective
from mesh.rl.step import advantages_of, credited, share_of, with_scores
from mesh.roles.divergences import reward_divergences
from mesh.roles.gradients import summed_gradients
from mesh.roles.optimizer import Optimizer
from mesh.tasks import Draw
from mesh.tasks.prompts import step_prompts
from mesh.types import Outline, Rollout, Wave
from tools.bench.loss_rows import WITHIN, Timed, Times, heads
from tools.bench.losses import REWARDED
from tools.bench.report import hardware, print_row, spread
from tools.bench.sizes import sized
from tools.bench.timing import in_turn, kernel_seconds, stopwatch
from tools.bench.vocabulary import with_tokenizer

BASE, AGAIN = "grpo", "grpo again"
STEP = 0


def main(argv: list[str]) -> int:
    options, words = read_words(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(hardware(), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        _, conf = read_command(with_tokenizer(words, Path(directory)))
        with launch(conf) as process:
            return bench(conf, process, options)


def read_words(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Our own options, and the recipe's arguments."""
    options = {
        "losses": ",".join(REWARDED), "updates": "1", "rounds": "5", "optimizer": "false"
    }  # fmt: skip
    options |= dict(word.split("=", 1) for word in argv if word.partition("=")[0] in options)
    counts = [options["rounds"], *options["updates"].split(",")]
    if options["optimizer"] not in ("true", "false") or not all(map(is_count, counts)):
        raise SystemExit(__doc__)
    given = [word for word in argv if word.partition("=")[0] not in options]
    return options, sized(given, "trainer.lr=1e-12")


def is_count(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def bench(conf: Conf, process: Process, options: Mapping[str, str]) -> int:
    """Print the tables; the exit status."""
    rounds, updates = int(options["rounds"]), [int(n) for n in options["updates"].split(",")]
    assert process.world_size == 1, "one rank: its launcher, if there is any, starts one process"
    plan = check(conf, process, held_out=False)
    objectives = objectives_of(conf, options["losses"].split(","))
    program = assemble(plan, process)
    wave, rest, kernel_rest = generated(program, process)
    counts = f"{len(wave.outlines)} rollouts, {sum(o.length for o in wave.outlines):,} loss tokens"
    print(f"{counts}; the rest of a step: {rest:.3f} s\n", flush=True)
    names = heads(kernels=kernel_rest is not None)
    print_row(*names)
    print_row(*["---"] * len(names))
    made = []
    for n in updates:
        made += time_losses(program, objectives, wave, n, rounds, rest, kernel_rest)
    if options["optimizer"] == "true":
        time_optimizers(program, objectives[BASE], wave, rounds)
    missed = [row for row in made if row.missed]
    found = ", ".join(f"{row.loss} (updates={row.updates})" for row in missed)
    print(f"\nnot within {WITHIN:.0%} of {BASE}: {found or 'none'}")
    if AGAIN in [row.loss for row in missed]:
        print(f"{BASE} is not within {WITHIN:.0%} of itself: this machine is too busy to tell")
    return int(bool(missed))


def objectives_of(conf: Conf, losses: Sequence[str]) -> dict[str, Objective]:
    """The objective of the run with each of these losses, grpo's first; Refusal where one does not
    go with the run's keys."""
    wrong: list[str] = []
    if conf.waves != 1:
        wrong.append(f"waves={conf.waves}: steps of several waves are not timed; leave it out")
    found: dict[str, Objective] = {}
    for name in dict.fromkeys([BASE, *losses]):
        other = changed(conf, {"loss": name})
        loss = attempt(wrong, read_loss, other)
        found |= {} if loss is None else {name: run_objective(other, loss)}
    refuse(wrong)
    return found


def generated(program: Program, process: Process) -> tuple[Wave, float, float | None]:
    """A step's rollouts, of which every second one is right; the seconds of all that is not
    training, of the second of two times, as the first one warms up; on a GPU those of its kernels.
    """
    draw, phases = Draw(STEP, program.plan.step.num_prompts), Phases(process.device)
    prompts, _ = step_prompts(program.plan.prompts, process, draw, program.pass_rates)

    def once() -> Wave:
        wave = groups_of(program, process, phases, STEP, prompts).wave
        sync(program)
        weights_digest(program)
        return wave

    sync(program)
    taken: list[float] = []
    for _ in range(2):
        with stopwatch(taken):
            wave = once()
    on_gpu = process.device.type == "cuda"
    return half_right(wave), taken[-1], kernel_seconds(once) if on_gpu else None


def half_right(wave: Wave) -> Wave:
    """The wave with a reward for every second rollout of each group."""

    def reward(one: Outline | Rollout) -> float:
        return float((one.prompt_id + one.sample_id) % 2)

    return Wave(
        [replace(one, reward=reward(one)) for one in wave.outlines],
        [replace(one, reward=reward(one)) for one in wave.rollouts],
    )


def time_losses(
    program: Program,
    objectives: Mapping[str, Objective],
    wave: Wave,
    updates: int,
    rounds: int,
    rest: float,
    kernel_rest: float | None,
) -> list[Timed]:
    """Time all losses in turn, and print their rows. rest, kernel_rest: of a step, beside training;
    kernel_rest None: kernels are not timed."""
    names = {**objectives, AGAIN: objectives[BASE]}
    ways = [partial(train, program, objective, wave, updates) for objective in names.values()]
    base, *_ = times = in_turn(*ways, repeats=rounds)
    rows = [
        Timed(name, updates, Times(taken, base, rest))
        for name, taken in zip(names, times, strict=True)
    ]
    if kernel_rest is not None:
        turns = [[kernel_seconds(way) for way in ways] for _ in range(rounds)]
        kernels = list(zip(*turns, strict=True))
        rows = [
            replace(row, kernels=Times(taken, kernels[0], kernel_rest))
            for row, taken in zip(rows, kernels, strict=True)
        ]
    for row in rows:
        print_row(*row.cells())
    return rows


def train(
    program: Program, objective: Objective, wave: Wave, updates: int
) -> list[dict[str, float]]:
    """Training's part of a step of one wave, as recipes/grpo.py takes it: its updates' metrics."""
    trainer, keys = program.trainer, replace(program.plan.step, updates=updates)
    program.generator.release()
    share = share_of(wave, keys, trainer.dp, trainer.dp_rank, STEP)
    known = trainer.score(share.passes, objective.needs, policy=updates > 1)
    divergences = reward_divergences(share.passes, known, objective, trainer.cpu_group)
    advantages = advantages_of(wave, objective, keys.group_size, divergences)
    made = []
    parts = with_scores(credited(share, advantages, objective), known)
    for number, (part, scores) in enumerate(parts):
        trainer.accumulate(part.passes, objective, scores)
        if number > 0:
            trainer.approx_kl()  # for `kl_stop`, whether it is set or not
        normaliser = objective.normaliser(part.tokens, part.sequences)
        made.append(trainer.update(normaliser, part.tokens, number))
        assert made[-1]["grad_norm"] > 0, "without a gradient the optimizer is not called"
    return made


def time_optimizers(program: Program, objective: Objective, wave: Wave, rounds: int) -> None:
    """Print what AdamW's update takes with `trainer.fused` and without, on the same gradients:
    neither norm nor clipping are in it."""
    trainer = program.trainer
    settings = trainer.settings.optimizer
    assert settings is not None and trainer.model is not None, "one rank trains"
    if settings.name is not None:
        raise SystemExit(f"optimizer=true is for AdamW, not for {settings.name}")
    trainer.optimizer.restart()  # which frees its moments
    share = share_of(wave, program.plan.step, trainer.dp, trainer.dp_rank, STEP)
    advantages = advantages_of(wave, objective, program.plan.step.group_size)
    passes = credited(share, advantages, objective).passes[:1]
    trainer.accumulate(passes, objective, trainer.score(passes, objective.needs))
    gradients = summed_gradients(trainer.model)

    def way(fused: bool) -> Callable[[], object]:
        own = replace(settings, fused=fused, clip_norm=0.0, ema=0.0)
        return partial(Optimizer(trainer.masters(), own).step, gradients, 1.0, settings.lr)

    plain, fused = in_turn(way(False), way(True), repeats=rounds)
    print()
    print_row("AdamW", "ms", "to false")
    print_row(*["---"] * 3)
    for name, taken in (("false", plain), ("true", fused)):
        ratios = [own / other for own, other in zip(taken, plain, strict=True)]
        print_row(f"`trainer.fused={name}`", f"{1e3 * median(taken):.2f}", spread(ratios))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
