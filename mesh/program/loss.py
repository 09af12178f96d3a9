"""The objective that the keys of a run describe: its loss, and the terms that refine it."""

from __future__ import annotations

from mesh.config.keys import value_of
from mesh.config.schema import Conf
from mesh.rl.loading import BOUNDS, typed_settings
from mesh.rl.losses import Importance, Loss
from mesh.rl.objective import Objective, objective_of
from mesh.rl.rewards import LengthPenalty


def run_objective(conf: Conf, loss: Loss) -> Objective:
    """The loss with the keys that refine it; `constant` aggregation divides by the longest
    response."""
    bounds = {name: value_of(conf, name) for name in BOUNDS}
    return objective_of(
        loss,
        advantage=conf.advantage,
        aggregation=conf.aggregation,
        settings={**bounds, **typed_settings(loss, conf.loss_args)},
        kl_coef=conf.kl_coef,
        entropy_coef=conf.entropy_coef,
        teacher_coef=loss.teacher_coef if conf.teacher.coef is None else conf.teacher.coef,
        teacher_kl=conf.teacher.kl,
        kl_in=conf.kl_in,
        kl_estimator=conf.kl_estimator or ("k3" if conf.kl_in == "loss" else "k1"),
        length_penalty=length_penalty_of(conf),
        importance=importance_of(conf),
        longest_response=conf.generator.max_new_tokens,
        advantage_eps=conf.advantage_eps,
    )


def length_penalty_of(conf: Conf) -> LengthPenalty | None:
    """What long responses lose; None: nothing."""
    if conf.length_penalty == 0 or conf.length_penalty_tokens is None:
        return None
    limit = conf.length_penalty_limit or conf.generator.max_new_tokens
    return LengthPenalty(conf.length_penalty, conf.length_penalty_tokens, limit)


def importance_of(conf: Conf) -> Importance | None:
    """The correction of a generator that is not exact; None: none."""
    if conf.importance == "none":
        return None
    low, high = conf.importance_low, conf.importance_high
    if low is None:
        low = 0.0 if conf.importance == "tis" else 1 / high
    return Importance(conf.importance, conf.importance_level, low, high)
