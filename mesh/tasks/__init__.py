"""Tasks: they supply prompts and score responses.

A task is a dataclass with a `seed` field; its other fields are the keys of `task_args`. A user's
own is named `task=MODULE:CLASS` and needs nothing of ours but the `Prompt` noun.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_type_hints

from mesh.config.spelling import meant
from mesh.config.text import mismatch, value_as
from mesh.config.user_code import call_user_code
from mesh.tasks.classes import class_of
from mesh.tasks.drawing import Draw
from mesh.tasks.response import Response, Score
from mesh.text.forms import form_problem
from mesh.types import NumberedPrompt, Prompt

USUAL_HELD_OUT = 256
"""Held-out prompts of a task that does not know how many it has."""

FORMS = "give a text, messages (with role and content) or token ids, and one of the three"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """Arguments of `load_tokenizer`: its directory, and that of the weights, if they are read."""

    directory: Path
    model: Path | None = None


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task by name: arguments of `load_task`, here and in the scoring processes, and the score
    functions that are added to its own, with their weights. tokenizer: which the task is told.
    """

    name: str
    seed: int
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerFiles | None = dataclasses.field(default=None, compare=False)


class Task(Protocol):
    """Interface between recipes and tasks. A task may also say what is correct: `correct.py`.

    A task of a finite data set may have `all_prompts() -> Sequence[Prompt]` as well: everything
    that training may draw, which is then checked before the start.
    """

    def train_prompts(self, step: int, num: int) -> list[Prompt]:
        """The `num` prompts of a step, a pure function of (seed, step, index). A task that can draw
        more for a step takes `round: int = 0` as well; see `Draw`.
        """
        ...

    def eval_prompts(self, num: int) -> list[Prompt]:
        """Distinct held-out prompts, never drawn in training. Raises ValueError if too few."""
        ...

    def solution(self, prompt: Prompt) -> str | Sequence[Any]:
        """A correct response, for the supervised warm start: a text, or turns in order, each
        (text, True) for what the policy says and (reply, False) for what follows it.
        """
        ...

    def score(self, prompt: Prompt, response: Response) -> float | Score:
        """Reward of a response: a finite number, as a scalar of Python, numpy or torch; or a
        `Score`, which has one, named parts, and whether the response is correct.
        """
        ...


def load_task(name: str, seed: int, args: Mapping[str, Any]) -> Task:
    """Create the task of `task=name` and `task_args`. Raises ValueError naming the wrong key."""
    task_class = class_of(name)
    values = typed_args(name, args)
    return call_user_code(f"task={name}: making it", lambda: task_class(seed=seed, **values))


