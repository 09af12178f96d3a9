"""Spelling a random word backward: the answer to `abc>` is `cba`."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from mesh.tasks.draw import held_out_prompts, training_prompts
from mesh.types import Prompt


@dataclass(frozen=True)
class SpellBackward:
    """Words of `min_length` to `max_length` lower-case letters, all lengths equally likely."""

    seed: int
    min_length: int = 3
    max_length: int = 5

    def __post_init__(self) -> None:
        if self.min_length < 1:
            raise ValueError(f"task_args.min_length={self.min_length}: must be at least 1")
        if self.max_length < self.min_length:
            raise ValueError(
                f"task_args.max_length={self.max_length} is below "
                f"task_args.min_length={self.min_length}: raise one or lower the other"
            )

    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        return training_prompts(self._draw, self.seed, step, num, round)

    def eval_prompts(self, num: int) -> list[Prompt]:
        return held_out_prompts(self._draw, num)

    def solution(self, prompt: Prompt) -> str:
        return prompt.answer

    def score(self, prompt: Prompt, response: str) -> float:
        return float(response.strip() == prompt.answer)

    def _draw(self, prompt_id: int, numbers: random.Random) -> Prompt:
        length = numbers.randint(self.min_length, self.max_length)
        word = "".join(numbers.choices(string.ascii_lowercase, k=length))
        return Prompt(prompt_id, text=f"{word}>", answer=word[::-1])
