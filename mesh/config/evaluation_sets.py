"""Named evaluation sets, `eval.sets.NAME.*`: their keys, and the configuration as a set sees it.

A set is evaluated like the run's own held-out prompts, with keys of its own in the place of some of
the run's. So whoever reads or checks a set looks at a configuration in which they stand there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_origin

from mesh.config.changes import changed
from mesh.config.declare import INF, key
from mesh.config.keys import (
    ConfKey,
    alternatives,
    conf_keys,
    expected,
    in_range,
    problem,
    range_problems,
    range_text,
)
from mesh.config.schema import Conf
from mesh.config.spelling import nearest
from mesh.config.text import Text, value_as


@dataclass(frozen=True)
class SetConf:
    """The keys of a named set. None: the run's own."""

    task: str | None = key(None, "its task; unset: the run's, with the run's task_args and scores")
    task_args: dict[str, Any] = key({}, "that task's settings; without task they are added")
    scores: list[str] | None = key(None, "score functions that are added to its score")
    score_weights: list[float] | None = key(None, "their weights; unset: 1 each")
    num_prompts: int | None = key(None, "held-out prompts; unset: eval.num_prompts", ge=1)
    num_samples: int | None = key(
        None, "samples per held-out prompt; unset: eval.num_samples, with temperature=0 one", ge=1
    )
    k: list[int] | None = key(
        None, "the k of pass@k and majority@k; unset: eval.k, or 1 and num_samples of its own", ge=1
    )
    greedy: bool | None = key(None, "answer every prompt greedily, too; unset: eval.greedy")
    temperature: float | None = key(
        None, "unset: generator.temperature; 0: greedy answers alone", ge=0, lt=INF
    )
    top_k: int | None = key(None, "unset: generator.top_k", ge=0)
    top_p: float | None = key(None, "unset: generator.top_p", gt=0, le=1)
    max_new_tokens: int | None = key(None, "unset: generator.max_new_tokens [tokens]", ge=1)
    stop: list[str] | None = key(None, "texts that end a response; unset: generator.stop")


PREFIX = "eval.sets."
SET_KEYS = conf_keys(SetConf)
PLACES = {
    **{name: f"eval.{name}" for name in ("num_prompts", "num_samples", "k", "greedy")},
    **{
        name: f"generator.{name}"
        for name in ("temperature", "top_k", "top_p", "max_new_tokens", "stop")
    },
}
"""The keys of the run in whose place those of a set stand."""

OURS = ("accuracy", "accuracy_greedy", "reward", "response", "response_length", "failed", "correct")
"""Names behind `eval/` that are metrics of ours, or begin some."""

NAME = re.compile(r"[A-Za-z0-9_-]+")


def documented_keys() -> list[ConfKey]:
    """All keys, those of a named set behind the others of its section."""
    keys = list(conf_keys().values())
    last = max(i for i, known in enumerate(keys) if known.name.startswith("eval."))
    return [*keys[: last + 1], *conf_keys(SetConf, f"{PREFIX}NAME.").values(), *keys[last + 1 :]]


def set_confs(conf: Conf) -> dict[str, SetConf]:
    """The named sets, with typed values. ValueError that lists everything wrong with them."""
    found, problems = _read(conf.eval.sets)
    if problems:
        raise ValueError("\n".join(problems))
    return found


def start_problems(conf: Conf) -> list[str]:
    """Problems with single values of a configuration, those of its sets among them."""
    return [*range_problems(conf), *set_problems(conf)]


def set_problems(conf: Conf) -> list[str]:
    """Sets that cannot have their name, unknown keys, wrong types, and values out of range."""
    return _read(conf.eval.sets)[1]


def _read(sets: Mapping[str, Any]) -> tuple[dict[str, SetConf], list[str]]:
    found: dict[str, SetConf] = {}
    problems: list[str] = []
    for name, values in sets.items():
        wrong = name_problems(str(name), values)
        keys: dict[str, Any] = {}
        for item, value in values.items() if not wrong else ():
            try:
                keys[str(item)] = _typed(f"{PREFIX}{name}.", str(item), value)
            except ValueError as error:
                wrong.append(str(error))
        problems += wrong
        if not wrong:
            found[str(name)] = SetConf(**keys)
    return found, problems


