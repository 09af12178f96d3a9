"""The procedural data sets of reasoning_gym, each by its name, behind one door.

    task=reasoning_gym task_args.name=chain_sum task_args.max_terms=2

A question is the item `index` of the data set that the package makes from a seed, and that seed is
a hash of (seed, step, round, attempt): nothing is kept. As in the built-in tasks one question in
eight is held out, by a hash of its text: training draws again where it hits one. The other keys are
those of the package's own configuration of the data set.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal, get_type_hints

from mesh.config.spelling import meant
from mesh.tasks.draw import is_held_out
from mesh.tasks.judges import in_box
from mesh.tasks.numerals import last_number
from mesh.tasks.order import key_of
from mesh.tasks.response import Response, Score
from mesh.types import Prompt

SIZE = 512
"""Items of one data set: some make all of them at once."""

OURS = ("seed", "size")
"""Settings that the run decides."""

MOST_ATTEMPTS = 200
"""Questions drawn in the place of held-out ones, before all seem to be held out."""

OF_A_HASH = frozenset({
    "codeio", "isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication",
    "ransom_note", "word_ladder",
})  # fmt: skip
"""Data sets of reasoning_gym 0.1.25 that go through a set of texts: some or all of their questions
are other ones in a Python with another hash."""

OF_DATA_SETS = "composite"

Item = Mapping[str, Any]


@dataclass(frozen=True)
class ReasoningGym:
    """The data set `name` with its own `settings`. stages: settings from a step on, over those
    before; the last one is evaluated. extract: what of a response is the answer.
    """

    seed: int
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    stages: dict[int, dict[str, Any]] = field(default_factory=dict)
    template: str = "{question}"
    extract: Literal["all", "tag", "boxed", "number"] = "all"

    def __post_init__(self) -> None:
        if "{question}" not in self.template:
            wrong = "it has no {question}, which is where the question stands; write it there"
            raise ValueError(f"task_args.template={self.template!r}: {wrong}")
        hints = setting_hints(self.name)
        for step, settings in self.stages.items():
            for key in [key for key in settings if key not in hints]:
                wrong = f"{self.name} has no such setting; {choices(key, hints)}"
                raise ValueError(f"task_args.stages.{step}.{key}={settings[key]!r}: {wrong}")
        for step in (0, *self.stages):
            self._dataset(step, 0)

    @classmethod
    def scored_apart(cls, args: Mapping[str, Any]) -> bool:
        return True

    @classmethod
    def more_keys(cls, args: Mapping[str, Any]) -> dict[str, Any]:
        """Types of further keys of `task_args`, which become `settings`."""
        return setting_hints(str(args["name"])) if "name" in args else {}

    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        stage = max((first for first in self.stages if first <= step), default=0)
        return [self._drawn(stage, step, round, index) for index in range(num)]

    def eval_prompts(self, num: int) -> list[Prompt]:
        found = self._held_out(num)
        if len(found) < num:
            raise ValueError(
                f"eval.num_prompts={num}: found only {len(found)} held-out questions of "
                f"{self.name}; ask for at most {len(found)}, or widen it with task_args"
            )
        return list(found)

    def solution(self, prompt: Prompt) -> str:
        if not prompt.answer:
            raise ValueError(f"{self.name} has no answers to teach, only a score of each response")
        return prompt.answer

    def score(self, prompt: Prompt, response: Response) -> Score:
        stage, made, index = (prompt.info[key] for key in ("stage", "made", "index"))
        answer, reward = extracted(response, self.extract), 0.0
        item = self._item(stage, made, index)
        if item["question"] != prompt.info["question"]:
            raise ValueError(
                f"{self.name} made another question of the same seed: it depends on the order of a "
                "set, which is another in each Python; train on another data set"
            )
        if answer is not None:
            with silent():
                reward = float(self._dataset(stage, made).score_answer(answer, dict(item)))
        parts = {} if self.extract == "all" else {"format": float(answer is not None)}
        return Score(reward, parts, reward >= 1.0, answer or "")

    def _drawn(self, stage: int, step: int, round: int, index: int) -> Prompt:
        for attempt in range(MOST_ATTEMPTS):
            key = key_of("train", self.seed, step, round, attempt, index // SIZE)
            prompt = self._prompt(stage, key, index % SIZE, index)
            if not is_held_out(prompt.info["question"]):
                return prompt
        raise ValueError(
            f"task_args: {MOST_ATTEMPTS} draws of {self.name} gave no question to train on: all "
            "are held out for evaluation; widen it with task_args"
        )

    def _prompt(self, stage: int, key: int, index: int, prompt_id: int) -> Prompt:
        made = key % (1 << 31)
        item = self._item(stage, made, index)
        text = self.template.replace("{question}", item["question"])
        info = {"stage": stage, "made": made, "index": index, "question": item["question"]}
        return Prompt(prompt_id, text, str(item["answer"] or ""), info=info)

    @cached_property
    def _held_out(self) -> Callable[[int], list[Prompt]]:
        return lru_cache(maxsize=2)(self._find_held_out)

    def _find_held_out(self, num: int) -> list[Prompt]:
        """The first `num` different held-out questions, or all that many draws find."""
        found: dict[str, Prompt] = {}
        for place in range(1000 + 200 * num):
            if len(found) == num:
                break
            key = key_of("held-out", place // SIZE)
            prompt = self._prompt(max(self.stages, default=0), key, place % SIZE, len(found))
            if is_held_out(prompt.info["question"]):
                found.setdefault(prompt.info["question"], prompt)
        return list(found.values())

    @cached_property
    def _dataset(self) -> Callable[[int, int], Any]:
        return lru_cache(maxsize=8)(self._make)

    @cached_property
    def _item(self) -> Callable[[int, int, int], Item]:
        return lru_cache(maxsize=256)(self._make_item)

    def _make(self, stage: int, made: int) -> Any:
        """The package's data set of a stage, from a seed."""
        settings = dict(self.settings)
        for first in sorted(self.stages):
            settings |= self.stages[first] if first <= stage else {}
        with silent():
            try:
                return library().create_dataset(self.name, seed=made, size=SIZE, **settings)
            except (AssertionError, ValueError, TypeError, KeyError) as error:
                wrong = f"reasoning_gym refuses its settings: {error}"
                raise ValueError(f"task_args.name={self.name}: {wrong}; correct them") from error

    def _make_item(self, stage: int, made: int, index: int) -> Item:
        with silent():
            return self._dataset(stage, made)[index]


