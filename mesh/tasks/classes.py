"""The class of a task by name: one that ships, or a user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mesh.config.spelling import meant
from mesh.config.user_code import import_named
from mesh.tasks.arithmetic import Arithmetic
from mesh.tasks.calculator import Calculator
from mesh.tasks.dataset import Dataset, Gsm8k
from mesh.tasks.guess import Guess
from mesh.tasks.gym import ReasoningGym
from mesh.tasks.spell_backward import SpellBackward

SHIPPED: dict[str, type] = {
    "spell_backward": SpellBackward,
    "arithmetic": Arithmetic,
    "calculator": Calculator,
    "guess": Guess,
    "dataset": Dataset,
    "gsm8k": Gsm8k,
    "reasoning_gym": ReasoningGym,
}
METHODS = ("train_prompts", "eval_prompts", "solution", "score")


def class_of(name: str) -> type:
    """Raises ValueError where there is no such task, or its class lacks what a task has."""
    return _import_class(name) if ":" in name else _shipped_class(name)


def _shipped_class(name: str) -> type:
    if name not in SHIPPED:
        remedy = f"use one of {', '.join(SHIPPED)}, or MODULE:CLASS for a task of your own"
        raise ValueError(f"task={name}: no such task; {meant(name, SHIPPED)}{remedy}")
    return SHIPPED[name]


def _import_class(name: str) -> type:
    module, class_name = import_named("task", name, "my_package.tasks:Chess")
    task_class = getattr(module, class_name, None)
    if task_class is None:
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        remedy = f"{meant(class_name, classes)}its classes are {', '.join(classes) or 'none'}"
        raise ValueError(f"task={name}: {module.__name__} has no {class_name}; {remedy}")
    _check_class(name, task_class)
    return task_class


def _check_class(name: str, task_class: Any) -> None:
    if not (isinstance(task_class, type) and dataclasses.is_dataclass(task_class)):
        raise ValueError(f"task={name}: a task must be a dataclass; put @dataclass on the class")
    missing = [f"method {method}" for method in METHODS if not hasattr(task_class, method)]
    if not any(field.init and field.name == "seed" for field in dataclasses.fields(task_class)):
        missing.append("field seed: int")
    if missing:
        raise ValueError(f"task={name}: the class lacks {', '.join(missing)}; add what is missing")


def scored_apart(name: str, args: Mapping[str, Any]) -> bool:
    """True where a score may hang or crash: of a user's own task, or of a shipped one that runs the
    code of others with these arguments.
    """
    apart = getattr(SHIPPED.get(name), "scored_apart", None)
    return ":" in name or (apart is not None and apart(args))
