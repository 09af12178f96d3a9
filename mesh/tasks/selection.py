"""The rows of a data set that are trained on, and those that are held out.

Everything is looked at once, before a model is built: each row gives a prompt, whose answer the
judge can read, and no question is in both parts. Kept are numbers of rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.config.schema import resolve_path
from mesh.tasks.columns import Columns, RowPrompt, UnusableRow
from mesh.tasks.judges import Judge
from mesh.tasks.order import key_of, shares
from mesh.tasks.rows import SUFFIXES, Joined, Rows, listed, read_rows

USUAL_SHARE, USUAL_ROWS = 10, 256
"""Without task_args.held_out one question in ten is held out, and at most so many."""

SPLIT = "train"  # what is read where task_args.split names no other
SHOWN = 60  # characters of an answer in a message


@dataclass(frozen=True)
class Parts:
    """Sources of a data set: `paths` with `weights` (none: all rows are one set), and what of it is
    held out and limited. The meaning of each is that of the key of `task_args`.
    """

    paths: Sequence[str]
    weights: Sequence[float]
    subset: str
    split: str
    held_out: str
    held_out_rows: int | None
    limit: int | None
    columns: Columns
    judge: str


@dataclass(frozen=True)
class Source:
    """The rows of one set, and which of their columns is what. key: of `task_args`, with its value,
    that messages name."""

    key: str
    rows: Rows
    columns: Columns

    @property
    def problems(self) -> list[str]:
        """Columns that are named and not there; the first key is the one that matters."""
        return [f"{line} (in {self.key})" for line in self.columns.problems(self.rows.columns)]


@dataclass(frozen=True)
class Selection:
    """Rows by set. train: of each set, the numbers of its rows; held_out: (set, row) of different
    questions, in an order that no seed changes; counts: draws of each set in a block of a mixture;
    notes: what is to be said of the data.

    The held-out rows of a file of their own are in the last set, which has no row in `train`.
    """

    sets: Sequence[Source]
    train: Sequence[Sequence[int]]
    held_out: Sequence[tuple[int, int]]
    counts: tuple[int, ...]
    notes: Sequence[str]

    def prompt(self, which: int, row: int, prompt_id: int) -> RowPrompt:
        """The prompt of a row that was looked at."""
        one = self.sets[which]
        return one.columns.prompt_of(one.rows[row], one.rows.place(row), prompt_id)


Questions = dict[int, list[tuple[int, int]]]
"""The rows (set, row) that ask a question, by the question's key."""


def select(parts: Parts, judge: Judge, allow_overlap: bool) -> Selection:
    """Read and check all rows. Raises ValueError that lists what cannot be used."""
    sets, apart = training_sets(parts), held_out_set(parts)
    every = sets if apart is None else [*sets, apart]
    problems = [line for one in every for line in one.problems]
    train: Questions = {}
    held: Questions = {}
    for which, one in enumerate([] if problems else every):
        into, limit = (train, parts.limit) if which < len(sets) else (held, None)
        problems += look(one, which, judge, parts.judge, into, limit)
    if problems:
        raise ValueError("\n".join(problems))
    if apart is None:
        held = taken_out(train, parts)
    elif both := [key for key in held if key in train]:
        refuse_overlap(both, train, held, every, parts, allow_overlap)
    notes = [*repeated(train, every, "trained on"), *repeated(held, every, "held out")]
    chosen = [array("Q") for _ in sets]
    for which, row in sorted(at for rows in train.values() for at in rows):
        chosen[which].append(row)
    held_out = [held[key][0] for key in sorted(held)]
    counts = shares_of(parts) if parts.weights else (len(chosen[0]),)
    total = sum(map(len, chosen))
    first = f"data: {total} rows to train on, {len(held_out)} questions held out"
    return Selection(every, chosen, held_out, counts, [first, *notes])


def training_sets(parts: Parts) -> list[Source]:
    """One set for each weight; without weights one of all paths."""
    if parts.split != SPLIT and all(resolve_path(path).is_file() for path in parts.paths):
        wrong = f"{parts.paths[0]} is a file, which has no splits"
        raise ValueError(f"task_args.split={parts.split}: {wrong}; leave out task_args.split")
    read = [source(f"task_args.path={p}", p, parts.split, parts) for p in parts.paths]
    if parts.weights or len(read) == 1:
        return read
    return [Source("task_args.path", Joined([one.rows for one in read]), read[0].columns)]


