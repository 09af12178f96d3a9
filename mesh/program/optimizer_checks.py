"""Start-up checks of the optimizer, of its schedule, and of what ends a run early."""

from __future__ import annotations

from mesh.checkpoint.best import metric_problems
from mesh.config.keys import problem
from mesh.config.schema import Conf
from mesh.program.plan import optimizer_settings
from mesh.roles.answers import is_share
from mesh.roles.optimizer_trial import trial
from mesh.roles.own_optimizer import ARGS, KEY, argument_problems, load_optimizer


def optimizer_problems(conf: Conf) -> list[str]:
    """Every problem of the keys that say how the weights are updated."""
    return [*schedule_problems(conf), *decay_problems(conf), *stop_problems(conf)]


def own_problems(conf: Conf) -> list[str]:
    """What keeps an optimizer of the user's from training and from being resumed: it is found,
    built, and tried on made-up weights."""
    name, args = conf.trainer.optimizer, conf.trainer.optimizer_args
    if name is None:
        wrong = "AdamW's settings are keys of trainer, e.g. trainer.betas"
        remedy = f"leave it out, or set {KEY}"
        return [problem(f"{ARGS}.{key}", value, wrong, remedy) for key, value in args.items()]
    found = []
    if conf.trainer.fused:  # betas and eps stand in configs, for AdamW
        wrong = f"AdamW's own kernel, and {KEY}={name} takes AdamW's place"
        found.append(problem("trainer.fused", True, wrong, f"write {ARGS}.fused=true"))
    try:
        found += argument_problems(name, load_optimizer(name), args)
        if not found:
            trial(optimizer_settings(conf))
    except ValueError as error:
        lines = str(error).splitlines() or [repr(error)]
        found += [x if x.startswith("trainer.") else f"{KEY}={name}: {x}" for x in lines]
    return found


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


def stop_problems(conf: Conf) -> list[str]:
    """A metric that ends no run, one that is not logged, and evaluations that come too late."""
    keys = conf.stop
    asked = {"stop.above": keys.above, "stop.after": keys.after}
    given = {name: value for name, value in asked.items() if value is not None}
    if not given and keys.metric != type(keys).metric:
        wrong = "nothing says when the run is to end"
        return [problem("stop.metric", keys.metric, wrong, "set stop.above or stop.after")]
    found = metric_problems(conf, "stop.metric", keys.metric, either=False) if given else []
    if keys.above is not None and keys.above > 1 and is_share(keys.metric):
        wrong = f"{keys.metric} is a share of 1, and never above 1"
        remedy = f"use {keys.above / 100:g}" if 1 < keys.above <= 100 else "use 1 or less"
        found.append(problem("stop.above", keys.above, wrong, remedy))
    if not conf.eval.every:
        wrong, remedy = "eval.every=0 evaluates after the last step alone", "set eval.every"
        found += [problem(name, value, wrong, remedy) for name, value in given.items()]
    return found
