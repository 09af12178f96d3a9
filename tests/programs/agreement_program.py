"""Ranks that disagree, case by case: `torchrun agreement_program.py FILE`; rank 0 writes what every
rank found, and what it costs to look.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from user_tasks import AnswersByRank, Keyed, Unseeded

from mesh.config.changes import changed
from mesh.config.loading import load_conf
from mesh.config.schema import PACKAGE_DATA, Conf
from mesh.lifecycle.agreement import Part, disagreements
from mesh.lifecycle.process import Process, start
from mesh.program.assembly import check
from mesh.program.plan import Plan
from mesh.program.shared import of_plan, of_start, of_user_code
from mesh.rl.losses import LOSSES
from mesh.tasks import Draw, Task
from mesh.tasks.prompts import PromptSource, step_prompts
from mesh.tasks.spell_backward import SpellBackward
from mesh.text.encoding import PromptEncoder
from mesh.text.tokenizer import CHARACTERS, load_tokenizer

REPEATS = 50


def main(file: Path) -> None:
    _, conf = load_conf(["conf=qwen3_tiny", "num_prompts=66", "log.tensorboard=false"])
    with start(device="cpu", timeout_seconds=60) as process:
        last = process.rank == process.world_size - 1
        plan = check(conf, process)
        found = {name: case(process, conf, plan, last, file.parent) for name, case in CASES.items()}
        parts = {
            "prompts of a step": lambda: step_prompts(plan.prompts, process, Draw(1, 64)),
            "without comparing": lambda: [
                plan.prompts.fault(p) for p in plan.task.train_prompts(1, 64)[:: process.world_size]
            ],
        }
        cost = {name: milliseconds(call) for name, call in parts.items()}
        content = {"found": process.gather(found), "milliseconds": cost}
        process.write(file, json.dumps(content))


def nothing(process: Process, conf: Conf, plan: Plan, last: bool, root: Path) -> Any:
    parts = [*of_start(conf), of_user_code(SpellBackward(0), LOSSES["grpo"], [], []), of_plan(plan)]
    return disagreements(process, *parts)


def a_key(process: Process, conf: Conf, plan: Plan, last: bool, root: Path) -> Any:
    return disagreements(process, *of_start(changed(conf, {"trainer.lr": 5e-4}) if last else conf))


def a_variable(process: Process, conf: Conf, plan: Plan, last: bool, root: Path) -> Any:
    os.environ |= {"NVIDIA_TF32_OVERRIDE": "0"} if last else {}
    found = disagreements(process, *of_start(conf))
    os.environ.pop("NVIDIA_TF32_OVERRIDE", None)
    return found


def weights(process: Process, conf: Conf, plan: Plan, last: bool, root: Path) -> Any:
    """The last rank's copy of the model has one value changed in every tensor."""
    copy = root / f"model-{process.rank}"
    copy.mkdir()
    for path in (PACKAGE_DATA / "qwen3_tiny").iterdir():
        content = bytearray(path.read_bytes())
        if last and path.suffix == ".safetensors":
            content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        (copy / path.name).write_bytes(content)
    of_model = next(
        p for p in of_start(changed(conf, {"model.path": str(copy)})) if "model" in p.name
    )
    return disagreements(process, of_model)


def own_code(process: Process, conf: Conf, plan: Plan, last: bool, root: Path) -> Any:
    """A task whose module is another file on the last rank."""
    directory = root / f"code-{process.rank}"
    directory.mkdir()
    text = "from mesh.tasks.spell_backward import SpellBackward\nclass Own(SpellBackward): pass\n"
    (directory / "own_task.py").write_text(text + "# edited\n" * last)
    sys.path.insert(0, str(directory))
    from own_task import Own  # type: ignore[import-not-found]

    return disagreements(process, of_user_code(Own(0), None, [], []))


def import_fails(process: Process, conf: Conf, plan: Plan, last: bool, root: Path) -> Any:
    return disagreements(process, of_user_code(None, None, [], ["cannot import x"] if last else []))


def a_plan(process: Process, conf: Conf, plan: Plan, last: bool, root: Path) -> Any:
    other = check(changed(conf, {"trainer.microbatch_tokens": 8192}), process)
    return disagreements(process, of_plan(other if last else plan))


def several_ranks(process: Process, conf: Conf, plan: Plan, last: bool, root: Path) -> Any:
    long = "x" * 100
    items = {"same": "1", "text": f"{long}{process.rank}{long}"}
    return disagreements(process, Part("the part", items, "remedy"))


def prompts_of(task: Task, step: int, **keys: Any) -> Callable[..., Any]:
    def drawn(process: Process, conf: Conf, plan: Plan, last: bool, root: Path) -> Any:
        encoder = PromptEncoder(load_tokenizer(CHARACTERS))
        source = PromptSource(task, encoder, "skip", 32, 4096, 8, **keys)
        try:
            return [p.text for p in step_prompts(source, process, Draw(step, 8))[0]]
        except ValueError as error:
            return str(error)

    return drawn


CASES = {
    "nothing": nothing,
    "a key": a_key,
    "a variable": a_variable,
    "weights": weights,
    "own code": own_code,
    "import fails": import_fails,
    "a plan": a_plan,
    "several ranks": several_ranks,
    "pure prompts": prompts_of(Keyed(0), 1),
    "answers by rank": prompts_of(AnswersByRank(0), 1),
    "impure later, before": prompts_of(Unseeded(0, pure=3), 2),
    "impure later": prompts_of(Unseeded(0, pure=3), 3),
}


def milliseconds(call: Callable[[], Any]) -> float:
    """The median."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
