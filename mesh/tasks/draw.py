"""Counter-based drawing of questions, and the rule that holds some of them out.

A prompt is a function of (task seed, step, index) alone: there is no generator state to save, so a
resumed run and another rank layout see the same prompts.

A question is held out by its text alone, not by the seed, so a model trained with one seed can be
evaluated with another, and no question leaks from training into evaluation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

from mesh.types import Prompt

MakePrompt = Callable[[int, random.Random], Prompt]
"""Makes the prompt with a given prompt_id from random numbers."""

HELD_OUT_ONE_IN = 8
MAX_DRAWS = 1000


def training_prompts(
    draw: MakePrompt, seed: int, step: int, num: int, round: int = 0
) -> list[Prompt]:
    """The `num` training prompts of one round of a step; questions may repeat.

    Raises ValueError if every question seems to be held out.
    """
    counter = ("train", seed, step, round) if round else ("train", seed, step)
    return [_training_prompt(draw, index, counter) for index in range(num)]


def held_out_prompts(draw: MakePrompt, num: int) -> list[Prompt]:
    """The first `num` distinct held-out prompts, the same for every seed: runs are comparable.

    Raises ValueError if the draws do not yield that many.
    """
    found: dict[str, Prompt] = {}
    for attempt in range(1000 + 200 * num):
        if len(found) >= num:
            break
        prompt = draw(len(found), _counter_random("held-out", attempt))
        if is_held_out(prompt.question):
            found.setdefault(prompt.question, prompt)
    if len(found) < num:
        raise ValueError(
            f"eval.num_prompts={num}: found only {len(found)} held-out questions; "
            f"ask for at most {len(found)}, or widen the task with task_args"
        )
    return list(found.values())


def is_held_out(question: str) -> bool:
    """True for one question in `HELD_OUT_ONE_IN`, which is for evaluation only."""
    return _hash("question", question) % HELD_OUT_ONE_IN == 0


def _training_prompt(draw: MakePrompt, index: int, counter: tuple[int | str, ...]) -> Prompt:
    """Draw a question that is not held out. Raises ValueError after `MAX_DRAWS` draws."""
    numbers = _counter_random(*counter, index)
    for _ in range(MAX_DRAWS):
        prompt = draw(index, numbers)
        if not is_held_out(prompt.question):
            return prompt
    raise ValueError(
        f"task_args: {MAX_DRAWS} draws gave no question to train on: all are held out for "
        f"evaluation, e.g. {prompt.question!r}; widen the task with task_args"
    )


def _counter_random(*counter: int | str) -> random.Random:
    return random.Random(_hash(*counter))


def _hash(*parts: int | str) -> int:
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
