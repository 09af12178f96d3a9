"""The trainer: fp32 master weights under FSDP and TP, one optimizer step from summed leaf losses.

A step is any number of `accumulate` calls, then one `update`: losses are unnormalised sums, so the
gradients of leaves, microbatches and waves simply add; what they are divided by is known after the
last wave and applied once. Off the trainer's submesh every verb returns an empty result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mesh.batch import Leaf, PackedBatch, pack, schedule
from mesh.conf import Conf
from mesh.holdings import local_tensors
from mesh.layout import Meshes, dp_rank
from mesh.loss import TokenStats, kl_T, loss_sum, merge, stats_metrics, token_stats
from mesh.model.attention import packed_context
from mesh.model.hf import load_weights
from mesh.model.init import random_weights
from mesh.model.layouts import role_layouts, weight_names
from mesh.model.logprobs import TokenScores
from mesh.model.parallel import tp_dims
from mesh.model.qwen3 import Qwen3, build_model, named_weights
from mesh.pulse import beat
from mesh.reshard import Block
from mesh.types import ModelShape

Objective = Callable[[PackedBatch, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Start:
    """Where weights come from: a Hugging Face directory, or (path None) random ones of `seed`."""

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
    ) -> None:
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
        self.steps = 0
        self.stats: TokenStats
        self.extra: torch.Tensor
        self._trained_due: int
        self.model: Qwen3 | None = None
        self.reference: Qwen3 | None = None
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
        self._reset()

    def _build(self, dtype: torch.dtype, start: Start) -> Qwen3:
        recompute = self.conf.trainer.activation_checkpointing
        fsdp = {"compute_dtype": dtype, "activation_checkpointing": recompute}
        model = build_model(
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

    def continue_after(self, steps: int) -> None:
        """`state` was filled with that after so many steps: warm-up and bias correction go on."""
        self.steps = steps
        for weight in self.state()["weights"].values():
            self._moments(weight)["step"].fill_(steps)

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
            self._backward(self.model, pack(microbatch).to(self.device), objective)
            for microbatch in self.microbatches(leaves, token_counts)
        ]
        trained = sum(len(r.tokens) for leaf in leaves for r in leaf.rollouts)
        due = self._trained_due + trained
        assert int(self.stats.sums[0]) == due, (
            f"{int(self.stats.sums[0])} response tokens were trained on, {due} were due"
        )
        self._trained_due = due
        return torch.cat([torch.zeros(0, device=self.device), *logprobs])

    def microbatches(
        self, leaves: Sequence[Leaf], token_counts: Sequence[Sequence[int]]
    ) -> list[list[Leaf]]:
        """What this rank runs together of its leaves; see `accumulate`. Empty off the trainer."""
        if self.dp_rank is None:
            return []
        counts = [leaf.num_tokens for leaf in leaves]
        assert counts == list(token_counts[self.dp_rank]), (
            "these are not the leaves of the schedule"
        )
        planned = schedule(token_counts, self.conf.trainer.microbatch_tokens)[self.dp_rank]
        return [[leaves[i] for i in indices] for indices in planned]

    def score(self, model: Qwen3, batch: PackedBatch) -> TokenScores:
        """(logprobs_A, entropy_A) of a batch's response tokens, by the policy or the reference."""
        beat()
        context = packed_context(batch.cu_seqlens, batch.max_seqlen)
        temperature = self.conf.generator.temperature
        return model(batch.tokens_T, batch.positions_T, context, batch.index_A, batch.targets_A,
                     temperature)  # fmt: skip

    def _backward(self, model: Qwen3, batch: PackedBatch, objective: Objective) -> torch.Tensor:
        """Adds to the gradients and the step's statistics. Returns logprobs_A, detached."""
        logprobs_A, entropy_A = self.score(model, batch)
        loss_A, clipped_A = objective(batch, logprobs_A)
        if self.reference is not None:
            with torch.no_grad():
                reference_A, _ = self.score(self.reference, batch)
            divergence_A = kl_T(logprobs_A, reference_A)
            loss_A = loss_A + self.conf.kl_coef * divergence_A
            self.extra[2] += divergence_A.detach().double().sum()
        loss = loss_sum(loss_A, batch.weights_A)
        loss.backward()
        self.stats = merge(
            self.stats, token_stats(logprobs_A, batch.generator_logprobs_A, clipped_A)
        )
        self.extra[0] += loss.detach().double()
        self.extra[1] += entropy_A.double().sum()
        return logprobs_A.detach()

    def _reset(self) -> None:
        nothing = torch.zeros(0, device=self.device)
        self.stats = token_stats(nothing, nothing, nothing.bool())
        # sums over tokens of the loss (weighted), the entropy and the KL to the reference
        self.extra = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._trained_due = 0

    @torch.no_grad()
    def update(self, normaliser: float, tokens: int) -> dict[str, float]:
        """Divide the gradients by `normaliser`, clip, step. Returns the step's metrics.

        tokens: response tokens of the whole step, over all ranks; checked against what was trained.
        Raises RuntimeError where the gradient's norm is not finite. Empty off the trainer.
        """
        if self.model is None:
            return {}
        gradients = self._gradients()
        torch._foreach_div_(list(gradients.values()), normaliser)
        norm = self._gradient_norm(gradients)
        if not norm < float("inf"):
            raise RuntimeError(f"step {self.steps}: the gradient's norm is {norm}")
        if 0 < self.conf.trainer.clip_norm < norm:
            torch._foreach_mul_(list(gradients.values()), self.conf.trainer.clip_norm / norm)
        lr = lr_at(self.steps, self.conf.trainer.lr, self.conf.trainer.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return self._metrics(normaliser, tokens) | {"grad_norm": norm, "lr": lr}

    def _gradients(self) -> dict[str, torch.Tensor]:
        """This rank's shards of the gradients; zeros where nothing was trained on at all."""
        assert self.model is not None
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        named = self.model.named_parameters()
        return local_tensors({name: p.grad for name, p in named if p.grad is not None})

    def _gradient_norm(self, gradients: Mapping[str, torch.Tensor]) -> float:
        """The 2-norm of the whole gradient; each element counts once, whatever replicates it."""
        assert self.model is not None
        dims = tp_dims(self.model)
        first_tp = self.mesh.get_local_rank("tp") == 0
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, gradient in gradients.items():
            if first_tp or dims[name] is not None:
                total += gradient.double().square().sum()
        for axis in ("dp_shard", "tp"):
            dist.all_reduce(total, group=self.mesh.get_group(axis))
        return float(total.sqrt())

    def _metrics(self, normaliser: float, tokens: int) -> dict[str, float]:
        for axis in ("dp_replicate", "dp_shard"):
            group = self.mesh.get_group(axis)
            for sums in (self.stats.sums, self.extra):
                dist.all_reduce(sums, group=group)
            dist.all_reduce(self.stats.maxima, op=dist.ReduceOp.MAX, group=group)
        trained = int(self.stats.sums[0])
        assert trained == tokens, f"{trained} response tokens were trained on, {tokens} were due"
        loss, entropy, divergence = self.extra.tolist()
        metrics = stats_metrics(self.stats)
        metrics |= {
            "tokens/trained": float(trained),
            "loss": loss / normaliser,
            "entropy": entropy / max(trained, 1),
        }
        if self.reference is not None:
            metrics["kl"] = divergence / max(trained, 1)
        self._reset()
        return metrics
