"""The few samples of a step that a tracker shows, with their texts cut to a bound.

A tracker is for a glance; the samples file of the run has them whole. The texts are a model's, or
a data set's, so nothing in them may act on the page that shows them: characters that are no text
are escaped, and Markdown gets all of it as one code block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

FACTS = (
    *("step", "split", "set", "chosen", "prompt_id", "sample_id", "reward", "advantage", "length"),
    "finish_reason",
)
COLUMNS = (*FACTS, "prompt", "response")
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
MOST_CHARACTERS = 2000  # of a text
MOST_ROWS = 8  # of a table
MOST_TABLES = 100  # of a run, and one more for its first step


def table_is_due(step: int, steps: int) -> bool:
    """True in the steps whose samples trackers show: the first and the last one, and about
    MOST_TABLES between them."""
    return step in (0, 1, steps) or step % -(-steps // MOST_TABLES) == 0


def excerpts(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """At most MOST_ROWS rows for a table, with COLUMNS each: of the training groups with the
    highest and with the lowest mean reward the best and the worst sample, and of each evaluation
    set two prompts' greedy answers."""
    rows = list(rows)
    training = [row for row in rows if row.get("split", "train") == "train"]
    held_out = [row for row in rows if row.get("split", "train") != "train"]
    chosen = [*_extremes(training), *_fixed(held_out)]
    return [_excerpt(row) for row in chosen[:MOST_ROWS]]


def _extremes(rows: Sequence[Row]) -> list[Row]:
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    ordered = sorted(groups.values(), key=_mean_reward)
    ends = [ordered[-1], ordered[0]] if len(ordered) > 1 else ordered
    found = []
    for group in ends:
        by_reward = sorted(group, key=lambda row: (row["reward"], -row["sample_id"]))
        found += [by_reward[-1], by_reward[0]] if len(group) > 1 else by_reward
    return found


def _mean_reward(group: Sequence[Row]) -> tuple[float, int]:
    return sum(row["reward"] for row in group) / len(group), -group[0]["prompt_id"]


def _fixed(rows: Sequence[Row]) -> list[Row]:
    """Of each set, the first sample of its first two prompts; the greedy answer is number -1."""
    firsts: dict[tuple[str, int], Row] = {}
    for row in sorted(
        rows, key=lambda row: (row.get("set", ""), row["prompt_id"], row["sample_id"])
    ):
        firsts.setdefault((row.get("set", ""), row["prompt_id"]), row)
    names = dict.fromkeys(name for name, _ in firsts)
    return [row for own in names for row in [firsts[key] for key in firsts if key[0] == own][:2]]


def _excerpt(row: Row) -> dict[str, Any]:
    texts = {"prompt": row.get("prompt_text") or row.get("prompt", ""), "response": _said(row)}
    return {name: row.get(name) for name in COLUMNS} | {
        name: printable(cut(str(text))) for name, text in texts.items()
    }


def _said(row: Row) -> str:
    """The response; of a conversation all turns, with who made each."""
    if not row.get("turns"):
        return row["response"]
    return "\n".join(
        f"[{'model' if turn['sampled'] else 'reply'}] {turn['text']}" for turn in row["turns"]
    )


def cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """`text`, or its beginning and its end with the number of characters between them."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def printable(text: str) -> str:
    """`text` with backslash escapes for control characters, other than newlines and tabs, and for
    lone surrogates, which UTF-8 has no bytes for."""
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def as_markdown(rows: Sequence[Row]) -> str:
    """A table's rows as one code block of Markdown: every line of it is indented, so no text can
    end the block, and nothing in one is read as a heading, a link, an image or HTML."""
    lines = []
    for row in rows:
        facts = [f"{name} {_fact(row[name])}" for name in FACTS if row[name] not in (None, "")]
        lines += ["  ".join(facts), "", "PROMPT", *row["prompt"].split("\n")]
        lines += ["", "RESPONSE", *row["response"].split("\n"), "", "=" * 80, ""]
    return "\n".join("    " + line for line in lines[:-3])


def _fact(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
