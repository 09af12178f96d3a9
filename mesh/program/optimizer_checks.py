"""Start-up checks of the optimizer and of its schedule."""

from __future__ import annotations

from mesh.config.keys import problem
from mesh.config.schema import Conf


def optimizer_problems(conf: Conf) -> list[str]:
    """Every problem of the keys that say how the weights are updated."""
    return [*schedule_problems(conf), *decay_problems(conf)]


def schedule_problems(conf: Conf) -> list[str]:
    """Keys of a decay that there is not, and one that ends before it has begun."""
    keys, found = conf.trainer, []
    if keys.decay == "none":
        constant = "trainer.decay=none keeps the learning rate after the warm-up"
        remedy = "set trainer.decay=linear or cosine, or leave it out"
        if keys.lr_floor:
            found.append(problem("trainer.lr_floor", keys.lr_floor, constant, remedy))
        if keys.decay_steps:
            found.append(problem("trainer.decay_steps", keys.decay_steps, constant, remedy))
    elif keys.decay_steps and keys.decay_steps <= keys.warmup_steps:
        wrong = f"the decay ends before trainer.warmup_steps={keys.warmup_steps} have passed"
        remedy = f"use at least {keys.warmup_steps + 1}, counted from the first step of the run"
        found.append(problem("trainer.decay_steps", keys.decay_steps, wrong, remedy))
    return found


def decay_problems(conf: Conf) -> list[str]:
    """A choice of weights that decay where none does."""
    keys = conf.trainer
    if keys.weight_decay_on == "all" or keys.weight_decay:
        return []
    wrong, remedy = "trainer.weight_decay=0: no weight decays", "set trainer.weight_decay, e.g. 0.1"
    return [problem("trainer.weight_decay_on", keys.weight_decay_on, wrong, remedy)]