def name_problems(name: str, values: Any) -> list[str]:
    """What is wrong with a set's name, or with keys that stand where a name has to."""
    if not isinstance(values, Mapping):
        written = f"write {PREFIX}NAME.{name}" if name in SET_KEYS else f"set {PREFIX}{name}.task"
        wrong = "expected a set's name, with keys below it"
        return [problem(f"{PREFIX}{name}", values, wrong, written)]
    if not NAME.fullmatch(name):
        wrong = "a set's name has letters, digits, _ and - only"
        return [f"{PREFIX}{name}: {wrong}; rename it"]
    if name in OURS:
        wrong = f"eval/{name} is a metric of ours, or begins some"
        return [f"{PREFIX}{name}: {wrong}; give the set another name"]
    return []


def _typed(prefix: str, name: str, value: Any) -> Any:
    """The value of a set's key. ValueError with the problem where there is no such key, or the
    value has not its type or range.
    """
    known = SET_KEYS.get(name)
    if known is None:
        close = nearest(name, SET_KEYS)
        meant = f"did you mean {prefix}{close}? " if close else ""
        raise ValueError(
            problem(
                f"{prefix}{name}", value, "unknown key", f"{meant}a set has {', '.join(SET_KEYS)}"
            )
        )
    kind, _ = alternatives(known.annotation)
    if get_origin(kind) is dict and isinstance(value, dict):
        return value  # whose fields the task's class types
    listed = get_origin(kind) is list and isinstance(value, Text) and value != "null"
    try:
        typed = value_as([value] if listed else value, known.annotation)
    except ValueError:
        wrong = f"expected {expected(known.annotation)}"
        raise ValueError(
            problem(f"{prefix}{name}", value, wrong, "correct it, or leave it out")
        ) from None
    if not in_range(typed, known.bounds):
        wrong = f"must be {range_text(known.bounds)}"
        raise ValueError(problem(f"{prefix}{name}", value, wrong, "correct it, or leave it out"))
    return typed


def as_own(conf: Conf, keys: SetConf) -> Conf:
    """The configuration in which a set is the run's own: its keys stand in the place of the run's.

    Where its temperature is 0 that of the run stays, as a run has no greedy rollouts; its samples
    are the greedy answers, so that there are no others.
    """
    samples, ks = keys.num_samples, keys.k
    if samples is None and keys.temperature == 0:
        samples = 1
    if ks is None and samples is not None:
        ks = []
    own = {f.name: getattr(keys, f.name) for f in fields(keys)} | {"num_samples": samples, "k": ks}
    if keys.temperature == 0:
        own |= {"temperature": None, "greedy": False}
    values = {place: own[name] for name, place in PLACES.items() if own[name] is not None}
    other, scored = keys.task is not None, keys.scores is not None
    values["task"] = keys.task if other else conf.task
    values["task_args"] = keys.task_args if other else {**conf.task_args, **keys.task_args}
    values["scores"] = keys.scores if scored else [] if other else conf.scores
    weights = [] if other or scored else conf.score_weights
    values["score_weights"] = weights if keys.score_weights is None else keys.score_weights
    return changed(conf, values)


def ks_of(conf: Conf) -> tuple[int, ...]:
    """The k of pass@k and majority@k, in order."""
    return tuple(sorted(conf.eval.k or {1, conf.eval.num_samples}))


def of_set(name: str, keys: SetConf, lines: Sequence[str]) -> list[str]:
    """Problems of the configuration `as_own`, in the words of the set: keys that it has of its own
    by their names there.
    """
    prefix = f"{PREFIX}{name}"
    own = {place: item for item, place in PLACES.items() if getattr(keys, item) is not None}
    if keys.task is not None or keys.task_args:
        own["task_args"] = "task_args"
    found = []
    for line in lines:
        for place, item in own.items():
            line = re.sub(rf"(?<![\w.]){re.escape(place)}(?=[=.\s;,)]|$)", f"{prefix}.{item}", line)
        for item in ("task", "scores", "score_weights"):
            if getattr(keys, item) is not None:
                line = re.sub(rf"^{item}=", f"{prefix}.{item}=", line)
        found.append(line if line.startswith(prefix) else f"{prefix}: {line}")
    return found
