"""The rollouts that the page shows: a choice within a budget of bytes, spread over the run.

Training: the best, the worst and a typical group of the first, the last and evenly chosen steps;
evaluation: all prompts that were kept, at such steps. Groups are whole. Of long responses only some
have their tokens, at least one in a group while the budget lasts, and texts that are too long for a
page keep their beginning and their end (`cut`: characters left out).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from tools.report.lines import Line
from tools.report.reading import Run
from tools.report.rollouts import CHOSEN, Group, Reader, index_of
from tools.report.thinning import number, rounded, spread

BUDGET = 3_000_000  # characters of JSON, of all runs of a page
OF_TEXTS = 0.6  # of what is left: the share for texts, before tokens get the rest
WORTH_IT = 0.05  # of the budget: less than this is not filled up
LONGEST, SHORTEST = 16_000, 200  # characters of a text that are kept
MOST_GROUP = 160_000  # characters of a group, whose texts are cut shorter where it has more
MOST_TOO_LARGE = 20  # groups that are too large still, after which no more is tried
TYPICAL = "random"
MOST_KNOWN = 16 * BUDGET  # characters of groups that are remembered, about 0.3 GB
SMALL, LARGE = 1e-18, 100.0  # numbers between are rounded together
NUMBERS = ("logprobs", "logprob_diffs", "entropies", "token_advantages")
COLUMNS = ("token_texts", *NUMBERS)
TEXTS = ("prompt", "prompt_text", "response", "answer")
PLAIN = (
    "step", "split", "set", "chosen", "prompt_id", "sample_id", "reward", "correct", "advantage",
    "finish_reason", "left_out", "task_prompt_id", "length",
)  # fmt: skip


def samples_of(run: Run, budget: int = BUDGET) -> dict[str, Any]:
    """The rows that are shown, and how many there are. Adds to `run.missing` what is damaged."""
    if run.samples is None:
        return {"rows": [], "kept": 0, "total": 0}
    index = index_of(run.samples)
    run.missing += index.damage.sentences()
    if not index.rows and not index.damage.sentences():
        run.missing.append(f"{run.samples.name} is empty: no rollout can be shown.")
    order = priority(index.groups)
    rows = [row for group in filled(run.samples, index.version, order, budget) for row in group]
    rows.sort(key=lambda row: (row["step"], row["split"] == "eval", str(row["set"])))
    return {"rows": rows, "kept": len(rows), "total": index.rows}


def priority(groups: Sequence[Group]) -> list[Group]:
    """The groups that could be shown, in an order of which every beginning is spread over the run;
    training and evaluation take turns."""
    training: dict[int, list[Group]] = {}
    evaluation: dict[int, list[Group]] = {}
    for group in groups:
        (evaluation if group.split == "eval" else training).setdefault(group.step, []).append(group)
    first = [notable(training[step]) for step in spread(sorted(training))]
    second = [evaluation[step] for step in spread(sorted(evaluation))]
    third = [
        rest(training[step], shown)
        for step, shown in zip(spread(sorted(training)), first, strict=True)
    ]
    turns = [*zip_longest(first, second, fillvalue=list[Group]()), third]
    return [group for turn in turns for part in turn for group in part]


def notable(groups: Sequence[Group]) -> list[Group]:
    """The best, the worst and a typical group of one step."""
    unnamed = [group for group in groups if group.chosen not in CHOSEN]
    if unnamed:
        ranked = sorted(unnamed, key=lambda group: group.mean)
        named = [(ranked[-1], "best"), (ranked[0], "worst"), (ranked[len(ranked) // 2], TYPICAL)]
        return [*{id(group): group for group, _ in named}.values()]
    found: dict[str, Group] = {}
    for group in groups:
        found.setdefault(group.chosen, group)
    return [*found.values()]


def rest(groups: Sequence[Group], shown: Sequence[Group]) -> list[Group]:
    """The groups of a step that are not among the notable ones."""
    names = {group.name for group in shown}
    return [group for group in groups if group.name not in names]


def filled(path: Path, version: int, order: Sequence[Group], budget: int) -> list[list[Line]]:
    """The rows of the groups that fit into the budget, with tokens where they fit.

    In turns: texts of as many groups as fit into a share of what is left, then tokens of those.
    """
    waiting: Iterator[Shown] = shown_groups(path, version, order)
    kept: list[list[Line]] = []
    left, ended, too_large = budget, False, 0
    while not ended and too_large < MOST_TOO_LARGE and left > budget * WORTH_IT:
        of_texts, taken, ended = left * OF_TEXTS, list[Shown](), True
        for group in waiting:
            if group.cost > of_texts:
                ended = False
                if taken:  # the next turn may have room for it
                    waiting = chain([group], waiting)
                else:  # one that alone is too large is left out
                    too_large += 1
                break
            of_texts, left = of_texts - group.cost, left - group.cost
            taken.append(group)
        rows, left = with_tokens(taken, left)
        kept += rows
    return kept


@dataclass(frozen=True)
class Shown:
    """A group as it is shown. cost: characters of its rows without tokens; columns: the tokens of
    each row, none for a row without any, and costs: their characters."""

    rows: list[Line]
    cost: int
    columns: list[Line]
    costs: list[int]

    @property
    def size(self) -> int:
        """Characters, tokens among them."""
        return self.cost + sum(self.costs)


def shown_groups(path: Path, version: int, order: Sequence[Group]) -> Iterator[Shown]:
    """The groups, each read when it is asked for, or known from before."""
    reader = Reader(path)
    for group in order:
        key = (version, group.name, group.size)
        shown = _known.get(key) or shown_group(reader.rows(group))
        _known.put(key, shown)
        yield shown


Key = tuple[int, tuple[int, str, str, int, int], int]


class Known:
    """Groups from before, of `most` characters: those asked for longest ago are forgotten. A live
    page asks for most of them again, and for others as the run goes on."""

    def __init__(self, most: int):
        self._most, self._size = most, 0
        self._groups: dict[Key, Shown] = {}

    def get(self, key: Key) -> Shown | None:
        return self._groups.get(key)

    def put(self, key: Key, group: Shown) -> None:
        """Remember a group as the one that was asked for last."""
        if self._groups.pop(key, None) is None:
            self._size += group.size
        self._groups[key] = group
        while self._size > self._most:
            oldest = next(iter(self._groups))
            self._size -= self._groups.pop(oldest).size


_known = Known(MOST_KNOWN)


def shown_group(read: Sequence[Line]) -> Shown:
    rows = [*cleaned(read, LONGEST)]
    if (cost := size_of(rows)) > MOST_GROUP:
        rows = [*cleaned(read, max(LONGEST * MOST_GROUP // cost // 2, SHORTEST))]
    columns = [columns_of(row) if "cut" not in s else {} for row, s in zip(read, rows, strict=True)]
    return Shown(rows, size_of(rows), columns, [size_of(column) for column in columns])


def with_tokens(groups: Sequence[Shown], left: int) -> tuple[list[list[Line]], int]:
    """The rows of groups, with the tokens of as many as fit: the first of each group, then the
    second of each, and so on. Also what is left of the budget."""
    kept = [[*group.rows] for group in groups]
    for place in range(max(map(len, kept), default=0)):
        for group, rows in zip(groups, kept, strict=True):
            if place < len(rows) and group.columns[place] and group.costs[place] <= left:
                rows[place] = rows[place] | group.columns[place]
                left -= group.costs[place]
    return kept, left


def size_of(value: Any) -> int:
    """Bytes of JSON as html.py writes it, with six for each character that is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    escaped = sum(map(text.count, "<>&"))
    return len(text.encode("utf-8", "surrogatepass")) + 5 * escaped