def held_out_set(parts: Parts) -> Source | None:
    """The rows of task_args.held_out: a path, or another split of the paths."""
    name = parts.held_out
    if not name:
        return None
    if resolve_path(name).exists() or name.endswith(SUFFIXES):
        return source(f"task_args.held_out={name}", name, parts.split, parts)
    files = [path for path in parts.paths if resolve_path(path).is_file()]
    if files:
        wrong = f"there is no such file, and {files[0]}, which is a file, has no splits"
        remedy = "name a file, or leave it out and set task_args.held_out_rows"
        raise ValueError(f"task_args.held_out={name}: {wrong}; {remedy}")
    read = [source(f"task_args.held_out={name}", path, name, parts) for path in parts.paths]
    return Source(read[0].key, Joined([one.rows for one in read]), read[0].columns)


def source(key: str, path: str, split: str, parts: Parts) -> Source:
    """The rows of a path. Raises ValueError that begins with `key`."""
    try:
        rows = read_rows(path, split, parts.subset)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return Source(key, rows, parts.columns.among(rows.columns))


def look(
    one: Source, which: int, judge: Judge, name: str, into: Questions, limit: int | None
) -> list[str]:
    """Put the rows of a set into `into`; a line for those that give no prompt, and for those whose
    answer the judge cannot read.
    """
    unusable, unread = [], []
    for row in range(len(one.rows))[:limit]:
        place = one.rows.place(row)
        try:
            prompt = one.columns.prompt_of(one.rows[row], place, 0)
        except UnusableRow as error:
            unusable.append(f"{place}, {error}")
            continue
        if wrong := judge.answer_problem(prompt.answer):
            column = one.columns.answer or one.columns.messages
            unread.append(f"{place}, column {column}: {prompt.answer[:SHOWN]!r}: {wrong}")
        key = key_of("question", " ".join(prompt.question.split()))
        into.setdefault(key, []).append((which, row))
    found = []
    if unusable:
        found.append(f"{one.key}: {listed(unusable, 'correct or remove it')}")
    if unread:
        remedy = "correct it, or name another judge (task_args.judge)"
        said = listed(unread, remedy)
        found.append(f"{one.key}: judge={name} cannot read {counted(len(unread))}: {said}")
    return found


def taken_out(train: Questions, parts: Parts) -> Questions:
    """Questions that are held out of `train`, from which they are taken: those of the smallest
    keys, so that they are the same for every seed. Raises ValueError where none would be left.
    """
    usual = min(USUAL_ROWS, max(1, len(train) // USUAL_SHARE))
    num = parts.held_out_rows or usual
    if num >= len(train):
        wrong = f"the number of different questions is {len(train)}, and none is left to train on"
        raise ValueError(f"task_args.held_out_rows={num}: {wrong}; hold out less")
    return {key: train.pop(key) for key in sorted(train)[:num]}


def refuse_overlap(
    both: Sequence[int],
    train: Questions,
    held: Questions,
    every: Sequence[Source],
    parts: Parts,
    allowed: bool,
) -> None:
    """Raise ValueError where questions are in both parts and may not be."""
    if allowed:
        return
    places = [every[which].rows.place(row) for which, row in (held[both[0]][0], train[both[0]][0])]
    wrong = f"{len(both)} of its {len(held)} questions are trained on too"
    remedy = "take them out of one, or set task_args.allow_overlap=true, which leaves them in both"
    raise ValueError(
        f"task_args.held_out={parts.held_out}: {wrong}, the first in {' and in '.join(places)}; "
        f"{remedy}"
    )


def repeated(questions: Questions, every: Sequence[Source], what: str) -> list[str]:
    """A line that counts the rows which ask what another row asks."""
    more = [rows for rows in questions.values() if len(rows) > 1]
    if not more:
        return []
    extra = sum(len(rows) - 1 for rows in more)
    first = " and ".join(every[which].rows.place(row) for which, row in more[0][:2])
    repeats = "1 repeated question" if extra == 1 else f"{extra} repeated questions"
    return [f"data: {repeats} among the rows {what}, as {first}"]


def shares_of(parts: Parts) -> tuple[int, ...]:
    """Draws of each set in a block of a mixture."""
    try:
        return shares(parts.weights)
    except ValueError as error:
        raise ValueError(f"task_args.path: {error}; use weights of one order") from error


def counted(num: int) -> str:
    return "1 row" if num == 1 else f"{num} rows"
