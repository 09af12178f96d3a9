"""A data set as a task: its rows are the prompts, and a judge scores them.

    task=dataset task_args.path=train.jsonl task_args.judge=number

A draw is a function of (seed, step, round, index), see `mesh/tasks/order.py`. The rows are read
when the first prompt is asked for, so a process that only scores reads none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mesh.tasks.columns import Columns, template_problems
from mesh.tasks.judges import JUDGES, judge_named, settings_of
from mesh.tasks.order import Epochs, Mixture
from mesh.tasks.response import Response
from mesh.tasks.selection import SPLIT, Parts, Selection, select
from mesh.types import Prompt


@dataclass(frozen=True)
class Dataset:
    """Rows of `path`: a file, a directory, a hub name, a list of them, or a mapping to weights."""

    seed: int
    path: str | list[str] | dict[str, float]
    subset: str = ""
    split: str = SPLIT
    held_out: str = ""
    held_out_rows: int | None = None
    prompt: str = ""
    messages: str = ""
    template: str = ""
    system: str = ""
    answer: str = ""
    solution_column: str = ""
    info: list[str] = field(default_factory=list)
    judge: str = "exact"
    judge_args: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    shuffle: bool = True
    allow_overlap: bool = False

    def __post_init__(self) -> None:
        problems = template_problems(self.template) if self.template else []
        problems += [
            f"task_args.{name}={value}: must be at least 1"
            for name, value in (("held_out_rows", self.held_out_rows), ("limit", self.limit))
            if value is not None and value < 1
        ]
        if self.held_out and self.held_out_rows is not None:
            wrong = f"the rows of task_args.held_out={self.held_out} are held out"
            problems.append(f"task_args.held_out_rows={self.held_out_rows}: {wrong}; give one")
        if isinstance(self.path, dict):
            problems += [
                f"task_args.path: the weight of {path} is {weight:g}; give one above 0"
                for path, weight in self.path.items()
                if not 0 < weight < float("inf")
            ]
        if not self.path:
            problems.append("task_args.path is empty; name a file, a directory or a hub name")
        try:
            _ = self._judge
        except ValueError as error:
            problems += str(error).splitlines()
        if problems:
            raise ValueError("\n".join(problems))

    @classmethod
    def scored_apart(cls, args: Any) -> bool:
        """True where the judge may hang: a user's own, or another library's."""
        name = str(args.get("judge", cls.judge))
        return ":" in name or (name in JUDGES and JUDGES[name].apart)

    @property
    def user_modules(self) -> list[str]:
        """Modules of user code that it calls: a judge's."""
        return [self.judge.partition(":")[0]] if ":" in self.judge else []

    def prepare(self) -> None:
        """Read and check all rows. Raises ValueError that lists what cannot be used."""
        _ = self._selection

    def notes(self) -> list[str]:
        """Lines on what was found in the data, for the start to say."""
        return list(self._selection.notes)

    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        return [self._drawn(step, num, round, index) for index in range(num)]

    def eval_prompts(self, num: int) -> list[Prompt]:
        held_out = self._selection.held_out
        if num > len(held_out):
            raise ValueError(
                f"eval.num_prompts={num}: the number of different questions held out is "
                f"{len(held_out)}; use eval.num_prompts={len(held_out)}, or hold out more "
                "(task_args.held_out or task_args.held_out_rows)"
            )
        return [self._selection.prompt(*at, i) for i, at in enumerate(held_out[:num])]

    def num_held_out(self) -> int:
        return len(self._selection.held_out)

    def all_prompts(self) -> list[Prompt]:
        places = [(part, row) for part, rows in enumerate(self._selection.train) for row in rows]
        return [self._selection.prompt(*at, i) for i, at in enumerate(places)]

    def solution(self, prompt: Prompt) -> str:
        return prompt.teaches  # type: ignore[attr-defined]

    def score(self, prompt: Prompt, response: Response) -> Any:
        function, settings = self._judge
        return function(prompt.answer, response, **settings)

    def _drawn(self, step: int, num: int, round: int, index: int) -> Prompt:
        mixture, epochs = self._order
        if round:
            which, place = mixture.refill(step, round, index)
            row = epochs[which].refill(step, round, place)
        else:
            which, place = mixture.draw(step * num + index)
            row = epochs[which].row(place)
        return self._selection.prompt(which, self._selection.train[which][row], index)

    @cached_property
    def _judge(self) -> tuple[Any, dict[str, Any]]:
        judge = judge_named(self.judge)
        return judge.score, settings_of(self.judge, judge, self.judge_args)

    @cached_property
    def _order(self) -> tuple[Mixture, list[Epochs]]:
        chosen = self._selection
        epochs = [
            Epochs(len(rows), self.seed, self.shuffle, str(which))
            for which, rows in enumerate(chosen.train)
        ]
        return Mixture(chosen.counts, self.seed), epochs

    @cached_property
    def _selection(self) -> Selection:
        return select(self._parts(), judge_named(self.judge), self.allow_overlap)

    def _parts(self) -> Parts:
        columns = Columns(
            self.prompt, self.messages, self.template, self.system, self.answer,
            self.solution_column, tuple(self.info),
        )  # fmt: skip
        paths = [self.path] if isinstance(self.path, str) else list(self.path)
        weights = list(self.path.values()) if isinstance(self.path, dict) else []
        return Parts(
            paths, weights, self.subset, self.split, self.held_out, self.held_out_rows,
            self.limit, columns, self.judge,
        )  # fmt: skip


@dataclass(frozen=True)
class Gsm8k(Dataset):
    """GSM8K: `question`, and an `answer` that ends in `#### 72`."""

    path: str | list[str] | dict[str, float] = "openai/gsm8k"
    subset: str = "main"
    held_out: str = "test"
    template: str = "Question: {question}\nAnswer:"
    judge: str = "gsm8k"
