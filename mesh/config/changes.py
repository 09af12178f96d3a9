"""A configuration is never assigned to: a program that needs other keys makes a copy with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

T = TypeVar("T")


def changed(conf: T, values: Mapping[str, Any]) -> T:
    """A copy of `conf` with these values by dotted key, e.g. {"trainer.tp": 2}.

    Raises AttributeError or TypeError for a key that does not exist.
    """
    for name, value in values.items():
        first, _, rest = name.partition(".")
        inner = changed(getattr(conf, first), {rest: value}) if rest else value
        conf = replace(conf, **{first: inner})  # type: ignore[type-var]
    return conf
