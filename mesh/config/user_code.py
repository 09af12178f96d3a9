"""User code named on the command line, imported and called so that its faults are messages."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def import_named(key: str, name: str, example: str) -> tuple[ModuleType, str]:
    """(module, attribute) of `key=MODULE:ATTRIBUTE`. ValueError for another form, and for a module
    that is not there or whose import raises.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        form = "MODULE:CLASS" if key == "task" else "MODULE:NAME"
        raise ValueError(f"{key}={name}: write it as {form}, e.g. {example}")
    try:
        what = f"{key}={name}: importing {module_name}"
        return call_user_code(what, lambda: importlib.import_module(module_name)), attribute
    except ImportError as error:
        raise ValueError(
            f"{key}={name}: cannot import {module_name} ({error}); "
            "install it, or put its directory on PYTHONPATH"
        ) from error


def call_user_code(what: str, call: Callable[[], T]) -> T:
    """Call user code, which may raise anything: ValueError and ImportError pass through, anything
    else becomes a ValueError that says where it was raised."""
    try:
        return call()
    except (ValueError, ImportError):
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f" ({frame.filename}, line {frame.lineno})"
        said = " ".join(f"raised {type(error).__name__}: {error}".split())
        where = "" if isinstance(error, SyntaxError) else place  # which names its own
        raise ValueError(f"{what} {said}{where}; correct it there") from error