def extracted(response: str, how: str) -> str | None:
    """The answer in a response; None: it has none of that form."""
    if how == "tag":
        found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", response, re.DOTALL)
        return found[-1].strip() if found else None
    if how == "boxed":
        return in_box(response)
    if how == "number":
        number = last_number(response)
        whole = number is not None and number.denominator == 1
        return None if number is None else str(number if whole else float(number))
    return response.strip()


def setting_hints(name: str) -> dict[str, Any]:
    """Types of the settings of a data set, by name. Raises ValueError where there is none of it."""
    sets = library().factory.DATASETS
    if name not in sets:
        wrong = f"reasoning_gym has no such data set; {choices(name, sorted(sets))}"
        raise ValueError(f"task_args.name={name}: {wrong}")
    if name in OF_A_HASH:
        wrong = "its questions depend on the order of a set, which is another in each process"
        raise ValueError(f"task_args.name={name}: {wrong}; use another data set")
    if name == OF_DATA_SETS:
        wrong = "it is made of other data sets, which keys cannot give"
        raise ValueError(f"task_args.name={name}: {wrong}; name one of them")
    hints = get_type_hints(sets[name][1])
    return {key: hint for key, hint in hints.items() if key not in OURS}


def choices(word: str, among: Any) -> str:
    return f"{meant(word, among)}it has {', '.join(among)}"


def library() -> Any:
    """reasoning_gym. Raises ValueError where it is not installed."""
    try:
        import reasoning_gym
    except ImportError as error:
        remedy = "pip install reasoning-gym, or use another task"
        raise ValueError(f"task=reasoning_gym: it is not installed ({error}); {remedy}") from error
    return reasoning_gym


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what the package's own questions print, as some that run programs do."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
