"""The configuration of a run beside the defaults, and its environment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from mesh.config.keys import ConfKey, conf_keys, shown
from mesh.config.loading import typed
from mesh.config.secrets import shareable
from tools.report.reading import Run

OLDER = "This version of mesh has no such key."
MOST = 4000  # characters of a value that are shown


def config_of(run: Run) -> list[dict[str, Any]]:
    """Every key of the run in the schema's order, then those that the schema does not have."""
    keys = conf_keys()
    later = changed_later(run)
    now = run.settings | later
    known = [entry(keys[name], now[name]) for name in keys if name in now]
    rows = known + [
        {"key": name, "value": value_of(name, value), "default": "", "changed": True,
         "help": below(name, keys)}
        for name, value in now.items()
        if name not in keys
    ]  # fmt: skip
    for row in rows:
        if row["key"] in later and row["key"] in run.settings:
            row["earlier"] = value_of(row["key"], run.settings[row["key"]])
    return rows


def changed_later(run: Run) -> dict[str, Any]:
    """The keys that a later start has changed, with their last values: config.yaml is the first
    start's."""
    found: dict[str, Any] = {}
    for environment in run.environments[1:]:
        if isinstance(changed := environment.get("changed"), dict):
            found |= {str(name): value for name, value in changed.items()}
    return found


def entry(key: ConfKey, value: Any) -> dict[str, Any]:
    """A key of the schema; its value and default as a user would type them."""
    return {
        "key": key.name,
        "value": value_of(key.name, value),
        "default": text(key.default),
        "changed": is_changed(key, value),
        "help": key.meaning,
    }


def is_changed(key: ConfKey, value: Any) -> bool:
    """True if a saved value is not the default; a value of another version's type is."""
    try:
        now = typed(value, key.annotation)
    except (OmegaConfBaseException, ValueError):
        return True
    if isinstance(key.default, bool) or key.default is None or isinstance(key.default, list):
        return text(now) != text(key.default)
    if isinstance(key.default, int | float):
        return not same_number(now, key.default)
    return text(now) != text(key.default)


def same_number(value: Any, default: float) -> bool:
    """True if text or number is the default's number: 1e-6 is 0.000001."""
    try:
        return float(value) == float(default)
    except (TypeError, ValueError):
        return False


def text(value: Any) -> str:
    """A value as a user would type it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(text(item) for item in value) + "]"
    return shown(value)


def value_of(name: str, value: Any) -> str:
    """The value of a key as text of bearable length, without secrets."""
    return clipped(text(value if value == "null" else shareable(value, str(name))))


def below(name: str, keys: dict[str, ConfKey]) -> str:
    """The meaning of the key that a free name, such as task_args.digits, is below of."""
    parent = name.partition(".")[0]
    return keys[parent].meaning if parent in keys else OLDER


def clipped(value: str, most: int = MOST) -> str:
    """The beginning of a long text, and how much was left out."""
    rest = len(value) - most
    return value if rest <= 0 else f"{value[:most]} [{rest:,} characters left out]"


LABELS = {
    "started": "Started",
    "command": "Command",
    "git": "Commit",
    "python": "Python",
    "platform": "Platform",
    "cuda": "CUDA",
    "cpu": "CPU",
    "cpu_cores": "CPU cores",
    "world_size": "Ranks",
}


def environment_of(run: Run) -> list[dict[str, str]]:
    """The environment of every start, by label; of a later one what differs from the start before
    it. Only entries that mesh/runs/directory.py writes are shown: another one might hold a
    secret."""
    found: list[tuple[str, str]] = []
    before: dict[str, str] = {}
    for start, environment in enumerate(run.environments, 1):
        prefix = f"Start {start}: " if len(run.environments) > 1 else ""
        held = dict(entries(environment))
        same = [label for label, value in held.items() if before.get(label) == value]
        found += [(prefix + label, value) for label, value in held.items() if label not in same]
        if same:
            found.append((f"{prefix}As before", ", ".join(same)))
        before = held
    return [{"label": label, "value": clipped(value)} for label, value in found]


def entries(environment: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Labels and values of one environment, as far as they have the right type."""
    for name, label in LABELS.items():
        if isinstance(environment.get(name), str | int | float):
            yield label, str(environment[name])
    for name, label in (("packages", "Packages"), ("variables", "Variables")):
        if isinstance(held := environment.get(name), dict) and held:
            sign = " " if name == "packages" else "="
            yield label, ", ".join(f"{key}{sign}{value}" for key, value in held.items())
    if isinstance(changed := environment.get("changed"), dict) and changed:
        listed = (f"{key}={value_of(key, value)}" for key, value in changed.items())
        yield "Changed keys", ", ".join(listed)
    ranks = environment.get("ranks")
    for rank in ranks if isinstance(ranks, list) else []:
        if isinstance(rank, dict):
            named = [str(rank[name]) for name in ("host", "device") if name in rank]
            yield f"Rank {rank.get('rank', '?')}", ", ".join(named)
