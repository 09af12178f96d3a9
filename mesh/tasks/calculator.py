"""Sums and products with a tool: the answer to `12*7=` is `<calc>12*7</calc>`, to which the tool
adds `=84;`, and then `84`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from mesh.tasks.draw import held_out_prompts, training_prompts
from mesh.tasks.expression import evaluated
from mesh.tasks.response import Response, Score
from mesh.types import Prompt, TurnText

CALL, END = "<calc>", "</calc>"
ERROR = "=error;"
INSTRUCTION = (
    "What is {question}? Write <calc>{question}</calc> and the value is added behind it. Then "
    "answer with the number alone."
)
NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")


@dataclass(frozen=True)
class Calculator:
    """Two to `terms` numbers of one to `digits` digits, joined by one of the `operations`.

    A reward of 1 for an answer whose last number is right, used the tool or not; the part `used` is
    1 where the tool gave a value. `instruct` asks in a sentence that says how the tool is used,
    for models that read English.
    """

    seed: int
    digits: int = 2
    terms: int = 2
    operations: str = "+*"
    instruct: bool = False
    stop_strings: ClassVar[tuple[str, ...]] = (END,)

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 9:
            raise ValueError(f"task_args.digits={self.digits}: must be 1 to 9")
        if not 2 <= self.terms <= 5:
            raise ValueError(f"task_args.terms={self.terms}: must be 2 to 5")
        if not self.operations or set(self.operations) - set("+-*"):
            raise ValueError(
                f"task_args.operations={self.operations!r}: use some of '+', '-' and '*'"
            )

    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        return self._asked(training_prompts(self._draw, self.seed, step, num, round))

    def eval_prompts(self, num: int) -> list[Prompt]:
        return self._asked(held_out_prompts(self._draw, num))

    def solution(self, prompt: Prompt) -> list[tuple[str, bool]]:
        call = f"{CALL}{prompt.info['question']}{END}"
        return [(call, True), (result(call) or "", False), (prompt.answer, True)]

    def reply(self, prompt: Prompt, turns: Sequence[TurnText]) -> str | None:
        return result(turns[-1].text)

    def score(self, prompt: Prompt, response: Response) -> Score:
        numbers = [] if result(response) is not None else NUMBER.findall(response)
        right = bool(numbers) and numbers[-1].replace(",", "") == prompt.answer
        used = any(not turn.sampled and turn.text != ERROR for turn in response.turns)
        return Score(float(right), {"used": float(used)}, right)

    def _draw(self, prompt_id: int, numbers: random.Random) -> Prompt:
        terms = [str(self._number(numbers)) for _ in range(numbers.randint(2, self.terms))]
        question = numbers.choice(self.operations).join(terms)
        answer = str(evaluated(question))
        return Prompt(prompt_id, f"{question}=", answer, info={"question": question})

    def _number(self, numbers: random.Random) -> int:
        digits = numbers.randint(1, self.digits)
        return numbers.randrange(10 ** (digits - 1), 10**digits)

    def _asked(self, prompts: list[Prompt]) -> list[Prompt]:
        """In a sentence, if that is asked for: a question is held out in either form."""
        if not self.instruct:
            return prompts
        return [replace(p, text=INSTRUCTION.format(question=p.info["question"])) for p in prompts]


def result(turn: str) -> str | None:
    """Text that the tool adds to a turn that ends with a call; None: it calls nothing."""
    _, call, rest = turn.rpartition(CALL)
    expression, end, _ = rest.partition(END)
    if not (call and end):
        return None
    try:
        return f"={evaluated(expression)};"
    except ValueError:
        return ERROR
