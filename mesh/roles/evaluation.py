"""Evaluation on held-out prompts: pass@k and majority votes of samples, greedy answers, rewards.

Part of a run and a program of its own (`recipes/evaluate.py`), through the same engine. The sets of
an evaluation come one after the other, under the weights of one sync.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist

from mesh.lifecycle.running import running
from mesh.rl.estimators import mean_of
from mesh.rl.samples import FIXED, Record, record_of
from mesh.roles.answers import GREEDY, Answer, Values, answer_of, gathered, means, values_of, voted
from mesh.roles.generator import EVAL_STEP, Generator, failed_scores
from mesh.tasks import Task, numbered
from mesh.tasks.calls import TaskSource
from mesh.tasks.correct import METHOD, correctness_rule
from mesh.tasks.scorer import Scorer
from mesh.tasks.transcript import shown
from mesh.text.stopping import StopStrings
from mesh.text.tokenizer import Tokenizer
from mesh.types import Prompt, Rollout, RolloutKey, Sampling


@dataclass(frozen=True)
class Draws:
    """How the samples of a set are drawn. temperature 0: they are greedy."""

    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    stops: StopStrings | None


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out prompts of a task, drawn once. ks: the k of pass@k and majority@k, of `num_samples`
    of each; greedy: each is answered greedily, too; draws: None: as the rollouts of a step; kept:
    places of the prompts whose answers are among the run's samples.
    """

    source: TaskSource
    prompts: tuple[Prompt, ...]
    num_samples: int
    ks: tuple[int, ...]
    greedy: bool = True
    draws: Draws | None = None
    kept: frozenset[int] = frozenset()

    @property
    def asked(self) -> list[int]:
        """The sample ids of the answers to each prompt."""
        return [*range(self.num_samples), *([GREEDY] if self.greedy else [])]

    def sampling(self, generator: Generator, greedy: bool) -> Sampling:
        """How its answers are drawn: the same random numbers at every evaluation."""
        draws = self.draws
        greedy = greedy or (draws is not None and draws.temperature == 0)
        sampling = generator.sampling(EVAL_STEP, temperature=0 if greedy else None)
        if draws is None:
            return sampling
        sampling = replace(sampling, max_new_tokens=draws.max_new_tokens, stops=draws.stops)
        if greedy:
            return sampling
        # no loss reads the logprobs of an evaluation
        sampling = replace(sampling, temperature=draws.temperature, truncated_logprobs=False)
        return replace(sampling, top_k=draws.top_k, top_p=draws.top_p)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation of a set found, the same on every rank but for the rows and samples.
    values: by metric, those of each problem; rows: the results of this replica's prompts, if asked
    for; samples: its answers that are kept.
    """

    metrics: dict[str, float]
    values: Values
    rows: list[dict[str, Any]]
    samples: list[Record] = field(default_factory=list)


def evaluate(
    held_out: EvaluationSet,
    generator: Generator,
    scorer: Scorer,
    cpu_group: dist.ProcessGroup,
    name: str = "",
    rows: bool = False,
) -> Evaluation:
    """Evaluate the generator's present weights. Collective.

    The metrics are `eval/*`, of a named set `eval/NAME/*`. `reward` is the mean reward of the
    sampled responses, `reward/PART` that of a part of their scores; `accuracy`, pass@k and
    majority@k count responses that are correct. The same prompts and random numbers at every call,
    whatever the step: curves compare like with like. A replica's share may be empty. The layout
    changes no bit.
    """
    task, prefix = held_out.source.task, prefix_of(name)
    with running(f"eval {name}".rstrip()):
        found = answers(held_out, generator, scorer)
    mine = [answer_of(task, generator.tokenizer, rollout) for rollout in found.values()]
    problems = gathered(mine, cpu_group, len(held_out.prompts), held_out.asked)
    warn_of_none(problems, scorer, task, prefix)
    values = values_of(problems, held_out.ks)
    metrics = means(values, prefix) | failed_scores(scorer, f"{prefix}/failed", cpu_group)
    results = rows_of(held_out, generator.tokenizer, name, found, problems, values) if rows else []
    return Evaluation(metrics, values, results, samples_of(held_out, name, found, problems))


def prefix_of(name: str) -> str:
    """How the metrics of a set begin; the run's own has no name."""
    return f"eval/{name}" if name else "eval"


