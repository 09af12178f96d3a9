"""Start-up checks of what draws prompts again: dynamic sampling."""

from __future__ import annotations

from mesh.config.keys import problem
from mesh.config.schema import Conf
from mesh.rl.refill import REWARD
from mesh.tasks import Draw, Task, draw_prompts


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


def round_problems(conf: Conf, task: Task) -> list[str]:
    """A task that cannot draw what is asked of it beyond the first round of a step. ValueError
    where its prompts are not as they have to be."""
    keys = {"refill_rounds": (conf.refill_rounds, 0)}
    used = {name: pair for name, pair in keys.items() if pair[0] != pair[1]}
    if not used:
        return []
    try:
        draw_prompts(task, Draw(0, 1, round=1))
    except ValueError as error:
        return [
            problem(name, value, str(error), f"or set {name}={off}")
            for name, (value, off) in used.items()
        ]
    return []
