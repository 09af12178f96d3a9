"""The generator: prompts in, scored rollouts out, on the generator's submesh.

Data-parallel replicas split the prompts by their places in the step; the tp ranks of a replica
compute the same. Off the submesh every verb returns an empty result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from mesh.engine.base import Engine, EngineSettings
from mesh.engine.conversation import converse, scripted
from mesh.engine.kinds import EngineKind, Replica, build_engine
from mesh.exchange.rollouts import replica_of
from mesh.layout.meshes import Layout, Meshes, dp_rank
from mesh.layout.reshard import ParamLayout
from mesh.model.layouts import role_layouts, weight_names
from mesh.roles.conversation import Conversations, Limits, warn_of_replies
from mesh.tasks.replying import converses
from mesh.tasks.response import Response, Score
from mesh.tasks.scorer import Scorer
from mesh.tasks.scoring import NO_SCORE
from mesh.tasks.transcript import response_of, said
from mesh.text.encoding import PromptEncoder
from mesh.text.stopping import StopStrings
from mesh.types import (
    TRUNCATED,
    ModelShape,
    NumberedPrompt,
    Prompt,
    Request,
    Rollout,
    Sampling,
)

EVAL_STEP = -1  # training steps count from 0, so held-out samples have random numbers of their own


@dataclass(frozen=True)
class GeneratorSettings:
    """The generator, resolved: its engine, and how rollouts are drawn unless a caller differs.
    limits: of conversations, of tasks that have a reply.
    """

    shape: ModelShape
    dtype: torch.dtype
    kind: EngineKind
    engine: EngineSettings
    seed: int
    temperature: float
    top_k: int
    top_p: float
    truncated_logprobs: bool
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    stops: StopStrings | None
    timeout_seconds: int
    limits: Limits


class Generator:
    """Owns this rank's engine."""

    def __init__(
        self,
        settings: GeneratorSettings,
        meshes: Meshes,
        device: torch.device,
        encoder: PromptEncoder,
    ) -> None:
        self.settings, self.device, self.encoder = settings, device, encoder
        self.tokenizer = encoder.tokenizer
        mesh = meshes.generator_mesh
        self.replicas = meshes.layout.generator.dp
        self.replica = dp_rank(mesh)
        shape, kind, sizes = settings.shape, settings.kind, settings.engine
        self.layouts: list[ParamLayout] = role_layouts(
            shape, sizes.max_length, mesh.mesh, fsdp=False, sliced=not kind.runs_policy
        )
        self.binds = kind.may_alias(device.type, sizes.cuda_graphs)
        if kind.own_buffers:
            names = weight_names(shape)
            self.layouts = [layout for layout in self.layouts if layout.name in names]
        self.reply_group = reply_group(meshes.layout, settings.timeout_seconds)
        # the tp ranks of a replica have the same rollouts: the first one speaks for them
        self.speaks = meshes.on_generator and mesh.get_local_rank("tp") == 0
        self.engine: Engine | None = None
        self.group: dist.ProcessGroup | None = None
        if meshes.on_generator:
            self.group = mesh.get_group("tp") if mesh["tp"].size() > 1 else None
            replica = Replica(shape, mesh, device, settings.dtype, settings.timeout_seconds)
            self.engine = build_engine(kind, sizes, replica)

    def weights(self) -> dict[str, torch.Tensor]:
        """The engine's live local tensors; empty off the generator."""
        return self.engine.weights() if self.engine is not None else {}

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let the engine's weights be these tensors instead of its own storage."""
        if self.engine is not None:
            self.engine.bind(tensors)

    def reset(self, version: int) -> None:
        """Drop everything that was cached under other weights than those of `version`."""
        if self.engine is not None:
            self.engine.reset(version)

    def release(self) -> None:
        """Give the memory of the KV cache to the trainer until tokens are asked for again."""
        if self.engine is not None:
            self.engine.release()

    def close(self) -> None:
        """Free what would keep the process groups from ending."""
        if self.engine is not None:
            self.engine.close()

    def sampling(self, step: int, temperature: float | None = None) -> Sampling:
        """Sampling of a step's rollouts; `temperature` 0 asks for greedy decoding."""
        settings = self.settings
        greedy = temperature == 0
        return Sampling(
            temperature=settings.temperature if temperature is None else temperature,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            step=step,
            top_k=0 if greedy else settings.top_k,
            top_p=1.0 if greedy else settings.top_p,
            stop_tokens=settings.stop_tokens,
            stops=settings.stops,
            truncated_logprobs=settings.truncated_logprobs and not greedy,
        )

    def requests(self, prompts: Sequence[NumberedPrompt], num_samples: int) -> list[Request]:
        """The requests that `rollout` makes of the engine; empty off the generator."""
        return [
            Request(p.prompt_id, self.encoder.tokens(p.prompt), num_samples)
            for p in self._share(prompts)
        ]

    def rollout(
        self,
        scorer: Scorer,
        prompts: Sequence[NumberedPrompt],
        num_samples: int,
        sampling: Sampling,
        truncated_reward: float | None = None,
    ) -> list[Rollout]:
        """Generate and score this replica's share of the prompts.

        truncated_reward: of truncated responses, which are then not scored.
        """
        if self.engine is None:
            return []
        rollouts, responses = self.answers(scorer, prompts, num_samples, sampling)
        by_id = {p.prompt_id: p.prompt for p in self._share(prompts)}
        scores = self._scores(scorer, by_id, rollouts, responses, truncated_reward)
        return [
            replace(
                rollout,
                reward=score.reward,
                parts=tuple(score.parts.items()),
                correct=score.correct,
                answer=score.answer,
            )
            for rollout, score in zip(rollouts, scores, strict=True)
        ]

    def answers(
        self,
        scorer: Scorer,
        prompts: Sequence[NumberedPrompt],
        num_samples: int,
        sampling: Sampling,
    ) -> tuple[list[Rollout], list[Response | None]]:
        """Rollouts of this replica's share of the prompts without rewards, and, where this rank
        speaks, what is to be scored: None where a reply has failed. Empty off the generator.
        """
        if self.engine is None:
            return [], []
        requests, tokenizer = self.requests(prompts, num_samples), self.tokenizer
        if not converses(scorer.task):
            rollouts = scripted(self.engine, requests, sampling)
            asked = rollouts if self.speaks else []
            return rollouts, [response_of([said(tokenizer, r)], r.finish_reason) for r in asked]
        by_id = {p.prompt_id: p.prompt for p in self._share(prompts)}
        talk = Conversations(
            scorer, by_id, self.encoder, self.settings.limits, sampling, self.speaks,
            self.reply_group,
        )  # fmt: skip
        rollouts = converse(self.engine, requests, sampling, talk)
        asked = rollouts if self.speaks else []
        return rollouts, [
            None if r.key in talk.failed else response_of(talk.texts[r.key], r.finish_reason)
            for r in asked
        ]

    def _scores(
        self,
        scorer: Scorer,
        prompts: Mapping[int, Prompt],
        rollouts: Sequence[Rollout],
        responses: Sequence[Response | None],
        truncated_reward: float | None,
    ) -> list[Score]:
        """The score of each rollout. One rank of a replica scores and tells the others: what
        depends on the clock, as a score that hangs does, may not make them differ.
        """
        fixed = frozenset() if truncated_reward is None else TRUNCATED
        scores = [Score(truncated_reward or 0.0)] * len(rollouts)
        if self.speaks:
            asked: list[Prompt] = []
            answered: list[Response] = []
            places: list[int] = []
            for place, (rollout, response) in enumerate(zip(rollouts, responses, strict=True)):
                if response is None:
                    scores[place] = NO_SCORE
                elif rollout.finish_reason not in fixed:
                    asked.append(prompts[rollout.prompt_id])
                    answered.append(response)
                    places.append(place)
            for place, score in zip(places, scorer.score(asked, answered), strict=True):
                scores[place] = score
        if self.group is None or not scores:
            return scores
        shared = [scores]
        dist.broadcast_object_list(shared, group=self.group, group_src=0, device=self.device)
        return shared[0]

    def _share(self, prompts: Sequence[NumberedPrompt]) -> list[NumberedPrompt]:
        if self.engine is None:
            return []
        return [p for p in prompts if replica_of(p.prompt_id, self.replicas) == self.replica]


