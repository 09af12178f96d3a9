"""Held-out texts, looked up among the prompts of training: to be told is enough.

A model that is evaluated on what it trains on seems better than it is. Whoever wants to see whether
it can learn a few prompts by heart does that on purpose, so a run warns, counts and goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mesh.types import Prompt

REMEDY = (
    "evaluations then measure memory too: keep those prompts out of train_prompts, or out of "
    "eval_prompts (mesh.tasks.draw has both by a hash), unless this is meant"
)


class HeldOut:
    """Owns the texts of all evaluation sets, and whether it was warned of one.

    Ranks draw the same prompts, so they count and warn alike.
    """

    def __init__(self, prompts: Iterable[Prompt] = ()) -> None:
        self.texts = frozenset(prompt.question for prompt in prompts)
        self.warned = False

    def among(self, prompts: Sequence[Prompt]) -> list[int]:
        """Indices of the prompts whose text is held out."""
        return [index for index, prompt in enumerate(prompts) if prompt.question in self.texts]

    def metrics(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """The number of these prompts that are held out; none where nothing is evaluated."""
        return {"prompts/held_out": float(len(self.among(prompts)))} if self.texts else {}

    def warning(self, prompts: Sequence[Prompt], name: str) -> list[str]:
        """A line, the first time that one of the prompts is held out. name: of the prompts, as in
        "prompts of step 1"."""
        found = self.among(prompts)
        if not found or self.warned:
            return []
        self.warned = True
        first = f"prompt {found[0]} ({prompts[found[0]].question[:200]!r})"
        which = f"{len(found)} of {len(prompts)} {name} are held-out prompts, the first is {first}"
        return [f"warning: {which}; {REMEDY}; prompts/held_out counts them"]
