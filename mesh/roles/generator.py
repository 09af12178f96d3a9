"""The generator: prompts in, scored rollouts out, on the generator's submesh.

Data-parallel replicas split the prompts by their ids; the tp ranks of a replica compute the same.
Off the submesh every verb returns an empty result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mesh.config.schema import Conf
from mesh.engine.base import Engine, EngineSettings
from mesh.engine.kinds import Replica, kind_of
from mesh.engine.native.cache import num_pages
from mesh.exchange.rollouts import replica_of
from mesh.layout.meshes import Meshes, dp_rank
from mesh.layout.reshard import ParamLayout
from mesh.model.layouts import role_layouts, weight_names
from mesh.model.policy import build_policy
from mesh.tasks import Task
from mesh.tasks.scorer import Scorer
from mesh.text.tokenizer import Tokenizer
from mesh.types import (
    Completion,
    ModelShape,
    Prompt,
    Request,
    Rollout,
    Sampling,
)

PROMPT_ROOM = 256  # tokens of a prompt, beside its response, for which a GPU's KV cache has room
EVAL_STEP = -1  # training steps count from 0, so held-out samples have random numbers of their own


class Generator:
    """Owns this rank's engine, and the processes that score what it says."""

    def __init__(
        self,
        conf: Conf,
        meshes: Meshes,
        shape: ModelShape,
        device: torch.device,
        dtype: torch.dtype,
        tokenizer: Tokenizer,
    ) -> None:
        self.conf = conf
        self.tokenizer = tokenizer
        self.device = device
        mesh = meshes.generator_mesh
        self.replicas = meshes.layout.generator.dp
        self.replica = dp_rank(mesh)
        self.layouts: list[ParamLayout] = role_layouts(
            shape, conf.model.max_length, mesh.mesh, fsdp=False
        )
        self.binds = takes_storage(conf, device)
        if kind_of(conf).own_buffers:
            names = weight_names(shape)
            self.layouts = [layout for layout in self.layouts if layout.name in names]
        # the tp ranks of a replica have the same rollouts: the first one speaks for them
        self.speaks = meshes.on_generator and mesh.get_local_rank("tp") == 0
        self.scorer = Scorer(conf)
        self.engine: Engine | None = None
        self.group: dist.ProcessGroup | None = None
        if meshes.on_generator:
            self.group = mesh.get_group("tp") if mesh["tp"].size() > 1 else None
            self.engine = build_engine(conf, shape, mesh, device, dtype)

    def weights(self) -> dict[str, torch.Tensor]:
        """The engine's live local tensors; empty off the generator."""
        return self.engine.weights() if self.engine is not None else {}

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let the engine's weights be these tensors instead of its own storage."""
        if self.engine is not None:
            self.engine.bind(tensors)

    def reset(self, version: int) -> None:
        """The weights have changed: drop what was cached under the old ones."""
        if self.engine is not None:
            self.engine.reset(version)

    def release(self) -> None:
        """Let the trainer have the memory of the KV cache, until tokens are asked for again."""
        if self.engine is not None:
            self.engine.release()

    def close(self) -> None:
        """Let go of what would keep the process groups from ending, and end what scores."""
        self.scorer.close()
        if self.engine is not None:
            self.engine.close()

    def sampling(self, step: int, temperature: float | None = None) -> Sampling:
        """How rollouts of a step are drawn; `temperature` 0 asks for greedy decoding."""
        generator = self.conf.generator
        greedy = temperature == 0
        return Sampling(
            temperature=generator.temperature if temperature is None else temperature,
            max_new_tokens=generator.max_new_tokens,
            seed=self.conf.seed,
            step=step,
            top_k=0 if greedy else generator.top_k,
            top_p=1.0 if greedy else generator.top_p,
            stop_tokens=self.tokenizer.eos_ids,
        )

    def complete(
        self, prompts: Sequence[Prompt], num_samples: int, sampling: Sampling
    ) -> list[Completion]:
        """Completions of this replica's share of the prompts."""
        if self.engine is None:
            return []
        return self.engine.generate(self.requests(prompts, num_samples), sampling)

    def requests(self, prompts: Sequence[Prompt], num_samples: int) -> list[Request]:
        """What `complete` asks the engine for; empty off the generator."""
        return [
            Request(p.prompt_id, tuple(self.tokenizer.encode(p.text)), num_samples)
            for p in self._share(prompts)
        ]

    def rollout(
        self, task: Task, prompts: Sequence[Prompt], num_samples: int, sampling: Sampling
    ) -> list[Rollout]:
        """Generate and score this replica's share of the prompts."""
        completions = self.complete(prompts, num_samples, sampling)
        by_id = {
            p.prompt_id: (p, tuple(self.tokenizer.encode(p.text))) for p in self._share(prompts)
        }
        asked = [by_id[c.prompt_id][0] for c in completions]
        rewards = self._rewards(task, asked, completions)
        return [
            Rollout(c.prompt_id, c.sample_id, by_id[c.prompt_id][1], c.tokens, c.logprobs, reward,
                    c.finish_reason)
            for c, reward in zip(completions, rewards, strict=True)
        ]  # fmt: skip

    def _rewards(
        self, task: Task, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> list[float]:
        """The reward of each completion. One rank of a replica scores and tells the others: what
        depends on the clock, as a score that hangs does, may not make them differ.
        """
        rewards = [0.0] * len(completions)
        if self.speaks:
            texts = [self.tokenizer.decode(c.tokens) for c in completions]
            rewards = self.scorer.score(task, prompts, texts)
        if self.group is None or not rewards:
            return rewards
        rewards_R = torch.tensor(rewards, dtype=torch.float64, device=self.device)
        dist.broadcast(rewards_R, group=self.group, group_src=0)
        return rewards_R.tolist()

    def failed_scores(self, name: str, cpu_group: dist.ProcessGroup) -> dict[str, float]:
        """The metric `name`: how many scores of all replicas have failed since this was last asked.
        The first rank shows one of them. Collective; empty where a failure ends the run.
        """
        if self.conf.reward.on_failure == "stop":
            return {}
        shares: list[tuple[int, str]] = [(0, "")] * dist.get_world_size(cpu_group)
        dist.all_gather_object(shares, self.scorer.failures(), group=cpu_group)
        failed = sum(count for count, _ in shares)
        if failed and dist.get_rank() == 0:
            example = next(text for _, text in shares if text)
            print(f"{name}={failed}: counted as 0.0, such as\n{example}", flush=True)
        return {name: float(failed)}

    def _share(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        if self.engine is None:
            return []
        return [p for p in prompts if replica_of(p.prompt_id, self.replicas) == self.replica]


def build_engine(
    conf: Conf,
    shape: ModelShape,
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype,
) -> Engine:
    """The engine that `conf` names, on this rank of the generator's mesh. Collective of its tp."""
    kind = kind_of(conf)
    model = None
    if kind.runs_policy:
        model = build_policy(shape, conf.model.max_length, device, dtype, mesh)
    replica = Replica(shape, mesh.get_group("tp"), device, dtype, conf.timeout_seconds)
    return kind.build(model, engine_settings(conf, device), replica)


def takes_storage(conf: Conf, device: torch.device) -> bool:
    """True if the engine's weights may be the trainer's own tensors."""
    return kind_of(conf).may_alias(device.type, conf.generator.cuda_graphs)


def engine_settings(conf: Conf, device: torch.device) -> EngineSettings:
    """The engine's sizes, with what the configuration leaves open filled in."""
    generator, kind = conf.generator, kind_of(conf)
    page_size = generator.page_size or kind.pages[device.type].default
    prompt = max(page_size, PROMPT_ROOM) if device.type == "cuda" else page_size
    full_response = num_pages(generator.max_new_tokens + prompt, page_size) * page_size
    room = max(generator.max_sequences * full_response, conf.model.max_length)
    return EngineSettings(
        max_length=conf.model.max_length,
        max_sequences=generator.max_sequences,
        kv_tokens=generator.kv_tokens or room,
        page_size=page_size,
        prefill_tokens=generator.prefill_tokens,
        prefix_cache=generator.prefix_cache,
        cuda_graphs=generator.cuda_graphs,
        releases=kind.releases(conf, device.type),
    )
