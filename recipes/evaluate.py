"""Evaluation alone: how well a checkpoint answers the task's held-out prompts.

    torchrun --nproc-per-node=2 recipes/evaluate.py conf=RUN_DIR/config.yaml \\
        model.path=RUN_DIR/model

weights -> trainer's layout -> reshard into the generator -> samples -> rewards -> pass@k. The same
bridge, engine, prompts and random numbers as the evaluations of a run with the same keys, so the
numbers compare; keys in which the run that wrote the model differs are warned about.
Ctrl-C ends it at once: there is nothing to save. Left out: confidence intervals, several tasks at
once, and a run directory: only eval.output, where it is set, is written.
"""

from __future__ import annotations

import json
import sys

from mesh.config.schema import Conf, resolve_path
from mesh.program.assembly import assemble, check, launch, read_command, sync
from mesh.program.warnings import other_run_warnings
from mesh.recipes.grpo import held_out


def main(argv: list[str]) -> None:
    _, conf = read_command(argv)
    with launch(conf) as process:
        plan = check(conf, process, training=False)
        for warning in other_run_warnings(conf, plan):
            process.say(warning)
        program = assemble(plan, process)
        sync(program)
        metrics = held_out(program, process)
        process.say(table(conf, metrics, len(plan.evaluations[""].prompts)))
        if conf.eval.output is not None:
            process.write(resolve_path(conf.eval.output), json.dumps(metrics, indent=2) + "\n")


def table(conf: Conf, metrics: dict[str, float], num: int) -> str:
    """The metrics, one a line, under what they were measured on."""
    title = f"{conf.task}: {num} held-out prompts x {conf.eval.num_samples}"
    lines = [f"  {name:<22}{value:.4f}" for name, value in metrics.items()]
    return "\n".join([f"{title} samples, model {conf.model.path or conf.model.init}", *lines])


if __name__ == "__main__":
    main(sys.argv[1:])
