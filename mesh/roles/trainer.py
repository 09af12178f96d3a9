"""The trainer: fp32 master weights under FSDP and TP, one optimizer step from summed leaf losses.

A step is any number of `accumulate` calls, then one `update`: losses are unnormalised sums, so the
gradients of leaves, microbatches and waves simply add; what they are divided by is known after the
last wave and applied once. Off the trainer's submesh every verb returns an empty result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mesh.config.schema import Conf
from mesh.layout.holdings import local_tensors
from mesh.layout.meshes import Meshes, dp_rank
from mesh.layout.reshard import Block
from mesh.lifecycle.heartbeat import beat
from mesh.model.attention import packed_context
from mesh.model.hf import load_weights
from mesh.model.init import random_weights
from mesh.model.layouts import role_layouts, weight_names
from mesh.model.logprobs import TokenScores
from mesh.model.parallel import tp_dims
from mesh.model.policy import Policy, build_policy, named_weights, parameter_names
from mesh.rl.losses import kl_T, loss_sum, token_stats
from mesh.rl.packing import Leaf, PackedBatch, pack, schedule
from mesh.roles.nonfinite import (
    Findings,
    Trained,
    announce,
    bad_blocks,
    bad_sequences,
    gathered,
    merged,
)
from mesh.roles.sums import StepSums
from mesh.types import ModelShape

Objective = Callable[[PackedBatch, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Start:
    """Source of the weights: a Hugging Face directory, or (path None) random ones of `seed`."""

    path: Path | None
    seed: int


def lr_at(step: int, peak: float, warmup_steps: int) -> float:
    """Linear warm-up to the peak, then constant. The first of `warmup_steps` gets peak / steps."""
    return peak * min(1.0, (step + 1) / max(warmup_steps, 1))


class Trainer:
    """Owns the policy's master weights, its gradients, the optimizer and the frozen reference."""

    def __init__(
        self,
        conf: Conf,
        meshes: Meshes,
        shape: ModelShape,
        device: torch.device,
        dtype: torch.dtype,
        start: Start,
        with_optimizer: bool = True,
        run_dir: str | None = None,
    ) -> None:
        """run_dir: where a step that is not finite is written down; None: nowhere."""
        self.conf = conf
        self.shape = shape
        self.device = device
        self.mesh: DeviceMesh = meshes.trainer_mesh
        self.layouts = role_layouts(shape, conf.model.max_length, self.mesh.mesh, fsdp=True)
        self.weight_names = weight_names(shape)
        # of the two names of a tied weight, the first
        self.master_names = self.weight_names - ({"lm_head.weight"} if shape.tied else set())
        self.dp = meshes.layout.trainer.dp
        self.dp_rank = dp_rank(self.mesh)
        self.cpu_group, self.run_dir = meshes.trainer_cpu_group, run_dir
        self.steps = self.updates = 0
        self.sums = StepSums(device)
        self.model: Policy | None = None
        self.reference: Policy | None = None
        if meshes.on_trainer:
            self.model = self._build(dtype, start)
            if with_optimizer and conf.kl_coef > 0:
                self.reference = self._build(dtype, start).requires_grad_(False)
            if with_optimizer:
                self.optimizer = torch.optim.AdamW(
                    self.model.parameters(),
                    lr=conf.trainer.lr,
                    betas=(conf.trainer.betas[0], conf.trainer.betas[1]),
                    eps=conf.trainer.eps,
                    weight_decay=conf.trainer.weight_decay,
                )

    def _build(self, dtype: torch.dtype, start: Start) -> Policy:
        recompute = self.conf.trainer.activation_checkpointing
        fsdp = {"compute_dtype": dtype, "activation_checkpointing": recompute}
        model = build_policy(
            self.shape, self.conf.model.max_length, self.device, torch.float32, self.mesh, fsdp,
            self.conf.trainer.sequence_parallel,
        )  # fmt: skip
        blocks = self._blocks()
        with torch.no_grad():
            tensors = local_tensors(named_weights(model))
        if start.path is None:
            random_weights(tensors, {x.name: x.shape for x in self.layouts}, blocks, start.seed)
        else:
            load_weights(start.path, tensors, blocks, self.shape)
        return model

    def _blocks(self) -> dict[str, Block | None]:
        rank = dist.get_rank()
        return {layout.name: layout.blocks.get(rank) for layout in self.layouts}

    def weights(self) -> dict[str, torch.Tensor]:
        """Master weights and buffers by torchtitan's names; DTensors. Empty off the trainer."""
        if self.model is None:
            return {}
        return {**named_weights(self.model), **dict(self.model.named_buffers())}

    def parameters(self) -> dict[str, torch.Tensor]:
        """The master weights alone, without buffers."""
        return named_weights(self.model) if self.model is not None else {}

    def reference_weights(self) -> dict[str, torch.Tensor]:
        """The frozen reference's weights; none without one."""
        return named_weights(self.reference) if self.reference is not None else {}

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """What the next step needs, by kind and name: `weights`, and AdamW's moments `exp_avg` and
        `exp_avg_sq`, which are zeros before the first step. fp32 DTensors, the trainer's own; a
        tied weight is listed once. No tensors off the trainer."""
        masters = {k: w for k, w in self.parameters().items() if k in self.master_names}
        moments = {name: self._moments(weight) for name, weight in masters.items()}
        kinds = ("exp_avg", "exp_avg_sq")
        return {"weights": masters} | {k: {n: m[k] for n, m in moments.items()} for k in kinds}

    def _moments(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.optimizer.state[weight]
        if not state:  # as AdamW makes it in its first step
            state["step"] = torch.zeros((), dtype=torch.float32)
            state |= {kind: torch.zeros_like(weight) for kind in ("exp_avg", "exp_avg_sq")}
        return state

    def continue_after(self, steps: int, updates: int) -> None:
        """`state` was filled with that after so many steps, of which `updates` changed the weights:
        warm-up and bias correction go on."""
        self.steps, self.updates = steps, updates
        for weight in self.state()["weights"].values():
            self._moments(weight)["step"].fill_(updates)

    def accumulate(
        self, leaves: Sequence[Leaf], token_counts: Sequence[Sequence[int]], objective: Objective
    ) -> torch.Tensor:
        """Forward and backward over this rank's leaves, adding to the gradients. Returns the
        logprobs of all their response tokens, in the order of leaves and rollouts, fp32.

        objective: (loss_A, clipped_A) from a batch and its logprobs_A; token_counts: tokens of the
        leaves of every data-parallel rank, in order; all ranks derive the same number of
        microbatches from it.
        """
        if self.model is None:
            return torch.zeros(0)
        logprobs = [
            self._backward(self.model, microbatch, objective)
            for microbatch in self.microbatches(leaves, token_counts)
        ]
        self.sums.expect(sum(len(r.tokens) for leaf in leaves for r in leaf.rollouts))
        return torch.cat([torch.zeros(0, device=self.device), *logprobs])

    def microbatches(
        self, leaves: Sequence[Leaf], token_counts: Sequence[Sequence[int]]
    ) -> list[list[Leaf]]:
        """What this rank runs together of its leaves; see `accumulate`. Empty off the trainer."""
        if self.dp_rank is None:
            return []
        counts = [leaf.num_tokens for leaf in leaves]
        assert counts == list(token_counts[self.dp_rank]), "leaves are not the schedule's"
        planned = schedule(token_counts, self.conf.trainer.microbatch_tokens)[self.dp_rank]
        return [[leaves[i] for i in indices] for indices in planned]

    def score(self, model: Policy, batch: PackedBatch) -> TokenScores:
        """(logprobs_A, entropy_A) of a batch's response tokens, by the policy or the reference."""
        beat()
        context = packed_context(batch.cu_seqlens, batch.max_seqlen)
        temperature = self.conf.generator.temperature
        return model(batch.tokens_T, batch.positions_T, context, batch.index_A, batch.targets_A,
                     temperature)  # fmt: skip

    def _backward(
        self, model: Policy, leaves: Sequence[Leaf], objective: Objective
    ) -> torch.Tensor:
        """Adds to the gradients and the step's sums. Returns logprobs_A, detached."""
        batch = pack(leaves).to(self.device)
        logprobs_A, entropy_A = self.score(model, batch)
        logprobs_A.retain_grad()
        loss_A, clipped_A = objective(batch, logprobs_A)
        divergence_A = torch.zeros_like(entropy_A)
        if self.reference is not None:
            with torch.no_grad():
                reference_A, _ = self.score(self.reference, batch)
            divergence_A = kl_T(logprobs_A, reference_A)
            loss_A = loss_A + self.conf.kl_coef * divergence_A
        loss = loss_sum(loss_A, batch.weights_A)
        loss.backward()
        rollouts = tuple(r for leaf in leaves for r in leaf.rollouts)
        self.sums.add(
            token_stats(logprobs_A, batch.generator_logprobs_A, clipped_A),
            (loss, entropy_A.double().sum(), divergence_A.double().sum()),
            Trained(rollouts, logprobs_A.detach(), loss_A.detach(), logprobs_A.grad),
        )
        return logprobs_A.detach()

    @torch.no_grad()
    def update(self, normaliser: float, tokens: int) -> dict[str, float]:
        """Divide the gradients by `normaliser`, clip, step. Returns the step's metrics.

        tokens: response tokens of the whole step, over all ranks; checked against what was trained.
        A step whose loss, gradient or logprobs are not finite on any rank changes neither weights
        nor moments: RuntimeError, or with on_nonfinite=skip the metric `skipped`, on all ranks.
        Empty off the trainer.
        """
        if self.model is None:
            return {}
        gradients = self._gradients()
        torch._foreach_div_(list(gradients.values()), normaliser)
        norm, finite = self._gradient_norm(gradients)
        lr = lr_at(self.steps, self.conf.trainer.lr, self.conf.trainer.warmup_steps)
        if finite:
            self._step(gradients, norm, lr)
        metrics = self.sums.metrics(self.mesh, normaliser, tokens) | {"grad_norm": norm, "lr": lr}
        if self.reference is None:
            del metrics["kl"]
        if self.conf.on_nonfinite == "skip":
            metrics["skipped"] = float(not finite)
        if not finite:
            self._report(gradients, metrics)
        self.optimizer.zero_grad(set_to_none=True)
        self.sums = StepSums(self.device)
        self.steps += 1
        return metrics

    def _step(self, gradients: Mapping[str, torch.Tensor], norm: float, lr: float) -> None:
        if 0 < self.conf.trainer.clip_norm < norm:
            torch._foreach_mul_(list(gradients.values()), self.conf.trainer.clip_norm / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.updates += 1

    def _gradients(self) -> dict[str, torch.Tensor]:
        """This rank's shards of the gradients; zeros where nothing was trained on at all."""
        assert self.model is not None
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        named = self.model.named_parameters()
        return local_tensors({name: p.grad for name, p in named if p.grad is not None})

    def _gradient_norm(self, gradients: Mapping[str, torch.Tensor]) -> tuple[float, bool]:
        """The 2-norm of the whole gradient, in which each element counts once, whatever replicates
        it; NaN where it is not finite. And whether the gradient, the loss and all logprobs are
        finite. All ranks of the trainer get the same answer."""
        assert self.model is not None
        dims = tp_dims(self.model)
        first_tp = self.mesh.get_local_rank("tp") == 0
        total, copies = torch.zeros(2, dtype=torch.float64, device=self.device)
        for name, gradient in gradients.items():
            counts = first_tp or dims[name] is not None
            (total if counts else copies).add_(gradient.double().square().sum())
        # times 0: 0 for what is finite, NaN for all else, that of copies and replicas too
        both = torch.stack([total + copies * 0, self.sums.bad()])
        for axis in ("dp_shard", "tp"):
            dist.all_reduce(both, group=self.mesh.get_group(axis))
        seen = torch.stack([both[0] * 0, both[1]])
        dist.all_reduce(seen, group=self.mesh.get_group("dp_replicate"))
        norm, bad = torch.stack([(both[0] + seen[0]).sqrt(), seen[1]]).tolist()
        return norm, math.isfinite(norm) and bad == 0

    def _report(self, gradients: Mapping[str, torch.Tensor], metrics: Mapping[str, float]) -> None:
        """Says where the step is not finite, which all ranks of the trainer look for; raises that
        as RuntimeError unless the step is to be skipped."""
        layouts = [layout for layout in self.layouts if layout.name in self.master_names]
        blocks, weights = self._blocks(), local_tensors(self.parameters())
        mine = Findings(
            bad_sequences(self.sums.trained),
            bad_blocks({parameter_names(n): g for n, g in gradients.items()}, blocks),
            bad_blocks({layout.name: weights[layout.name] for layout in layouts}, blocks),
        )
        parts = gathered(mine, self.cpu_group)
        report = merged(self.steps + 1, self.conf.on_nonfinite, metrics, parts, layouts)
        announce(report, self.run_dir, self.cpu_group)
