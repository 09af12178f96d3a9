"""The trainer: fp32 master weights under FSDP and TP, an optimizer's update from summed losses.

An update is any number of `accumulate` calls, then one `update`: losses are unnormalised sums, so
the gradients of passes and waves simply add; what they are divided by is known after the last wave
and applied once. A step has one update, or several, each on a minibatch. Off the trainer's submesh
every verb returns an empty result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh

from mesh.layout.holdings import local_tensors
from mesh.layout.meshes import Meshes, dp_rank
from mesh.model.flops import train_flops
from mesh.model.layouts import role_layouts, weight_names
from mesh.model.logprobs import TokenScores
from mesh.model.policy import Policy, named_weights, parameter_names
from mesh.rl.losses import Need
from mesh.rl.objective import Objective
from mesh.rl.packing import PackedBatch, pack
from mesh.rl.step import Pass
from mesh.roles.frozen import FrozenModel
from mesh.roles.gradients import gradient_norm, summed_gradients
from mesh.roles.models import build_model, own_blocks
from mesh.roles.nonfinite import announce, findings, gathered, merged
from mesh.roles.optimizer import EMBEDDINGS, Optimizer, state_kinds
from mesh.roles.passes import (
    SCORED,
    Credit,
    PassScores,
    backward,
    forward,
    joined_scores,
    score_pass,
)
from mesh.roles.sums import StepSums, largest
from mesh.roles.trainer_settings import REFERENCE, TEACHER, TrainerSettings
from mesh.types import Distribution

MEASURED = {REFERENCE: "kl", TEACHER: "teacher_kl"}
"""By the name of a frozen model, the metric that compares the policy with it."""


class Trainer:
    """Owns the policy's master weights, its gradients, the optimizer and the frozen models."""

    def __init__(
        self,
        settings: TrainerSettings,
        meshes: Meshes,
        device: torch.device,
        run_dir: str | None = None,
    ) -> None:
        """run_dir: where a step that is not finite is written down; None: nowhere."""
        self.settings, self.device = settings, device
        self.mesh: DeviceMesh = meshes.trainer_mesh
        shape = settings.shape
        self.layouts = role_layouts(shape, settings.max_length, self.mesh.mesh, fsdp=True)
        self.weight_names = weight_names(shape)
        # of the two names of a tied weight, the first
        self.master_names = self.weight_names - ({"lm_head.weight"} if shape.tied else set())
        self.dp, self.tp = meshes.layout.trainer.dp, meshes.layout.trainer.tp
        self.dp_rank = dp_rank(self.mesh)
        self.speaks = meshes.on_trainer and self.mesh.get_local_rank("tp") == 0  # of its tp ranks
        self.cpu_group, self.run_dir = meshes.trainer_cpu_group, run_dir
        self.steps = self.without_signal = 0  # all, and those whose gradients were exactly 0
        self.silent = False  # the last one is such a step, so far
        self.credits: list[Credit] = []  # of tokens with advantages of their own
        self.flops = 0.0  # this rank's part of those of all passes since it was last set to 0
        self.measured = ["entropy", *(MEASURED[name] for name in settings.frozen)]
        self.sums = StepSums(device, self.measured)
        self.model: Policy | None = None
        if meshes.on_trainer:
            self.model = build_model(settings.source, settings, self.mesh, device, self.layouts)
            if settings.optimizer is not None:
                self.optimizer = Optimizer(self.masters(), settings.optimizer)
        self.frozen = {
            name: FrozenModel(source, settings, self.mesh, device, meshes.on_trainer)
            for name, source in settings.frozen.items()
        }

    @property
    def reference(self) -> Policy | None:
        """The frozen copy of the start; None without one, and off the trainer."""
        return self.frozen[REFERENCE].model if REFERENCE in self.frozen else None

    @property
    def teacher(self) -> Policy | None:
        """The frozen model to distil from; None without one, and off the trainer."""
        return self.frozen[TEACHER].model if TEACHER in self.frozen else None

    def weights(self) -> dict[str, torch.Tensor]:
        """Master weights and buffers by torchtitan's names; DTensors. Empty off the trainer."""
        if self.model is None:
            return {}
        return {**named_weights(self.model), **dict(self.model.named_buffers())}

    def parameters(self) -> dict[str, torch.Tensor]:
        """Master weights alone, without buffers."""
        return named_weights(self.model) if self.model is not None else {}

    def masters(self) -> dict[str, torch.Tensor]:
        """Master weights, a tied one under its first name."""
        return {k: w for k, w in self.parameters().items() if k in self.master_names}

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors that the next step depends on, by kind and name: `weights` and the optimizer's,
        of which moments are zeros before the first step. DTensors, the trainer's own; a tied weight
        is listed once. Off the trainer every kind is empty."""
        if self.model is None:
            settings = self.settings.optimizer
            kinds = state_kinds(settings) if settings is not None else ()
            return {kind: {} for kind in ("weights", *kinds)}
        return {"weights": self.masters()} | self.optimizer.state()

    def answering(self) -> dict[str, torch.Tensor]:
        """The weights that are evaluated and exported, by the names of `parameters`: the average of
        a run that has one, else the newest. Empty off the trainer."""
        if self.model is None or not self.averages:
            return self.parameters()
        averaged = self.optimizer.averaged
        assert averaged is not None, "the optimizer averages as its settings say"
        tied = {"lm_head.weight": averaged.tensors[EMBEDDINGS]} if self.settings.shape.tied else {}
        return averaged.tensors | tied

    @property
    def averages(self) -> bool:
        """True if the run has averaged weights; the same on all ranks."""
        return self.settings.optimizer is not None and self.settings.optimizer.ema > 0

    @property
    def updates(self) -> int:
        """Updates that changed the weights; 0 off the trainer."""
        return self.optimizer.updates if self.model is not None else 0

    def continue_after(self, steps: int, updates: int, without_signal: int) -> None:
        """Continue after so many steps with `updates` that changed the weights; some steps were
        without signal. `state` holds the last step's tensors already."""
        self.steps, self.without_signal = steps, without_signal
        if self.model is not None:
            self.optimizer.continue_after(updates)

    def restart(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take these local weights, with an optimizer that has made no step."""
        with torch.no_grad():
            for name, tensor in local_tensors(self.parameters()).items():
                tensor.copy_(weights[name])
        self.steps = self.without_signal = 0
        if self.model is not None:
            self.optimizer.restart()

    def forward(
        self, model: Policy, batch: PackedBatch, at: Distribution | None = None
    ) -> TokenScores:
        """(logprobs_A, entropy_A) of a batch's loss tokens, by the policy or a frozen model.

        at: the distribution; unset, that of training.
        """
        return forward(model, batch, at or self.settings.distribution)

    def score(
        self, passes: Sequence[Pass], needs: frozenset[Need], policy: bool = False
    ) -> list[PassScores]:
        """First phase of a wave: what is needed of its passes before they are trained on; policy:
        also the policy's own logprobs, with which all updates of a step compare.

        A collective of the trainer, in which every rank has the same number of passes.
        """
        if self.model is None or not (policy or needs & SCORED):
            return [PassScores() for _ in passes]
        others: dict[Need, Policy | None] = {
            "reference_logprobs": self.reference,
            "teacher_logprobs": self.teacher,
        }
        rest = (others, needs, policy, self.settings.distribution, self.sums)
        found = [score_pass(pack(leaves).to(self.device), self.model, *rest) for leaves in passes]
        self._reshard()
        return found

    def _reshard(self) -> None:
        for frozen in self.frozen.values():
            frozen.reshard()

    def accumulate(
        self, passes: Sequence[Pass], objective: Objective, scores: Sequence[PassScores]
    ) -> TokenScores:
        """Second phase: forward and backward over these passes, adding to the gradients.

        Returns the scores of all their loss tokens, in order, fp32 and detached. A collective of
        the trainer, in which every rank has the same number of passes.
        """
        nothing = torch.zeros(0, device=self.device)
        if self.model is None:
            return TokenScores(nothing, nothing)
        teacher = self.teacher if "teacher_kl" in objective.needs else None
        found = [
            backward(
                self.model, pack(leaves).to(self.device), leaves, objective, known,
                self.settings.distribution, self.sums, teacher,
            )
            for leaves, known in zip(passes, scores, strict=True)
        ]  # fmt: skip
        self._reshard()
        rollouts = [r for one in passes for leaf in one for r in leaf.rollouts]
        self.sums.expect(tokens := sum(r.length for r in rollouts))
        lengths = [r.num_tokens for r in rollouts]
        self.flops += train_flops(self.settings.shape, lengths, tokens) / self.tp
        joined, advantages_A = joined_scores(found, nothing)
        if objective.credits_tokens:
            self.credits.append((rollouts, advantages_A))
        return joined

    @torch.no_grad()
    def update(self, normaliser: float, tokens: int, number: int = 0) -> dict[str, float]:
        """Divide the gradients by `normaliser`, clip, step. Returns the update's metrics.

        tokens: loss tokens of the whole update, over all ranks; checked against what was trained.
        number: of the update in its step, whose learning rate all its updates have; the first one
        begins a step. An update whose loss, gradient or logprobs are not finite on any rank changes
        neither weights nor moments: RuntimeError, or with on_nonfinite=skip the metric `skipped`,
        on all ranks. Nor does one whose whole gradient is exactly 0; `steps_without_signal` counts
        the steps of the run that had no other. Empty off the trainer.
        """
        if self.model is None:
            return {}
        gradients = summed_gradients(self.model)
        torch._foreach_div_(list(gradients.values()), normaliser)
        norm, finite = gradient_norm(gradients, self.sums.bad(), self.model, self.mesh)
        step = self.steps if number == 0 else self.steps - 1
        lr = self.optimizer.lr(step)
        if finite:
            self.optimizer.step(gradients, norm, lr)
        self.sums.reduce(self.mesh)
        metrics = self.sums.metrics(normaliser, tokens) | {"grad_norm": norm, "lr": lr}
        if self.settings.on_nonfinite == "skip":
            metrics["skipped"] = float(not finite)
        if not finite:
            self._report(step, number, gradients, metrics)
        self._count(number, silent=finite and norm == 0)
        metrics["steps_without_signal"] = float(self.without_signal)
        self._clear()
        return metrics

    def _count(self, number: int, silent: bool) -> None:
        """Count a step, which is without signal while all of its updates are silent."""
        was = self.silent if number else False
        self.silent = silent and (was or number == 0)
        self.without_signal += int(self.silent) - int(was)
        self.steps += number == 0

    def approx_kl(self) -> float:
        """Mean KL of the policy from the old one over the tokens accumulated since the last update,
        one number on all ranks; infinite where it is not finite, 0 off the trainer. A collective of
        the trainer."""
        if self.model is None:
            return 0.0
        self.sums.reduce(self.mesh)
        return largest(self.sums.ratios()["approx_kl"], self.cpu_group)

    def leave_out(self) -> dict[str, float]:
        """Make no update of what was accumulated since the last one; how far the policy had moved
        from the old one on it, once `approx_kl` was asked for. Empty off the trainer."""
        if self.model is None:
            return {}
        moved = self.sums.ratios()
        self._clear()
        return moved

    def _clear(self) -> None:
        self.optimizer.zero_grad()
        self.sums = StepSums(self.device, self.measured)

    def _report(
        self,
        step: int,
        number: int,
        gradients: Mapping[str, torch.Tensor],
        metrics: Mapping[str, float],
    ) -> None:
        """Report where an update is not finite, which all ranks of the trainer look for; raises
        that as RuntimeError unless it is to be skipped."""
        layouts = [layout for layout in self.layouts if layout.name in self.master_names]
        weights = local_tensors(self.parameters())
        mine = findings(
            self.sums.trained,
            {parameter_names(name): gradient for name, gradient in gradients.items()},
            {layout.name: weights[layout.name] for layout in layouts},
            own_blocks(self.layouts),
        )
        parts = gathered(mine, self.cpu_group)
        action = self.settings.on_nonfinite
        report = merged(step + 1, action, metrics, parts, layouts, update=number + 1)
        announce(report, self.run_dir, self.cpu_group)
