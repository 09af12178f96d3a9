"""Tasks of the runs whose report page is tested. No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.tasks.spell_backward import SpellBackward
from mesh.types import Prompt


@dataclass(frozen=True)
class Shortest(SpellBackward):
    """The shorter a response, the better: a reward with a hole, into which a policy collapses. No
    response is right."""

    def score(self, prompt: Prompt, response: str) -> float:
        return 0.5 / (1 + len(response))
