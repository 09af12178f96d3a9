"""Drawing questions by counter, and the one rule that says which questions are held out.

A prompt is a hash of (task seed, step, index) and nothing else: there is no generator whose state
would have to be saved, so a resumed run and another rank layout see the same prompts.

Whether a question is held out depends on its text alone, not on the seed, so a model trained with
one seed can be evaluated with another and no question leaks from training into evaluation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

from mesh.types import Prompt

Draw = Callable[[int, random.Random], Prompt]
"""Makes the prompt with this prompt_id from these random numbers."""

HELD_OUT_ONE_IN = 8
MOST_DRAWS = 1000


def training_prompts(draw: Draw, seed: int, step: int, num: int, round: int = 0) -> list[Prompt]:
    """The `num` training prompts of one round of a step; a question may come up twice.

    Their ids go on after those of the rounds before. Raises ValueError where every question seems
    to be held out.
    """
    first = round * num
    return [_training_prompt(draw, seed, step, first + index) for index in range(num)]


def held_out_prompts(draw: Draw, num: int) -> list[Prompt]:
    """The first `num` distinct held-out prompts: the same for every seed, so runs compare.

    Raises ValueError where the draws do not yield that many.
    """
    found: dict[str, Prompt] = {}
    for attempt in range(1000 + 200 * num):
        if len(found) >= num:
            break
        prompt = draw(len(found), _counter_random("held-out", attempt))
        if is_held_out(prompt.text):
            found.setdefault(prompt.text, prompt)
    if len(found) < num:
        raise ValueError(
            f"eval.num_prompts={num}: found only {len(found)} held-out questions; "
            f"ask for at most {len(found)}, or widen the task with task_args"
        )
    return list(found.values())


def is_held_out(question: str) -> bool:
    """One question in `HELD_OUT_ONE_IN` is for evaluation only."""
    return _hash("question", question) % HELD_OUT_ONE_IN == 0


def _training_prompt(draw: Draw, seed: int, step: int, index: int) -> Prompt:
    """ValueError where `MOST_DRAWS` draws give held-out questions alone."""
    numbers = _counter_random("train", seed, step, index)
    for _ in range(MOST_DRAWS):
        prompt = draw(index, numbers)
        if not is_held_out(prompt.text):
            return prompt
    raise ValueError(
        f"task_args: {MOST_DRAWS} draws gave no question to train on, all are held out for "
        f"evaluation, e.g. {prompt.text!r}; widen the task with task_args"
    )


def _counter_random(*counter: int | str) -> random.Random:
    return random.Random(_hash(*counter))


def _hash(*parts: int | str) -> int:
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
