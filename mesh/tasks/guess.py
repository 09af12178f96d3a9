"""A guessing game: a number from 3 to 60, say, is to be found; each guess is answered by `higher`
or `lower`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.tasks.draw import held_out_prompts, training_prompts
from mesh.tasks.response import Response, Score
from mesh.types import Message, Prompt, Reply, TurnText

HIGHER, LOWER, NO_GUESS = "higher", "lower", "guess one number"
CHAT = (
    "I think of a number from {low} to {high}. Guess it: answer with one number, and I say whether "
    "mine is higher or lower."
)


@dataclass(frozen=True)
class Guess:
    """A number between two that are drawn from 1 to `largest`, to be found in `guesses` turns.

    The first guess is worth 1, the last one that is allowed 0.5, a number not found nothing. The
    part `guesses` counts them. Plain text by default, `3-60:30? higher 45? ...`, in which a
    question mark ends a guess; `chat` makes a message of each question and each reply.
    """

    seed: int
    largest: int = 99
    guesses: int = 8
    chat: bool = False

    def __post_init__(self) -> None:
        if self.largest < 2:
            raise ValueError(f"task_args.largest={self.largest}: must be at least 2")
        if self.guesses < 1:
            raise ValueError(f"task_args.guesses={self.guesses}: must be at least 1")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return () if self.chat else ("?",)

    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        return self._asked(training_prompts(self._draw, self.seed, step, num, round))

    def eval_prompts(self, num: int) -> list[Prompt]:
        return self._asked(held_out_prompts(self._draw, num))

    def solution(self, prompt: Prompt) -> list[tuple[Reply, bool]]:
        """Halving: always the number in the middle."""
        low, high, secret = prompt.info["low"], prompt.info["high"], int(prompt.answer)
        turns: list[tuple[Reply, bool]] = []
        for _ in range(self.guesses):
            guess = (low + high) // 2
            turns.append((str(guess) if self.chat else f"{guess}?", True))
            if guess == secret:
                break
            turns.append((self._said(HIGHER if guess < secret else LOWER), False))
            low, high = (guess + 1, high) if guess < secret else (low, guess - 1)
        return turns if turns[-1][1] else turns[:-1]

    def reply(self, prompt: Prompt, turns: Sequence[TurnText]) -> str | Message | None:
        guess, secret = number_in(turns[-1].text), int(prompt.answer)
        if guess == secret or sum(turn.sampled for turn in turns) == self.guesses:
            return None
        if guess is None:
            return self._said(NO_GUESS)
        return self._said(HIGHER if guess < secret else LOWER)

    def score(self, prompt: Prompt, response: Response) -> Score:
        guesses = sum(turn.sampled for turn in response.turns)
        found = number_in(response) == int(prompt.answer)
        late = (guesses - 1) / max(2 * (self.guesses - 1), 1)
        return Score(found * (1 - late), {"guesses": float(guesses)}, found)

    def _draw(self, prompt_id: int, numbers: random.Random) -> Prompt:
        low, high = sorted(numbers.sample(range(1, self.largest + 1), 2))
        secret = str(numbers.randint(low, high))
        return Prompt(prompt_id, f"{low}-{high}:", secret, info={"low": low, "high": high})

    def _asked(self, prompts: list[Prompt]) -> list[Prompt]:
        """As messages, if that is asked for: a question is held out in either form."""
        if not self.chat:
            return prompts
        asked = [{"role": "user", "content": CHAT.format(**prompt.info)} for prompt in prompts]
        return [
            Prompt(p.prompt_id, "", p.answer, messages=[message], info=p.info)
            for p, message in zip(prompts, asked, strict=True)
        ]

    def _said(self, text: str) -> str | Message:
        return {"role": "user", "content": text} if self.chat else f" {text} "


def number_in(turn: str) -> int | None:
    """The number that a turn guesses; None where it has none, or several."""
    numbers = re.findall(r"[0-9]+", turn)
    return int(numbers[0]) if len(numbers) == 1 and len(numbers[0]) < 10 else None
