"""Addition and subtraction: the answer to `12+34=` is `46`."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mesh.tasks.draw import held_out_prompts, training_prompts
from mesh.types import Prompt


@dataclass(frozen=True)
class Arithmetic:
    """Two numbers of exactly `digits` digits, added or subtracted as `operations` allows."""

    seed: int
    digits: int = 2
    operations: str = "+-"

    def __post_init__(self) -> None:
        if self.digits < 1:
            raise ValueError(f"task_args.digits={self.digits}: must be at least 1")
        if not self.operations or set(self.operations) - set("+-"):
            raise ValueError(f"task_args.operations={self.operations!r}: use '+', '-' or '+-'")

    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        return training_prompts(self._draw, self.seed, step, num, round)

    def eval_prompts(self, num: int) -> list[Prompt]:
        return held_out_prompts(self._draw, num)

    def solution(self, prompt: Prompt) -> str:
        return prompt.answer

    def score(self, prompt: Prompt, response: str) -> float:
        return float(response.strip() == prompt.answer)

    def _draw(self, prompt_id: int, numbers: random.Random) -> Prompt:
        left, right = self._number(numbers), self._number(numbers)
        operation = numbers.choice(self.operations)
        result = left + right if operation == "+" else left - right
        return Prompt(prompt_id, text=f"{left}{operation}{right}=", answer=str(result))

    def _number(self, numbers: random.Random) -> int:
        # 0 counts as a number of one digit; longer numbers have no leading zero
        lowest = 0 if self.digits == 1 else 10 ** (self.digits - 1)
        return numbers.randrange(lowest, 10**self.digits)
