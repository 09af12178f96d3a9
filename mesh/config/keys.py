"""Names, types and ranges of the configuration keys, and how a refusal reads.

A refusal is a list of problems, collected from everywhere before it is raised: a user who fixes a
configuration should see all that is wrong with it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from mesh.config.declare import INF
from mesh.config.schema import Conf
from mesh.config.spelling import nearest

T = TypeVar("T")

# Keys, or prefixes of keys, that may be overridden when a run is resumed.
HOW_IT_RUNS = (
    "resume",
    "steps",
    "timeout_seconds",
    "stall_seconds",
    "waves",
    "check",
    "on_nonfinite",
    "overlong",
    "mesh.mode",
    "trainer.dp_",
    "trainer.tp",
    "trainer.sequence_parallel",
    "trainer.microbatch_tokens",
    "trainer.activation_checkpointing",
    "generator.dp",
    "generator.tp",
    "generator.max_sequences",
    "generator.kv_tokens",
    "generator.page_size",
    "generator.prefill_tokens",
    "generator.prefix_cache",
    "generator.cuda_graphs",
    "vllm.release",
    "reward.",
    "sync.",
    "eval.",
    "stop.",
    "checkpoint.",
    "export.",
    "log.",
    "profile.",
)

# Keys that a resumed run may raise, where nothing was left out that would have fitted.
RAISABLE = ("model.max_length",)

# How the names of keys end whose values no message may show.
SECRETS = ("key", "token", "secret", "password")


@dataclass(frozen=True)
class ConfKey:
    """One key of the schema; `name` is dotted, `annotation` a resolved type."""

    name: str
    annotation: Any
    default: Any
    meaning: str
    bounds: dict[str, float]


def conf_keys(schema: type = Conf, prefix: str = "") -> dict[str, ConfKey]:
    """Every leaf key of `schema` by its dotted name, in the schema's order."""
    found: dict[str, ConfKey] = {}
    hints, defaults = get_type_hints(schema), schema()
    for part in fields(schema):
        name, annotation = prefix + part.name, hints[part.name]
        if is_dataclass(annotation) and isinstance(annotation, type):
            found |= conf_keys(annotation, name + ".")
            continue
        default, meta = getattr(defaults, part.name), part.metadata
        found[name] = ConfKey(name, annotation, default, meta["help"], meta["bounds"])
    return found


def value_of(conf: Conf, name: str) -> Any:
    """The value of a dotted key, e.g. `trainer.lr`."""
    value: Any = conf
    for part in name.split("."):
        value = getattr(value, part)
    return value


def shown(value: Any) -> str:
    """A value as a user would type it: null, true, [0.9, 0.95]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(shown(item) for item in value)}]"
    return str(value)


def problem(name: str, value: Any, wrong: str, remedy: str) -> str:
    """One line of a refusal: which key, its value, what is wrong, and what to do."""
    return f"{name}={shown(value)}: {wrong}; {remedy}"


def unset(name: str, wrong: str, remedy: str) -> str:
    """One line of a refusal for a key that needs a value and has none."""
    return f"{name} is not set: {wrong}; {remedy}"


class Refusal(ValueError):
    """A start that the user has to change. Its message says what is wrong and what to do: it is
    printed once, by one rank, without a traceback (`mesh/lifecycle/process.py`)."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turn a ValueError that is raised in the block, at start-up, into a Refusal."""
    try:
        yield
    except Refusal:
        raise
    except ValueError as error:
        raise Refusal(str(error)) from error


def attempt(wrong: list[str], read: Callable[..., T], *args: Any) -> T | None:
    """The result of `read`; None where it raises ValueError, whose lines are added to `wrong`."""
    try:
        return read(*args)
    except ValueError as error:
        wrong += str(error).splitlines() or [repr(error)]
        return None


def refuse(problems: list[str]) -> None:
    """Raise one Refusal that lists all `problems`, each once; no problems, no error."""
    unique = list(dict.fromkeys(problems))
    if unique:
        title = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
        listed = "\n".join(f"- {line}" for line in unique)
        raise Refusal(f"{title} with the configuration:\n{listed}")


def override_problems(
    saved: Conf, conf: Conf, remedy: str = "leave it out, or start a new run"
) -> list[str]:
    """The keys of a resumed run that would change what the saved one has computed."""
    found = []
    decays = saved.trainer.decay != "none" and saved.trainer.decay_steps is None
    for name in conf_keys():
        before, now = value_of(saved, name), value_of(conf, name)
        if before != now and name == "steps" and decays:
            wrong = f"the run's learning rate decays over {before} steps (trainer.decay_steps)"
            found.append(problem(name, now, wrong, remedy))
        if before == now or name.startswith(HOW_IT_RUNS):
            continue
        differs = f"the run computes with {shown(before)}"
        if name in RAISABLE:
            if now > before and saved.overlong == "stop":
                continue
            differs += ", which a resumed run may raise only"
            if now > before:
                differs = f"the run skips what is longer than {before} (overlong=skip)"
        found.append(problem(name, now, differs, remedy))
    return found


SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def range_text(bounds: dict[str, float]) -> str:
    """`>= 0 and < 1`; infinity is called finite, as nobody types it as a bound."""
    words = ["finite" if v == INF else f"{SIGNS[name]} {v}" for name, v in bounds.items()]
    return " and ".join(words)


def in_range(value: Any, bounds: dict[str, float]) -> bool:
    """NaN is in no range, None in every one."""
    if value is None:
        return True
    if isinstance(value, list | tuple):
        return all(in_range(item, bounds) for item in value)
    holds = {
        "ge": lambda bound: value >= bound,
        "gt": lambda bound: value > bound,
        "le": lambda bound: value <= bound,
        "lt": lambda bound: value < bound,
    }
    return all(holds[name](bound) for name, bound in bounds.items())


def range_problems(conf: Conf) -> list[str]:
    """One problem for each key whose value lies outside the range that the schema gives it."""
    found = []
    for item in conf_keys().values():
        value = value_of(conf, item.name)
        if not in_range(value, item.bounds):
            must = f"must be {range_text(item.bounds)}"
            found.append(problem(item.name, value, must, f"the default is {shown(item.default)}"))
    return found


def alternatives(annotation: Any) -> tuple[Any, bool]:
    """An annotation without its None, and whether it had one."""
    parts = get_args(annotation)
    if NoneType not in parts:
        return annotation, False
    return next(part for part in parts if part is not NoneType), True


LISTS = {
    float: "a list of numbers like [1, 0.5]",
    int: "a list of integers like [1, 4]",
    str: "a list of texts like [one, two]",
}


def expected(annotation: Any) -> str:
    """A type in words, for a message."""
    kind, optional = alternatives(annotation)
    if get_origin(kind) is Literal:
        words = f"one of {', '.join(get_args(kind))}"
    elif get_origin(kind) is list:
        words = LISTS[get_args(kind)[0]]
    elif get_origin(kind) is tuple:
        words = f"a list of {len(get_args(kind))} numbers"
    else:
        names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
        words = names.get(kind, "a mapping like {name: value}")
    return f"{words}, or null" if optional else words


def example(key: ConfKey, value: Any) -> str:
    """A value that `key` would take: the choice nearest to `value`, else its default, else any."""
    kind, _ = alternatives(key.annotation)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return nearest(str(value), choices) or key.default or choices[0]
    if get_origin(kind) is dict:
        return "{}"
    return "1" if key.default is None and kind is int else shown(key.default)
