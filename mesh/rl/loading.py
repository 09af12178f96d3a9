"""The loss that a configuration names: found, and held against its settings (tried: `trial.py`)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from mesh.config.spelling import nearest
from mesh.config.text import mismatch, value_as
from mesh.config.user_code import import_named
from mesh.rl.losses import LOSSES, Loss, Need

BOUNDS = ("clip_low", "clip_high", "dual_clip")
"""Settings that are keys of the run; a surrogate's other settings are keys of `loss_args`."""

CLIPS = ("clip_low", "clip_high")
"""Those that a message of this file speaks of; a dual clip has more to say."""

PROVIDED: frozenset[Need] = frozenset(get_args(Need))
"""Needs of a loss that the trainer can meet."""


def load_loss(name: str) -> Loss:
    """The loss that `loss=name` asks for: a row of LOSSES, or MODULE:NAME. ValueError otherwise."""
    if ":" not in name:
        if name in LOSSES:
            return LOSSES[name]
        near = nearest(name, LOSSES)
        hint = f"did you mean {near}? " if near else ""
        remedy = f"use one of {', '.join(LOSSES)}, or MODULE:NAME for a loss of your own"
        raise ValueError(f"loss={name}: no such loss; {hint}{remedy}")
    module, attribute = import_named("loss", name, "my_losses:UNCLIPPED")
    loss = getattr(module, attribute, None)
    if not isinstance(loss, Loss):
        found = [key for key, value in vars(module).items() if isinstance(value, Loss)]
        has = f"it has {', '.join(found)}" if found else "it has none"
        raise ValueError(
            f"loss={name}: {attribute} is no mesh.rl.losses.Loss of {module.__name__}; {has}"
        )
    return loss


def settings_of(loss: Loss) -> dict[str, inspect.Parameter]:
    """The settings of a loss's surrogate: its keyword-only parameters, by name."""
    parameters = inspect.signature(loss.surrogate).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def loss_problems(
    name: str, loss: Loss, bounds: Mapping[str, Any], args: Mapping[str, Any]
) -> list[str]:
    """Settings that the loss does not have or whose type is wrong, and needs that cannot be met."""
    settings, hints, found = settings_of(loss), hints_of(loss), []
    given = {key for key, value in {**bounds, **args}.items() if value not in (None, "null")}
    for key in (key for key in CLIPS if key in given and key not in settings):
        found.append(f"{key}={bounds[key]}: loss={name} has no such bound; leave it out")
    for key, value in args.items():
        found += _arg_problems(name, key, value, settings, hints.get(key, Any))
    for key, setting in settings.items():
        if setting.default is setting.empty and key not in {*given, *loss.settings}:
            where = key if key in BOUNDS else f"loss_args.{key}"
            found.append(f"{where} is missing: loss={name} needs it; write {where}=VALUE")
    unmet = sorted(loss.needs - PROVIDED)
    if unmet:
        found.append(
            f"loss={name}: needs {', '.join(unmet)}, which this trainer does not compute; use a "
            f"loss whose needs are among {', '.join(sorted(PROVIDED))}"
        )
    return found


def typed_settings(loss: Loss, args: Mapping[str, Any]) -> dict[str, Any]:
    """`loss_args`, each with the type of its setting. ValueError where one cannot have it."""
    hints = hints_of(loss)
    return {str(key): value_as(value, hints.get(key, Any)) for key, value in args.items()}


def hints_of(loss: Loss) -> dict[str, Any]:
    """The type of each setting: its annotation, else that of its default, else any."""
    try:
        declared = get_type_hints(loss.surrogate)
    except (NameError, TypeError):  # a name for type checkers only, or no function
        declared = {}
    hints = {}
    for key, setting in settings_of(loss).items():
        required = setting.default is setting.empty
        unknown = Any if required or setting.default is None else type(setting.default)
        hint = declared.get(key, unknown)
        hints[key] = hint | None if required else hint  # null: it is missing
    return hints


def _arg_problems(
    name: str, key: str, value: Any, settings: Mapping[str, inspect.Parameter], hint: Any
) -> list[str]:
    own = [setting for setting in settings if setting not in BOUNDS]
    if key in BOUNDS:
        return [f"loss_args.{key}={value!r}: this is a key of the run; write {key}={value}"]
    if key not in settings:
        choice = f"it takes {', '.join(own)}" if own else "it takes none"
        return [f"loss_args.{key}={value!r}: loss={name} has no such setting; {choice}"]
    try:
        value_as(value, hint)
    except ValueError:
        return [f"loss_args.{key}={value!r}: {mismatch(value, hint)}"]
    return []
