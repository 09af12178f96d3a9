"""An example of recipes/sft.py is the rollout of a policy that says the solution, token for token.

The policy says the characters of the solution one at a time and stops where generation would. Costs
about 2 s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizer import CHATML, IM_END, saved

from mesh.engine.base import Continuation
from mesh.engine.conversation import converse
from mesh.roles.conversation import Conversations, Limits
from mesh.tasks import TaskSpec, load_task
from mesh.tasks.prompts import PromptSource
from mesh.tasks.scorer import Scorer, ScoringSettings, TaskSource
from mesh.tasks.solution import solution_of
from mesh.tasks.stops import stop_strings
from mesh.text.encoding import PromptEncoder
from mesh.text.stopping import StopStrings
from mesh.text.tokenizer import CHARACTERS, load_tokenizer
from mesh.types import Completion, Prompt, Request, RolloutKey, Sampling, Turn

EOS = 1


@dataclass
class Saying:
    """An engine whose policy says these texts, a turn each, and then the end token."""

    texts: Mapping[RolloutKey, Sequence[str]]
    encoder: PromptEncoder
    end: int
    turns: list[RolloutKey] = field(default_factory=list)
    said: dict[RolloutKey, int] = field(default_factory=dict)
    kept: set[RolloutKey] = field(default_factory=set)

    @property
    def unfinished(self) -> bool:
        return bool(self.turns)

    def add(self, requests: Collection[Request], sampling: Sampling) -> None:
        self.sampling = sampling
        self.turns += [(r.prompt_id, i) for r in requests for i in range(r.num_samples)]

    def step(self) -> list[Completion]:
        running, self.turns = self.turns, []
        self.kept |= set(running)
        return [self._turn(key) for key in running]

    def extend(self, continuations: Collection[Continuation]) -> None:
        self.turns += [c.key for c in continuations]
        self.kept -= {c.key for c in continuations}

    def drop(self, keys: Collection[RolloutKey]) -> None:
        self.kept -= set(keys)

    def _turn(self, key: RolloutKey) -> Completion:
        number = self.said.get(key, 0)
        self.said[key] = number + 1
        tokens: list[int] = []
        for token in (*self.encoder.continuation(self.texts[key][number]), self.end):
            tokens.append(token)
            stops = self.sampling.stops
            if token in self.sampling.stop_tokens or (stops is not None and stops(tokens, 0)):
                break
        return Completion(*key, tuple(tokens), (0.0,) * len(tokens), "stop")


def both(name: str, args: dict[str, Any], directory: Path, end: int) -> list[tuple[Any, ...]]:
    """(tokens and turns of rollout, of example) of a task's questions."""
    task, tokenizer = load_task(name, 0, args), load_tokenizer(directory)
    encoder, ends = PromptEncoder(tokenizer), stop_strings(task)
    prompts: dict[int, Prompt] = dict(enumerate(task.train_prompts(0, 16)))
    scorer = Scorer(TaskSource(task, TaskSpec(name, 0, args), ScoringSettings(0, 9.0, "stop")))
    stops = StopStrings(ends, tokenizer) if ends else None
    sampling = Sampling(1.0, 999, 0, 0, stop_tokens=tokenizer.eos_ids, stops=stops)
    limits, one = Limits(99, 0, 9999), {"speaks": True, "group": None}
    talk = Conversations(scorer, prompts, encoder, limits, sampling, **one)
    texts = {(i, 0): solution_of(task, prompt).texts for i, prompt in prompts.items()}
    asked = [Request(i, encoder.tokens(prompt), 1) for i, prompt in prompts.items()]
    rollouts = converse(Saying(texts, encoder, end), asked, sampling, talk)  # type: ignore[arg-type]
    source = PromptSource(task, encoder, "stop", 9999, 9999, 1, teaches=True, stops=ends)
    examples = [source.taught(prompt) for prompt in prompts.values()]
    return [
        ((r.tokens, r.turns), (one.tokens, one.turns or (Turn(len(one.tokens), True),)))
        for r, one in zip(rollouts, examples, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "args"),
    [("calculator", {}), ("calculator", {"instruct": True}), ("guess", {})],
)
def test_with_plain_text(name, args):
    pairs = both(name, args, CHARACTERS, EOS)
    assert all(rollout == example for rollout, example in pairs)
    assert max(len(turns) for (_, turns), _ in pairs) >= 3


@pytest.mark.parametrize(("name", "args"), [("calculator", {}), ("guess", {"chat": True})])
def test_with_a_chat_template(tmp_path, name, args):
    pairs = both(name, args, saved(tmp_path, CHATML), IM_END)
    assert all(rollout == example for rollout, example in pairs)
    assert max(len(turns) for (_, turns), _ in pairs) >= 3
