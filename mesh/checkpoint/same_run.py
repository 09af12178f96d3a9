"""Whether a resumed run is the one that wrote the checkpoint: what a run computes with, and how its
checkpoints record that.

Another configuration, other files or other prompts are refused: the run would go on as another one
without a word. Code of the user's that has changed is a warning, since correcting it may be why the
run was ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mesh.checkpoint.files import Index
from mesh.config.changes import changed
from mesh.config.keys import RAISABLE, Refusal, override_problems, problem, refuse, value_of
from mesh.config.loading import from_yaml, to_yaml
from mesh.config.schema import Conf
from mesh.lifecycle.process import Process
from mesh.roles.trainer import Trainer
from mesh.tasks.prompts import PURE
from mesh.weights.bridge import weights_digest

ANEW = "or start a new run"
OF_PLACE = ("run_dir", "resume", "model.path", "model.tokenizer", "teacher.path")
"""Keys that say where something lies, which may be moved; what lies there is compared."""

FROZEN = {
    "reference": ("model.path", "reference of the KL (kl_coef)"),
    "teacher": ("teacher.path", "teacher"),
}
"""By the name of a frozen model, the key of its directory, and what it is to the run."""


@dataclass(frozen=True)
class Inputs:
    """What a run computes with beside its configuration, as digests by name.

    files: of tokenizer and model, without weights; code: modules of the task and the loss; drawn:
    of the prompts that the task draws for a step (1, 2, ...), "" where it has none.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)
    drawn: Callable[[int], str] = lambda step: ""

    def record(self, conf: Conf) -> dict[str, Any]:
        """As an index holds it; the keeper adds the prompts of the step."""
        return {"conf": to_yaml(conf), "files": dict(self.files), "code": dict(self.code)}


def frozen_digests(trainer: Trainer, group: dist.ProcessGroup) -> dict[str, str]:
    """Digests of the weights of frozen models, by name, while they are sharded: FSDP leaves some
    gathered after a forward pass. Collective."""
    frozen = trainer.frozen.items()
    return {name: weights_digest(one.weights(), one.layouts, group) for name, one in frozen}


def refuse_another_run(
    process: Process,
    path: Path,
    index: Index,
    conf: Conf,
    inputs: Inputs,
    frozen: Mapping[str, str],
) -> None:
    """Raise Refusal where the checkpoint at `path` is not one of the run of `conf`, and warn where
    the user's code has changed. frozen: digests of the weights of frozen models. Collective.
    """
    if index.seed != conf.seed:
        wrong = f"{path} belongs to a run with seed {index.seed}"
        raise Refusal(problem("seed", conf.seed, wrong, f"use {index.seed}"))
    for name, (key, role) in FROZEN.items():
        if index.digests.get(name) != frozen.get(name):
            wrong = f"its weights are not those that {path} has as {role}"
            remedy = f"restore the original weights, {ANEW}"
            raise Refusal(problem(key, value_of(conf, key), wrong, remedy))
    if not index.inputs:
        process.say(
            f"{path} was written by an older version: it could not be checked that configuration, "
            "tokenizer, code and prompts are those of the run"
        )
        return
    problems, warnings = process.from_rank0(differences(path, index, conf, inputs))
    refuse(problems)
    for warning in warnings:
        process.say(warning)


def differences(
    path: Path, index: Index, conf: Conf, inputs: Inputs
) -> tuple[list[str], list[str]]:
    """(problems, warnings) of going on from a checkpoint with these inputs."""
    saved, warnings = index.inputs, []
    # both as they read back: a 2 of a program is the text 2 of a file
    problems = configuration_problems(from_yaml(saved["conf"]), from_yaml(to_yaml(conf)))
    # an older version recorded fewer files
    recorded = {name: inputs.files.get(name, "") for name in saved["files"]}
    for name in other_items(saved["files"], recorded):
        wrong = f"{name} is not the file that the run computes with"
        problems.append(f"{path}: {wrong}; restore it, {ANEW}")
    for name in other_items(saved["code"], inputs.code):
        warnings.append(
            f"warning: {name} has changed since {path} was written: the resumed run may differ "
            "from one that was never interrupted"
        )
    before, now = saved.get("prompts"), inputs.drawn(index.step)
    if before and now and before != now:
        wrong = f"the task's prompts of step {index.step} are not those that the run drew"
        shown = f"{wrong} (digest {before}, now {now})"
        problems.append(f"{path}: {shown}; restore the task and its data, {ANEW}; {PURE}")
    return problems, warnings


def configuration_problems(saved: Conf, conf: Conf) -> list[str]:
    """Keys that a command line could not have set, so they were edited in RUN_DIR/config.yaml."""
    free = [*OF_PLACE, *(RAISABLE if saved.overlong == "stop" else ())]
    same = changed(saved, {name: value_of(conf, name) for name in free})
    return override_problems(same, conf, f"put that back into RUN_DIR/config.yaml, {ANEW}")


def refuse_fewer_steps(conf: Conf, step: int) -> None:
    """Raise Refusal where the run has taken more steps than it is to take."""
    if conf.steps < step:
        wrong = f"the run has taken {step} steps"
        raise Refusal(problem("steps", conf.steps, wrong, f"use {step} or more"))


def other_items(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names that do not have the same text in both."""
    return [name for name in dict.fromkeys([*saved, *now]) if saved.get(name) != now.get(name)]
