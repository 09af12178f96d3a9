"""Evaluation alone: how well a model answers the task's held-out prompts, and those of other sets.

    torchrun --nproc-per-node=2 recipes/evaluate.py conf=RUN_DIR/config.yaml \\
        model.path=RUN_DIR/model

weights -> trainer's layout -> reshard into the generator -> samples -> scores -> pass@k and the
rest, each with a 95% interval. `model.path` is any directory that a run can start from, and the
engine any that a run can have. The same bridge, engine, prompts and random numbers as the
evaluations of a run with the same keys, so the numbers compare; keys in which the run that wrote
the model differs are warned about. `tools/compare_evaluations.py` compares two files of results.

Ctrl-C ends it at once: there is nothing to save. Left out: a run directory; only eval.output and
eval.results, where they are set, are written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from mesh.config.schema import Conf, resolve_path
from mesh.program.assembly import assemble, check, launch, read_command, sync
from mesh.program.plan import Plan
from mesh.program.warnings import other_run_warnings
from mesh.recipes.grpo import evaluations
from mesh.rl.estimators import interval_of
from mesh.roles.evaluation import Evaluation, prefix_of
from mesh.runs.evaluations import write_results


def main(argv: list[str]) -> None:
    _, conf = read_command(argv)
    with launch(conf) as process:
        plan = check(conf, process, training=False)
        for warning in other_run_warnings(conf, plan):
            process.say(warning)
        program = assemble(plan, process)
        sync(program)
        found = evaluations(program, process, rows=conf.eval.results is not None)
        process.say("\n\n".join(table(conf, plan, name, one) for name, one in found.items()))
        if conf.eval.results is not None:
            write_results(resolve_path(conf.eval.results), found, process)
        if conf.eval.output is not None:
            process.write(resolve_path(conf.eval.output), summary(found))


def table(conf: Conf, plan: Plan, name: str, found: Evaluation) -> str:
    """The metrics of a set, one a line with its interval, under what they were measured on."""
    held = plan.evaluations[name]
    asked = f"{len(held.prompts)} held-out prompts x {held.num_samples} samples"
    title, lines = f"{name or conf.task}: {asked}", []
    width = max(map(len, found.metrics)) + 2
    for metric, value in found.metrics.items():
        column = found.values.get(metric.removeprefix(f"{prefix_of(name)}/"))
        ends = f"  [{', '.join(f'{end:.4f}' for end in interval_of(column))}]" if column else ""
        lines.append(f"  {metric:<{width}}{value:.4f}{ends}")
    return "\n".join([f"{title}, model {conf.model.path or conf.model.init}", *lines])


def summary(found: Mapping[str, Evaluation]) -> str:
    """All metrics as JSON, and the intervals of those that are means over problems."""
    metrics = {name: value for one in found.values() for name, value in one.metrics.items()}
    intervals = {
        f"{prefix_of(name)}/{metric}": interval_of(column)
        for name, one in found.items()
        for metric, column in one.values.items()
    }
    return json.dumps(metrics | {"intervals": intervals}, indent=2) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
