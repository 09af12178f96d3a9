"""What an engine is asked for, and what becomes of it: samples, turns, rollouts and waves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

FinishReason = Literal["stop", "length", "turns", "context", "tokens"]
"""Reasons for which a rollout ends: a stop token (of a conversation: no reply), its longest turn,
its most turns, no room in the context for another one, or its most tokens in all."""

FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)

TRUNCATED: frozenset[FinishReason] = frozenset({"length", "context", "tokens"})
"""Reasons that cut a rollout before its end: what is scored is unfinished. The most turns are an
end that was planned."""

RolloutKey = tuple[int, int]
"""(prompt_id, sample_id): names a rollout within its step."""

Parts = tuple[tuple[str, float], ...]
"""Named parts of a score, in the task's order."""

LARGEST_REWARD = 1e100
"""The largest magnitude of a reward: sums of squares of such differences stay finite in float64."""


@dataclass(frozen=True)
class Request:
    """`num_samples` independent completions of a prompt; `keeps`: they go on, or are dropped."""

    prompt_id: int
    tokens: tuple[int, ...]
    num_samples: int
    keeps: bool = False


@dataclass(frozen=True)
class Distribution:
    """The distribution of a token: softmax(logits / temperature) over a set of ids.

    The set has the `top_k` likeliest ids (0: all), and of those the nucleus of mass `top_p` (1:
    all): the fewest of the likeliest whose probability reaches it (arXiv:1904.09751). Of ids with
    equal logits the lower one is the likelier.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True)
class Sampling:
    """The sampling of an engine.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch truncation off. The random number of a
    token is a hash of (seed, step, prompt_id, sample_id, position) and of nothing else; positions
    count from the end of the prompt, replies included. `truncated_logprobs`: logprobs are those of
    the truncated distribution.

    A turn ends with one of `stop_tokens`, or where `stops(tokens, start)` says so: the last of the
    tokens completes a stop string in the text from index `start` on, where the turn began.
    """

    temperature: float
    max_new_tokens: int
    seed: int
    step: int
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    stops: Callable[[Sequence[int], int], bool] | None = None
    truncated_logprobs: bool = False

    @property
    def drawn(self) -> Distribution:
        """The distribution that tokens are drawn from, unless they are greedy."""
        return Distribution(self.temperature or 1.0, self.top_k, self.top_p)

    @property
    def scored(self) -> Distribution:
        """The distribution of the logprobs; of greedy tokens the whole one, at temperature 1."""
        cut = self.truncated_logprobs and self.temperature > 0
        return self.drawn if cut else Distribution(self.drawn.temperature)


@dataclass(frozen=True)
class Sample:
    """One sample of a prompt, by its name in the step."""

    prompt_id: int
    sample_id: int

    @property
    def key(self) -> RolloutKey:
        return self.prompt_id, self.sample_id


@dataclass(frozen=True)
class Completion(Sample):
    """One sampled answer, of a conversation one turn. `logprobs[i]` belongs to `tokens[i]`, and is
    of the distribution `Sampling.scored`. A stop token is in `tokens`.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Turn:
    """A span of a rollout's tokens: sampled by the policy, or written by the environment."""

    num_tokens: int
    sampled: bool


@dataclass(frozen=True)
class Rollout(Sample):
    """A scored sequence of one prompt: the unit that goes from generator to trainer.

    `tokens` follow the prompt; `turns` cut them, in order (empty: all were sampled). Only sampled
    tokens carry loss; `logprobs[i]` belongs to the i-th of them. `parts`, `correct` and
    `answer`: of its score, if it has them; the answer stays with the generator.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    reward: float
    finish_reason: FinishReason
    turns: tuple[Turn, ...] = ()
    parts: Parts = ()
    correct: bool | None = None
    answer: str | None = None

    @property
    def loss_mask(self) -> tuple[bool, ...]:
        """One entry per token of `tokens`."""
        if not self.turns:
            return (True,) * len(self.tokens)
        return tuple(turn.sampled for turn in self.turns for _ in range(turn.num_tokens))

    @property
    def loss_indices(self) -> tuple[int, ...]:
        """Indices into `tokens` of the loss tokens, to which `logprobs` belong."""
        if not self.turns:
            return tuple(range(len(self.tokens)))
        return tuple(i for i, counts in enumerate(self.loss_mask) if counts)

    @property
    def length(self) -> int:
        """Loss tokens: the length of a rollout wherever one is meant."""
        if not self.turns:
            return len(self.tokens)
        return sum(turn.num_tokens for turn in self.turns if turn.sampled)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole sequence, the prompt's included."""
        return len(self.prompt_tokens) + len(self.tokens)


@dataclass(frozen=True)
class Outline(Sample):
    """A rollout without its tokens, as every trainer rank knows it.

    length: its loss tokens; num_tokens: of the whole sequence; turns: those of a conversation that
    were sampled, 0: it is none; replied: tokens of its other turns.
    """

    length: int
    num_tokens: int
    reward: float
    finish_reason: FinishReason
    parts: Parts = ()
    correct: bool | None = None
    turns: int = 0
    replied: int = 0


def outline(rollout: Rollout) -> Outline:
    """The outline of a rollout."""
    r, said = rollout, sum(turn.sampled for turn in rollout.turns)
    replied = len(r.tokens) - r.length
    known = Outline(*r.key, r.length, r.num_tokens, r.reward, r.finish_reason, r.parts, r.correct)
    return replace(known, turns=said, replied=replied)


@dataclass(frozen=True)
class Wave:
    """One wave of rollouts as a rank sees it after the exchange.

    outlines: all rollouts of the wave, by key, on trainer ranks; rollouts: those whose prompts this
    data-parallel rank owns. Both are empty off the trainer.
    """

    outlines: list[Outline]
    rollouts: list[Rollout]