def cleaned(rows: Sequence[Line], most: int) -> Iterator[Line]:
    """Rows with the fields that are shown, each of the right type, texts of `most` characters."""
    for row in rows:
        shown: Line = {"split": "train", "set": "", "prompt": "", "response": ""}
        shown |= {key: plain(row[key]) for key in PLAIN if plain(row.get(key)) is not None}
        cut = 0
        for key in TEXTS:
            if isinstance(row.get(key), str):
                shown[key], more = shortened(row[key], most)
                cut += more
        for key, fields in (("messages", ("role", "content")), ("turns", TURN)):
            if isinstance(row.get(key), list):
                shown[key], more = parts_of(row[key], fields, most)
                cut += more
        if isinstance(row.get("parts"), dict):
            shown["parts"] = {str(k): plain(v) for k, v in row["parts"].items()}
        if cut:
            shown["cut"] = cut
        yield shown


TURN = ("text", "sampled", "num_tokens")


def plain(value: Any, most: int = LONGEST) -> Any:
    """A scalar as it is shown; None for what is none."""
    if isinstance(value, str):
        return shortened(value, most)[0]
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 1 << 53:
        return value
    found = number(value)
    return None if found is None else rounded(found)


def shortened(text: str, most: int) -> tuple[str, int]:
    """A text of bearable length, and how many characters were left out of its middle."""
    beginning = most * 5 // 8
    more = len(text) - most
    if more <= 0:
        return text, 0
    end = text[beginning + more :]
    return f"{text[:beginning]}\n[{more:,} characters left out]\n{end}", more


def parts_of(listed: Sequence[Any], fields: Sequence[str], most: int) -> tuple[list[Line], int]:
    """Turns or messages with their known fields, and how many characters were left out."""
    found, cut = [], 0
    for part in listed:
        if isinstance(part, Mapping):
            texts = {k: as_text(part[k]) for k in fields if k in part}
            cut += sum(shortened(v, most)[1] for v in texts.values() if isinstance(v, str))
            found.append({key: plain(value, most) for key, value in texts.items()})
    return found, cut


def as_text(value: Any) -> Any:
    """The content of a message, which may be a list of parts, as something plain."""
    scalar = value is None or isinstance(value, str | bool | int | float)
    return value if scalar else json.dumps(value, ensure_ascii=False)


def columns_of(row: Line) -> Line:
    """The tokens of a row: their texts, and the numbers that there are for them."""
    if not isinstance(row.get("token_texts"), list):
        return {}
    found: Line = {"token_texts": [str(text) for text in row["token_texts"]]}
    return found | {key: numbers(row[key]) for key in NUMBERS if isinstance(row.get(key), list)}


def numbers(values: Sequence[Any]) -> list[float | int | None]:
    """A column, each number with three significant digits; None for what is none."""
    if not all(type(value) is float for value in values):
        known = map(number, values)
        return [None if value is None else rounded(value) for value in known]
    column = np.asarray(values, dtype=np.float64)
    size = np.abs(column)
    if not np.isfinite(column).all() or (size > LARGE).any() or ((size > 0) & (size < SMALL)).any():
        known = map(number, values)
        return [None if value is None else rounded(value) for value in known]
    if not size.any():
        return [0] * len(values)
    scale = 10.0 ** (2 - np.floor(np.log10(np.where(size > 0, size, 1.0))))
    return list((np.round(column * scale) / scale).tolist())
