"""A task around another one, whose rewards differ a little by the response.

A model that answers everything rightly, or nothing, has rewards without a gradient, and steps that
change no weight would compare nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mesh.tasks import Draw, Task, draw_prompts, load_task, typed_args
from mesh.tasks.response import Response, Score
from mesh.types import Prompt

NAME = "mesh.exactness.uneven:Uneven"
OPTIONAL = ("reply", "stop_strings", "use_tokenizer", "all_prompts")
"""Members that a task may have, and that decide what is generated and drawn."""

SCALE = 2.0**-34  # of a 32-bit checksum: at most a quarter


@dataclass(frozen=True)
class Uneven:
    """The task `name` with its own settings `args`."""

    seed: int
    name: str
    args: dict[str, Any] = field(default_factory=dict)
    inner: Task = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", load_task(self.name, self.seed, self.args))

    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        return draw_prompts(self.inner, Draw(step, num, round))

    def eval_prompts(self, num: int) -> list[Prompt]:
        return self.inner.eval_prompts(num)

    def solution(self, prompt: Prompt) -> str | Sequence[Any]:
        return self.inner.solution(prompt)

    def score(self, prompt: Prompt, response: Response) -> float | Score:
        found = self.inner.score(prompt, response)
        more = zlib.crc32(response.transcript.encode()) * SCALE
        if isinstance(found, Score):
            return replace(found, reward=found.reward + more)
        return found + more

    def __getattr__(self, name: str) -> Any:
        if name not in OPTIONAL:
            raise AttributeError(name)
        return getattr(self.inner, name)


def uneven_keys(name: str, args: Mapping[str, Any], workers: int) -> dict[str, Any]:
    """The keys of a run on this task with uneven rewards, scored by as many processes."""
    wrapped = {"name": name, "args": typed_args(name, args)}
    return {"task": NAME, "task_args": wrapped, "reward.workers": workers}
