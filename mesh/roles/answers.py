"""Answers to held-out prompts, as all ranks know them, and the metrics of an evaluation.

A metric is a mean over problems. Its values of each problem are kept beside it: intervals resample
problems, and two evaluations of the same problems are compared problem by problem.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from mesh.rl.estimators import majority_at_k, mean_of, pass_at_k
from mesh.tasks import Task
from mesh.tasks.correct import is_correct
from mesh.tasks.transcript import shown
from mesh.text.tokenizer import Tokenizer
from mesh.types import TRUNCATED, Parts, Rollout

GREEDY = -1
"""The sample_id of a greedy answer; those of samples count from 0."""

Values = dict[str, list[list[float]]]
"""By metric, the values of each problem; a problem may have none."""


@dataclass(frozen=True)
class Answer:
    """An answer to a held-out prompt. ruled: a rule says if it is correct, and not its score; vote:
    digest of what it says, equal for equal answers, None: it does not vote.
    """

    prompt_id: int
    sample_id: int
    reward: float
    correct: bool
    ruled: bool
    length: int
    truncated: bool
    parts: Parts
    vote: str | None


def answer_of(task: Task, tokenizer: Tokenizer, rollout: Rollout) -> Answer:
    """A scored rollout as an answer."""
    r, said = rollout, voted(tokenizer, rollout)
    digest = hashlib.blake2b(said.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    return Answer(
        *r.key, r.reward, is_correct(task, r.reward, r.correct), r.correct is None,
        r.length, r.finish_reason in TRUNCATED, r.parts, None if r.answer == "" else digest,
    )  # fmt: skip


def voted(tokenizer: Tokenizer, rollout: Rollout) -> str:
    """What an answer is counted as in a vote: the answer that its score found in it, else the text
    of its last turn without spaces around it.
    """
    if rollout.answer is not None:
        return rollout.answer
    return str(shown(tokenizer, rollout)["response"]).strip()


def gathered(
    mine: Sequence[Answer], cpu_group: dist.ProcessGroup, num_prompts: int, samples: Sequence[int]
) -> list[list[Answer]]:
    """The answers of all replicas, by prompt and in the order of `samples`, which each prompt has.
    Collective.
    """
    shares: list[Sequence[Answer]] = [[]] * dist.get_world_size(cpu_group)
    dist.all_gather_object(shares, mine, group=cpu_group)
    by_key = {(a.prompt_id, a.sample_id): a for share in shares for a in share}
    expected = {(prompt, sample) for prompt in range(num_prompts) for sample in samples}
    arrived = sum(map(len, shares))
    assert by_key.keys() == expected and arrived == len(expected), (
        f"held-out prompts were lost, or answered twice: {arrived} answers, {len(expected)} due"
    )
    return [[by_key[prompt, sample] for sample in samples] for prompt in range(num_prompts)]


def metric_names(ks: Sequence[int], greedy: bool, prefix: str = "eval") -> list[str]:
    """The metrics that every evaluation with these k has. Parts of scores have others."""
    names = ["accuracy", *(f"pass@{k}" for k in ks), *(f"majority@{k}" for k in ks if k > 1)]
    names += ["accuracy_greedy"] if greedy else []
    names += ["reward", "response_length/mean", "response/truncated"]
    return [f"{prefix}/{name}" for name in names]


def is_share(metric: str) -> bool:
    """True if an evaluation's metric, as it is logged, is a share, from 0 to 1."""
    name = metric.rpartition("/")[2]
    if "/reward/" in metric:  # a part of a score, of any name
        return False
    return name.startswith(("accuracy", "pass@", "majority@", "truncated"))


def values_of(problems: Sequence[Sequence[Answer]], ks: Sequence[int]) -> Values:
    """By metric, without a prefix, the values of each problem.

    Of the sampled answers, unless the name says greedy. problems: as `gathered` returns them.
    """
    values: Values = {}

    def add(name: str, column: Iterator[list[float]]) -> None:
        values[name] = list(column)

    sampled = [[a for a in answers if a.sample_id != GREEDY] for answers in problems]
    greedy = [[a for a in answers if a.sample_id == GREEDY] for answers in problems]
    for name, k in [("accuracy", 1), *((f"pass@{k}", k) for k in ks)]:
        counts = [(len(one), sum(a.correct for a in one)) for one in sampled]
        add(name, ([pass_at_k(*count, k)] for count in counts))
    for k in (k for k in ks if k > 1):
        votes = [([a.vote for a in one], [a.correct for a in one]) for one in sampled]
        add(f"majority@{k}", ([majority_at_k(*vote, k)] for vote in votes))
    if any(greedy):
        add("accuracy_greedy", ([float(a.correct) for a in one] for one in greedy))
    add("reward", ([a.reward for a in one] for one in sampled))
    add("response_length/mean", ([float(a.length) for a in one] for one in sampled))
    add("response/truncated", ([float(a.truncated) for a in one] for one in sampled))
    for part in dict.fromkeys(name for one in sampled for a in one for name, _ in a.parts):
        add(
            f"reward/{part}", ([v for a in one for n, v in a.parts if n == part] for one in sampled)
        )
    return values


def means(
    values: Mapping[str, Sequence[Sequence[float]]], prefix: str = "eval"
) -> dict[str, float]:
    """The metrics of an evaluation: the means of these values."""
    return {f"{prefix}/{name}": mean_of(column) for name, column in values.items()}
