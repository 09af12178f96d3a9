"""An optimizer of the user's, trainer.optimizer=MODULE:NAME: found, and built over the weights.

It is a torch.optim.Optimizer. It gets the weights as groups, with their names and weight decay, and
each of its groups has the learning rate of the schedule before every step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

import torch

from mesh.config.text import mismatch, value_as
from mesh.config.user_code import call_user_code, import_named

KEY, ARGS = "trainer.optimizer", "trainer.optimizer_args"
OF_THE_RUN = {"lr": "trainer.lr", "weight_decay": "trainer.weight_decay"}
"""Settings that are keys of the run; all others are keys of `ARGS`."""

Make = Callable[..., torch.optim.Optimizer]


def load_optimizer(name: str) -> Make:
    """What trainer.optimizer names. ValueError where it is not there, or no optimizer of torch."""
    module, attribute = import_named(KEY, name, "my_optimizers:SignMomentum")
    found = getattr(module, attribute, None)
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        return found
    has = [
        key for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    ]  # fmt: skip
    shown = f"it has {', '.join(has)}" if has else "it has none"
    wrong = f"{attribute} is no class of {module.__name__} that derives from torch.optim.Optimizer"
    raise ValueError(f"{KEY}={name}: {wrong}; {shown}")


def settings_of(make: Make) -> dict[str, inspect.Parameter]:
    """The parameters of an optimizer behind that of the weights, by name."""
    parameters = list(inspect.signature(make).parameters.values())[1:]
    return {p.name: p for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL}


def argument_problems(name: str, make: Make, args: Mapping[str, Any]) -> list[str]:
    """Settings that the optimizer does not have, whose type is wrong, or that are keys of the run,
    and those that are missing."""
    settings, hints, found = settings_of(make), hints_of(make), []
    own = [
        key for key, p in settings.items() if key not in OF_THE_RUN and p.kind is not p.VAR_KEYWORD
    ]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in settings.values())
    for key, value in args.items():
        if key in OF_THE_RUN:
            found.append(f"{ARGS}.{key}={value}: this is a key of the run; write "
                         f"{OF_THE_RUN[key]}={value}")  # fmt: skip
        elif key not in own and not takes_any:
            choice = f"it takes {', '.join(own)}" if own else "it takes none"
            found.append(f"{ARGS}.{key}={value}: {KEY}={name} has no such setting; {choice}")
        else:
            try:
                value_as(value, hints.get(key, Any))
            except ValueError:
                found.append(f"{ARGS}.{key}={value}: {mismatch(value, hints[key])}")
    for key in own:
        if settings[key].default is inspect.Parameter.empty and key not in args:
            found.append(
                f"{ARGS}.{key} is missing: {KEY}={name} needs it; write {ARGS}.{key}=VALUE"
            )
    return found


def hints_of(make: Make) -> dict[str, Any]:
    """The declared types of its settings."""
    try:
        return get_type_hints(make.__init__)  # type: ignore[misc]
    except (NameError, TypeError):  # a name for type checkers only
        return {}


def build_optimizer(
    name: str, args: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], lr: float
) -> torch.optim.Optimizer:
    """The optimizer over these groups, whose `params` are (name, weight). ValueError where it
    cannot be built, or has groups without a learning rate or without the weight decay that they
    are given."""
    make = load_optimizer(name)
    hints = hints_of(make)
    typed = {str(key): value_as(value, hints.get(key, Any)) for key, value in args.items()}
    rate = {"lr": lr} if "lr" in settings_of(make) else {}
    made = call_user_code(
        f"{KEY}={name}: building it", lambda: make([dict(g) for g in groups], **rate, **typed)
    )
    if "lr" not in made.defaults:
        wrong = "its defaults have no lr, which the schedule of the run sets in every group"
        raise ValueError(f"{KEY}={name}: {wrong}; use group['lr'] as the optimizers of torch do")
    decayed = any(group["weight_decay"] for group in groups)
    if decayed and "weight_decay" not in made.defaults:
        wrong = "its defaults have no weight_decay, so that trainer.weight_decay would do nothing"
        raise ValueError(f"{KEY}={name}: {wrong}; use group['weight_decay'], or set it to 0")
    return made