def typed_args(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The `task_args` of `task=name`, each with the type of its field. Raises ValueError naming the
    wrong keys.
    """
    task_class = class_of(name)
    hints = get_type_hints(task_class)
    fields = {
        field.name: field
        for field in dataclasses.fields(task_class)
        if field.init and field.name != "seed"
    }
    more = task_class.more_keys(args) if hasattr(task_class, "more_keys") else {}
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, value in args.items():
        if key not in fields and key not in more:
            wrong = f"task={name} has no such key; {_choice(key, {**fields, **more})}"
            problems.append(f"task_args.{key}={value!r}: {wrong}")
            continue
        hint = hints[key] if key in fields else more[key]
        try:
            typed = value_as(value, hint)
        except ValueError:
            problems.append(f"task_args.{key}={value!r}: {mismatch(value, hint)}")
            continue
        if key in fields:
            values[str(key)] = typed
        else:
            values["settings"] = {**values.get("settings", {}), str(key): typed}
    for key in _required(fields, args):
        problems.append(f"task_args.{key} is missing: task={name} needs it")
    if problems:
        raise ValueError("\n".join(problems))
    return values


def all_args(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """`typed_args`, and the defaults of the fields that they leave out."""
    defaults = {
        field.name: field.default
        if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(class_of(name))
        if field.init and field.name != "seed"
    }
    return {**defaults, **typed_args(name, args)}


def draw_prompts(task: Task, draw: Draw) -> list[Prompt]:
    """The training prompts of a draw, as the task made them. Raises ValueError if there are not
    `num` of them, each with an id of its own, if the task raises, or cannot draw a later round.

    A task gets the round only if it is not the first, so one of which no more is asked needs no
    more than `train_prompts(step, num)`.
    """
    if draw.round and not _takes_round(task):
        raise ValueError(
            "the task's train_prompts takes no round, so it cannot draw more prompts for step "
            f"{draw.step}; give it a parameter `round: int = 0`, and let each round draw other "
            "prompts"
        )
    more = {"round": draw.round} if draw.round else {}
    prompts = call_user_code(
        f"train_prompts of {task!r}", lambda: task.train_prompts(draw.step, draw.num, **more)
    )
    return checked(prompts, draw.num, "train_prompts")


def num_held_out(task: Task, num: int | None) -> int:
    """`num`, or, where that is unset, the usual number: no more than the task has, where it has a
    method `num_held_out() -> int`. ValueError where that raises.
    """
    method = getattr(task, "num_held_out", None)
    if num is not None or not callable(method):
        return num or USUAL_HELD_OUT
    has = call_user_code(f"num_held_out of {task!r}", method)
    return max(1, min(has, USUAL_HELD_OUT))


def draw_held_out(task: Task, num: int | None) -> list[Prompt]:
    """A task's first `num` held-out prompts (None: the usual number); ValueError if it does not
    return them, each with a text of its own, returns others when it is asked again, or raises.
    """
    num = num_held_out(task, num)
    drawn, again = (
        call_user_code(f"eval_prompts of {task!r}", lambda: task.eval_prompts(num))
        for _ in range(2)
    )
    prompts = checked(drawn, num, "eval_prompts")
    for index, pair in enumerate(zip(prompts, checked(again, num, "eval_prompts"), strict=True)):
        before, now = ((p.question, p.answer) for p in pair)
        if before != now:
            raise ValueError(
                f"the task's eval_prompts gave {before} at index {index} and, asked again, "
                f"{now}: evaluations of a run and of a resumed one would not compare; take no "
                "random numbers without a seed, no clock and no state of the task"
            )
    places: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        if (first := places.setdefault(prompt.question, index)) != index:
            raise ValueError(
                f"the task's eval_prompts was asked for {num} prompts and gave {prompt.question!r} "
                f"twice, at index {first} and {index} ({len({p.question for p in prompts})} texts "
                "in all): return distinct prompts, or lower eval.num_prompts to as many as there "
                "are"
            )
    return prompts


def data_set(task: Task) -> list[Prompt]:
    """Everything that training may draw, where the task says so; else nothing. ValueError if it
    raises or returns none.
    """
    method = getattr(task, "all_prompts", None)
    if method is None:
        return []
    prompts = list(call_user_code(f"all_prompts of {task!r}", method))
    if not prompts:
        raise ValueError("the task's all_prompts returned no prompt; return all, or leave it out")
    return checked(prompts, len(prompts), "all_prompts")


def prepare(task: Task) -> None:
    """Let a task read what its prompts come from, where it has `prepare() -> None`. It is called
    once in each rank before the start, and not where tasks only score. ValueError where it raises.
    """
    method = getattr(task, "prepare", None)
    if method is not None:
        call_user_code(f"prepare of {task!r}", method)


def task_notes(task: Task) -> list[str]:
    """Lines that the start prints once, where a task has `notes() -> Sequence[str]`."""
    method = getattr(task, "notes", None)
    if not callable(method):  # a task of a user's may have a setting of that name
        return []
    return list(call_user_code(f"notes of {task!r}", method))


def _takes_round(task: Task) -> bool:
    parameters = inspect.signature(task.train_prompts).parameters.values()
    return any(p.name == "round" or p.kind is p.VAR_KEYWORD for p in parameters)


def checked(prompts: Sequence[Prompt], num: int, method: str) -> list[Prompt]:
    """Return `prompts` if they are `num` prompts with different ids, else raise ValueError.

    method: the task's method that returned them.
    """
    asked = f"the task's {method} was asked for {num} prompts and gave"
    if len(prompts) != num:
        raise ValueError(f"{asked} {len(prompts)}; return {num}")
    places: dict[int, int] = {}
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
            raise ValueError(f"{asked} {prompt!r} at index {index}; return a Prompt with a text")
        given = prompt.text, prompt.messages, prompt.tokens
        if any(given) and (wrong := form_problem(prompt)):
            raise ValueError(f"{asked} {wrong}, at index {index}; {FORMS}")
        if not isinstance(prompt.answer, str):
            wrong = f"{asked} answer={prompt.answer!r} at index {index}"
            kind = type(prompt.answer).__name__
            raise ValueError(
                f"{wrong}, which is {kind}: no response, which is text, equals it; write "
                'str(...), or "" for none, and keep what else score needs in a subclass of Prompt'
            )
        number = prompt.prompt_id
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            remedy = "an id is any integer"
            raise ValueError(f"{asked} prompt_id={number!r} at index {index}; {remedy}")
        if (first := places.setdefault(int(number), index)) != index:
            remedy = "give each prompt of a call an id of its own"
            raise ValueError(
                f"{asked} prompt_id={number} twice, at index {first} and {index}; {remedy}"
            )
    return list(prompts)


def numbered(prompts: Sequence[Prompt], first_id: int = 0) -> list[NumberedPrompt]:
    """The prompts with their places, from `first_id` on."""
    return [NumberedPrompt(place, prompt) for place, prompt in enumerate(prompts, first_id)]


def _choice(key: str, fields: dict[str, Any]) -> str:
    if not fields:
        return "it takes none; leave task_args empty"
    return f"{meant(key, fields, 'task_args.')}it has {', '.join(fields)}"


def _required(fields: dict[str, Any], args: Mapping[str, Any]) -> list[str]:
    nothing = dataclasses.MISSING
    return [
        key
        for key, field in fields.items()
        if field.default is nothing and field.default_factory is nothing and key not in args
    ]
