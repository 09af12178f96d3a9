"""Secrets that stand where none belongs: in the value of a key, or in a command line.

What leaves the machine goes through here: the configuration that a tracker gets, a report that is
shared. A secret is known by the name that it is given to, or by the form of its service. Others
are not found, so a secret is best kept in the environment, of which nothing is recorded.
"""

from __future__ import annotations

import re
from typing import Any

from mesh.config.keys import SECRETS

NOT_SHOWN = "(not shown)"

# NAME=VALUE, NAME: VALUE, --NAME VALUE; a value may be quoted
# A name is tried from its beginning alone, so that a long word costs its length, not its square
_NAME = rf"(?:{'|'.join(SECRETS)})"
NAMED = re.compile(
    rf"((?<![\w.-])[\w.-]*{_NAME}[\"']?\s*[=:]\s*|(?<![\w-])--?[\w-]*{_NAME}\s+)"
    r"(?!\(not shown\))(\"[^\"]*\"|'[^']*'|[^\s,;}\]\"']+)",
    re.IGNORECASE,
)
FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}"  # Hugging Face
    r"|\bsk-[\w-]{20,}"  # OpenAI, Anthropic
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}"  # GitHub, GitLab
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{35}"  # AWS, Google
    r"|\bxox[abeprs]-[\w-]{10,}|\bwandb_v\d_\w{20,}"  # Slack, W&B
)
IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user and password


def is_secret(name: str) -> bool:
    """True if a key, given with or without the groups that it is in, is named as a secret is."""
    return name.lower().endswith(SECRETS)


def without_secrets(text: str) -> str:
    """A command line, or another text, with `(not shown)` in place of secrets."""
    return _formed(NAMED.sub(rf"\1{NOT_SHOWN}", text))


def _formed(text: str) -> str:
    return IN_URL.sub("***", FORMS.sub(NOT_SHOWN, text))


def shareable(value: Any, name: str = "") -> Any:
    """A configuration, with `(not shown)` in place of secrets at any depth. `name`: its key."""
    if isinstance(value, dict):
        return {key: shareable(item, str(key)) for key, item in value.items()}
    if value is not None and is_secret(name):
        return NOT_SHOWN
    if isinstance(value, list | tuple):
        return [shareable(item) for item in value]
    return _formed(value) if isinstance(value, str) else value
