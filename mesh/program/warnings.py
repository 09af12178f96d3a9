"""What a run is warned about at its start: it can run, and would not compute what it seems to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mesh.config.evaluation_sets import PREFIX, set_confs
from mesh.config.keys import Refusal, conf_keys, shown, value_of
from mesh.config.loading import read_conf
from mesh.config.schema import Conf, resolve_path
from mesh.model.families import directory_warnings
from mesh.program.plan import Plan, dtype_of
from mesh.tasks import all_args

SAMPLED = ("seed", "generator.temperature", "generator.top_k", "generator.top_p")
"""Keys that decide what is drawn, and nothing about greedy answers."""

EVALUATED = (
    "task", "scores", "score_weights", "eval.num_prompts", "eval.num_samples", *SAMPLED,
    "generator.max_new_tokens", "generator.stop", "generator.dtype", "engine", "vllm.model",
    "batch_invariant", *(n for n in conf_keys() if n.startswith(("prompt.", "conversation."))),
)  # fmt: skip
"""Keys that, with task_args, decide the numbers of an evaluation of given weights."""

SHOWN_ONLY = ("k", "greedy")
"""Keys of a named set that decide which metrics there are, and no number."""


def start_warnings(plan: Plan) -> list[str]:
    """The warnings of a program that trains on its own rollouts, each a line."""
    return [*truncation_warnings(plan), *ratio_warnings(plan)]


def model_warnings(conf: Conf) -> list[str]:
    """What the model's directory says that is not read, each a line."""
    if conf.model.path is None:
        return []
    directory, ignored = resolve_path(conf.model.path), conf.model.ignore_config
    return [f"warning: {line}" for line in directory_warnings(directory, ignored)]


def truncation_warnings(plan: Plan) -> list[str]:
    """Truncated sampling, under which the tokens come from another distribution than that of the
    logprobs, whose gradient is then not that of the expected reward.
    """
    generator, vocab_size = plan.generator, plan.shape.vocab_size
    keys = {
        "generator.top_k": (generator.top_k, 0, 0 < generator.top_k < vocab_size),
        "generator.top_p": (generator.top_p, 1, generator.top_p < 1),
    }
    cut = {name: pair for name, (*pair, truncates) in keys.items() if truncates}
    if not cut or generator.truncated_logprobs:
        return []
    given = " ".join(f"{name}={shown(value)}" for name, (value, _) in cut.items())
    remedy = " ".join(f"{name}={shown(off)}" for name, (_, off) in cut.items())
    return [
        f"warning: {given}: tokens are drawn from the truncated distribution, and the logprobs of "
        "both sides are those of the untruncated one, so the policy gradient is biased although "
        f"logprob_diff does not show it; set {remedy}, or "
        "batch_invariant=true truncated_logprobs=true"
    ]


def ratio_warnings(plan: Plan) -> list[str]:
    """The ratio of whole sequences to the generator's logprobs, in which rounding adds up: beyond
    bounds that are meant for a policy that has moved.
    """
    objective, roles = plan.objective, (plan.trainer.dtype, plan.generator.dtype)
    measured = plan.step.updates > 1 or "trainer_logprobs" in objective.needs
    exact = plan.chunks is not None or torch.bfloat16 not in roles
    if "sequence_ratio" not in objective.loss.needs or measured or exact:
        return []
    return [
        "warning: the ratio of this loss is that of whole sequences, taken to the generator's "
        "logprobs, which in bfloat16 are not the trainer's: rounding alone may clip them "
        "(clip_fraction); set batch_invariant=true, or importance=tis or mask, with which it is "
        "taken to the trainer's own"
    ]


def other_run_warnings(conf: Conf, plan: Plan, names: tuple[str, ...] = EVALUATED) -> list[str]:
    """Keys `names` that differ from those of the run that wrote model.path: the numbers do not
    compare with that run's own. A task's settings are looked at with the task, named sets with
    eval.num_prompts where both have them.
    """
    run_dir = run_of_model(conf)
    if run_dir is None:
        return []
    file, given = run_dir / "config.yaml", f"model.path={conf.model.path}"
    try:
        run = read_conf(file)
        ours, theirs = deciding(conf, plan, names), deciding(run, plan, names)
    except (Refusal, ValueError) as error:
        why = " ".join(str(error).split())
        return [f"warning: {given} is of a run whose {file} cannot be compared with: {why}"]
    other = [
        f"{name}={shown(ours.get(name))} (the run: {shown(theirs.get(name))})"
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
        and not (name.startswith(PREFIX) and (name not in ours or name not in theirs))
    ]
    if not other:
        return []
    return [
        f"warning: {given} is of a run with other keys, so results do not compare with its own: "
        f"{', '.join(other)}; start with conf={file} to have those of the run"
    ]


def run_of_model(conf: Conf) -> Path | None:
    """The run directory in which model.path lies, as RUN_DIR/model or RUN_DIR/best/step-N."""
    if conf.model.path is None or conf.model.init == "random":
        return None
    path = resolve_path(conf.model.path).resolve()
    above = path.parent if path.name == "model" else path.parent.parent
    in_run = path.name == "model" or path.parent.name == "best"
    return above if in_run and (above / "config.yaml").is_file() else None


def deciding(conf: Conf, plan: Plan, names: tuple[str, ...]) -> dict[str, Any]:
    """The values of keys that decide results, defaults that depend on the device resolved."""
    values = {name: value_of(conf, name) for name in names}
    if "generator.dtype" in values:
        dtype = dtype_of(conf.generator.dtype, plan.device)
        values["generator.dtype"] = str(dtype).removeprefix("torch.")
    if conf.engine != "vllm":
        values.pop("vllm.model", None)
    if "task" in values:
        args = all_args(conf.task, conf.task_args)
        values |= {f"task_args.{key}": value for key, value in args.items()}
    if "eval.num_prompts" in names:
        for name, keys in set_confs(conf).items():
            own = {key: value for key, value in asdict(keys).items() if value not in (None, {})}
            values[f"{PREFIX}{name}"] = {k: v for k, v in own.items() if k not in SHOWN_ONLY}
    return values
