"""Start-up checks of what draws more prompts for a step: dynamic sampling, and pass rates."""

from __future__ import annotations

from mesh.config.keys import problem
from mesh.config.schema import Conf
from mesh.rl.refill import REWARD
from mesh.tasks import Draw, Task, draw_prompts

NO_DATA_SET = (
    "the task does not say which prompts it may draw, so a question may never be drawn twice, and "
    "has no pass rate"
)


def refill_problems(conf: Conf) -> list[str]:
    """Keys of dynamic sampling that do not fit others."""
    rounds, on = conf.refill_rounds, conf.refill_on
    found = []
    if rounds and conf.waves > 1:
        wrong = (
            f"with waves={conf.waves} the first wave is trained on before it is known which groups "
            "of the step are of use"
        )
        found.append(problem("refill_rounds", rounds, wrong, "set waves=1"))
    if not rounds and on != REWARD:
        wrong = "no group is replaced with refill_rounds=0"
        found.append(problem("refill_on", on, wrong, "set refill_rounds=3, or leave it out"))
    return found


def difficulty_problems(conf: Conf) -> list[str]:
    """Bounds of pass rates between which nothing lies, or that nothing needs."""
    keys, found = conf.difficulty, []
    if keys.min is not None and keys.max is not None and keys.min > keys.max:
        wrong = f"is above difficulty.max={keys.max:g}, so no question could be drawn again"
        found.append(problem("difficulty.min", keys.min, wrong, "lower it, or raise the other"))
    if keys.forget and keys.min is None and keys.max is None:
        wrong = "no pass rate is asked for without difficulty.min or difficulty.max"
        found.append(problem("difficulty.forget", keys.forget, wrong, "set one, or leave it out"))
    return found


def round_problems(conf: Conf, task: Task) -> list[str]:
    """Keys for which the task would have to draw more prompts for a step than it can, or others
    than it does."""
    bounds = {"difficulty.min": conf.difficulty.min, "difficulty.max": conf.difficulty.max}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    used = ({"refill_rounds": conf.refill_rounds} if conf.refill_rounds else {}) | bounds
    found = [
        problem(name, bound, NO_DATA_SET, "give it all_prompts() (docs/tasks.md), or leave it out")
        for name, bound in bounds.items()
        if not callable(getattr(task, "all_prompts", None))
    ]
    if used:
        try:
            draw_prompts(task, Draw(0, 1, round=1))
        except ValueError as error:
            found += [problem(name, v, str(error), "or leave it out") for name, v in used.items()]
    return found