def reply_group(layout: Layout, timeout_seconds: int) -> dist.ProcessGroup | None:
    """This rank's group, over the CPU, of the tp ranks of its replica; None: it is alone, or off
    the generator. A collective of the world.
    """
    ranks, tp, found = layout.generator_ranks, layout.generator.tp, None
    for first in range(0, len(ranks), tp) if tp > 1 else ():
        mine = ranks[first : first + tp]
        group = dist.new_group(mine, timedelta(seconds=timeout_seconds), "gloo")
        found = group if dist.get_rank() in mine else found
    return found


def failed_scores(scorer: Scorer, name: str, cpu_group: dist.ProcessGroup) -> dict[str, float]:
    """The metric `name`: scores of all replicas that have failed since this was last asked.

    The first rank shows one of them, and a warning about replies. Collective; empty where a failure
    ends the run.
    """
    warn_of_replies(scorer, cpu_group)
    if scorer.settings.on_failure == "stop":
        return {}
    shares: list[tuple[int, str]] = [(0, "")] * dist.get_world_size(cpu_group)
    dist.all_gather_object(shares, scorer.failures(), group=cpu_group)
    failed = sum(count for count, _ in shares)
    if failed and dist.get_rank() == 0:
        example = next(text for _, text in shares if text)
        print(f"{name}={failed}: counted as 0.0, such as\n{example}", flush=True)
    return {name: float(failed)}
