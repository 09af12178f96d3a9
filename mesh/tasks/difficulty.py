"""Running pass rates of questions, by which those that are too easy or too hard are not drawn.

A question is known by a hash of its text, and has to recur, as those of a data set do. Its pass
rate is the share of correct rollouts when it was drawn last, averaged with the rate before: each
visit weighs as much as all those before it. The rates are a function of the run's history, the same
on every rank, and a checkpoint holds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from mesh.tasks import Draw, Task, draw_prompts
from mesh.tasks.drawing import ROUNDS_OF_DRAW
from mesh.types import Prompt

MAX_ROUNDS = 100
"""Rounds in which other prompts are drawn for those that are of no use."""

assert MAX_ROUNDS**2 <= ROUNDS_OF_DRAW, "each prompt that replaces one may itself be replaced"

Known = Mapping[str, tuple[float, int]]
"""By the hash of a question: its pass rate, and the step in which it was drawn last."""


@dataclass(frozen=True)
class Bounds:
    """Pass rates from `lowest` to `highest`, both included, are drawn. A question that was not
    drawn for `forget` steps is as one that never was; 0: none is forgotten.
    """

    lowest: float = 0.0
    highest: float = 1.0
    forget: int = 0


class PassRates:
    """Owns what is known of the questions of a run. bounds None: nothing is asked, nor kept."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.bounds = bounds
        self.known: Known = MappingProxyType({})  # replaced, never changed: a checkpoint keeps it

    def unfit(self, prompts: Sequence[Prompt], step: int) -> list[int]:
        """Indices of prompts that are too easy or too hard to be drawn in a step."""
        bounds = self.bounds
        if bounds is None:
            return []
        rates = [self.rate(prompt.question, step) for prompt in prompts]
        return [
            index
            for index, rate in enumerate(rates)
            if rate is not None and not bounds.lowest <= rate <= bounds.highest
        ]

    def rate(self, question: str, step: int) -> float | None:
        """The pass rate of a question before a step; None: it is not known."""
        rate, last = self.known.get(name_of(question), (None, step))
        return None if self._forgotten(last, step) else rate

    def add(self, step: int, visits: Iterable[tuple[str, int, int]]) -> None:
        """Take in the (question, correct rollouts, rollouts) of a step; a question that was drawn
        several times counts once, with all of its rollouts."""
        sums: dict[str, tuple[int, int]] = {}
        for question, correct, total in visits:
            before = sums.get(question, (0, 0))
            sums[question] = before[0] + correct, before[1] + total
        known = {
            name: entry for name, entry in self.known.items() if not self._forgotten(entry[1], step)
        }
        for question, (correct, total) in sums.items():
            now, before_it = correct / total, self.rate(question, step)
            known[name_of(question)] = now if before_it is None else (before_it + now) / 2, step
        self.known = MappingProxyType(known)

    @property
    def kept(self) -> Known | None:
        """What a checkpoint holds; None: nothing is kept."""
        return None if self.bounds is None else self.known

    def restore(self, known: Known) -> None:
        """Continue with what was known then."""
        self.known = MappingProxyType(dict(known))

    def _forgotten(self, last: int, step: int) -> bool:
        forget = 0 if self.bounds is None else self.bounds.forget
        return 0 < forget < step - last


def name_of(question: str) -> str:
    """16 hex digits of a question."""
    data = question.encode(errors="surrogatepass")
    return hashlib.blake2b(data, digest_size=8).hexdigest()


class Offers:
    """Owns the rounds of one draw of a step: each gives other prompts, without those that are too
    easy or too hard as long as others are found.

    first: the prompts of its first round; skipped: prompts that were replaced for their pass rate;
    waived: those that were taken in spite of it.
    """

    def __init__(self, task: Task, draw: Draw, rates: PassRates) -> None:
        self.task, self.draw, self.rates = task, draw, rates
        self.rounds = self.skipped = self.waived = 0
        self.first: list[Prompt] = []

    def take(self, num: int) -> list[Prompt]:
        """`num` prompts that no round has given before."""
        prompts = self._next(num)
        self.first = self.first or list(prompts)
        places = self.rates.unfit(prompts, self.draw.step)
        for _ in range(1, MAX_ROUNDS):
            if not places:
                break
            self.skipped += len(places)
            others = self._next(len(places))
            for place, other in zip(places, others, strict=True):
                prompts[place] = other
            places = [places[i] for i in self.rates.unfit(others, self.draw.step)]
        self.waived += len(places)
        return prompts

    @property
    def metrics(self) -> dict[str, float]:
        """Empty where no pass rate is asked for."""
        if self.rates.bounds is None:
            return {}
        counts = {"difficulty/skipped": self.skipped, "difficulty/waived": self.waived}
        return {name: float(count) for name, count in counts.items()}

    def _next(self, num: int) -> list[Prompt]:
        self.rounds += 1
        return draw_prompts(self.task, Draw(self.draw.step, num, self.draw.round + self.rounds - 1))