def answers(
    held_out: EvaluationSet, generator: Generator, scorer: Scorer
) -> Mapping[RolloutKey, Rollout]:
    """The scored answers to this replica's share of the prompts, by (prompt_id, sample_id); empty
    where this rank does not speak for it.
    """
    found: dict[RolloutKey, Rollout] = {}
    prompts = numbered(held_out.prompts)
    sampling = held_out.sampling(generator, greedy=False)
    for rollout in generator.rollout(scorer, prompts, held_out.num_samples, sampling):
        found[rollout.key] = rollout
    if held_out.greedy:
        sampling = held_out.sampling(generator, greedy=True)
        for rollout in generator.rollout(scorer, prompts, 1, sampling):
            found[rollout.prompt_id, GREEDY] = replace(rollout, sample_id=GREEDY)
    return found if generator.speaks else {}


def samples_of(
    held_out: EvaluationSet,
    name: str,
    found: Mapping[RolloutKey, Rollout],
    problems: Sequence[Sequence[Answer]],
) -> list[Record]:
    """The answers of this replica to the prompts that are kept."""
    prompts = numbered(held_out.prompts)
    return [
        {"split": "eval", "set": name, "chosen": FIXED}
        | record_of(prompts[place], found[place, answer.sample_id])
        | {"correct": answer.correct}
        for place in sorted(held_out.kept)
        for answer in problems[place]
        if (place, answer.sample_id) in found
    ]


LISTS = {name: name for name in ("correct", "parts", "turns")}
"""Names of fields whose list in a row has the same one."""


def rows_of(
    held_out: EvaluationSet,
    tokenizer: Tokenizer,
    name: str,
    found: Mapping[RolloutKey, Rollout],
    problems: Sequence[Sequence[Answer]],
    values: Values,
) -> list[dict[str, Any]]:
    """The results of the problems of which this rank has the answers, each as a JSON object."""
    rows = []
    for index in sorted({prompt_id for prompt_id, _ in found}):
        prompt = held_out.prompts[index]
        columns = {metric: column[index] for metric, column in values.items()}
        by_sample = {
            a.sample_id: response_row(tokenizer, found[index, a.sample_id], a)
            for a in problems[index]
        }
        greedy = by_sample.pop(GREEDY, None)
        lists = {field: [one[field] for one in by_sample.values()] for field in by_sample[0]}
        rows.append({
            "set": name, "index": index, "question": prompt.question, "answer": prompt.answer,
            **{LISTS.get(field, f"{field}s"): values for field, values in lists.items()},
            **({"greedy": greedy} if greedy else {}),
            "metrics": {metric: mean_of([column]) for metric, column in columns.items() if column},
        })  # fmt: skip
    return rows


def response_row(tokenizer: Tokenizer, rollout: Rollout, answer: Answer) -> dict[str, Any]:
    """One answer: its text, what it is counted as in a vote (null: it has none), and its score."""
    said = shown(tokenizer, rollout)
    return {
        "response": said["response"],
        "vote": None if answer.vote is None else voted(tokenizer, rollout),
        "reward": answer.reward,
        "correct": answer.correct,
        "parts": dict(answer.parts),
        "length": answer.length,
        "finish_reason": rollout.finish_reason,
        **({"turns": said["turns"]} if "turns" in said else {}),
    }


def warn_of_none(
    problems: Sequence[Sequence[Answer]], scorer: Scorer, task: Task, prefix: str
) -> None:
    """Say, once, that rewards differ and yet no response is correct where a rule decides that."""
    flat = [answer for answers in problems for answer in answers]
    rewards = [answer.reward for answer in flat]
    sampled = [answer for answer in flat if answer.sample_id != GREEDY]
    if scorer.warned or any(a.correct for a in flat) or min(rewards) == max(rewards):
        return
    if any(a.ruled for a in sampled):
        scorer.warned = True
        if dist.get_rank() == 0:
            print(none_correct(task, max(rewards), prefix), flush=True)


def none_correct(task: Task, largest: float, prefix: str) -> str:
    """The warning that rewards differ and yet no response was correct."""
    remedy = (
        "look at that method"
        if hasattr(task, METHOD)
        else f"if less is right, give the task a method {METHOD}(reward) -> bool, or return "
        "Score(reward, correct=...)"
    )
    return (
        f"warning: {prefix}: no response was correct, though rewards differ, up to {largest:g}: a "
        f"response is correct where {correctness_rule(task)}; {remedy}. The best model may follow "
        f"another metric: checkpoint.best_metric={prefix}/reward"
    )
