"""Four gloo ranks that train with the native engine and with vLLM, in one layout after another.

`DIR/RANK.json` gets, by engine and layout, what this rank saw of three steps of the recipe. Then
vLLM's own model with ordinary kernels; and at the end an engine fails on one rank.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from forked import run_ranks
from shared_heads import one_kv_head

from mesh.config.changes import changed
from mesh.config.schema import Conf
from mesh.engine.vllm.environment import prepare
from mesh.exactness.layouts import built
from mesh.invariant.switch import batch_invariant
from mesh.lifecycle.process import Process, start
from mesh.lifecycle.timers import Phases
from mesh.program.assembly import Program, check, read_command
from mesh.program.plan import Plan
from mesh.recipes.grpo import train_step

STEPS = 3
FAILURE = "the KV cache is on fire"
LAYOUTS = {
    "split_2_2_tp": ("split", 1, 2),
    "split_2_2_dp": ("split", 2, 1),
    "colocated_tp": ("colocated", 2, 2),
    "colocated_dp": ("colocated", 4, 1),
}
"""(mode, generator.dp, generator.tp)"""
SHARED = "colocated_tp"
"""The layout in which both roles' tensor-parallel ranks share the one kv head of the model, which
also has biases."""


def laid_out(conf: Conf, engine: str, layout: str, one_head: Conf) -> Conf:
    mode, dp, tp = LAYOUTS[layout]
    keys = {"engine": engine, "mesh.mode": mode, "generator.dp": dp, "generator.tp": tp}
    if layout == SHARED:
        conf, keys["trainer.tp"] = one_head, 2
    return changed(conf, keys)


def planned(conf: Conf, process: Process) -> Plan:
    return check(conf, process, held_out=False)


def steps(plan: Plan, process: Process) -> dict[str, Any]:
    with built(plan, process) as program:
        generated: list[dict[str, Any]] = []
        if program.generator.engine is not None:
            engine, generate = program.generator.engine, program.generator.engine.generate

            def watched(*args):
                completions = generate(*args)
                generated.extend(vars(completion) for completion in completions)
                return completions

            engine.generate = watched
        metrics = [
            train_step(program, process, Phases(process.device), n).metrics for n in range(STEPS)
        ]
        return {"generated": generated, "metrics": metrics, "name": name_of(program)}


def name_of(program: Program) -> str:
    return type(program.generator.engine).__name__


def main(directory: Path, words: list[str], shared: list[str]) -> None:
    _, conf = read_command(words)
    _, one_head = read_command([*words, *shared])
    found: dict[str, Any] = {}
    with ExitStack() as switch:
        switch.enter_context(batch_invariant(True, "cpu", conf.invariant.chunks))
        with start("cpu", conf.timeout_seconds) as process:
            for layout in LAYOUTS:
                for engine in ("native", "vllm"):
                    plan = planned(laid_out(conf, engine, layout, one_head), process)
                    found[f"{engine} {layout}"] = steps(plan, process)
            switch.close()
            keys = {"batch_invariant": False, "vllm.model": "native"}
            for name, layout in (("own", "split_2_2_tp"), ("own shared", SHARED)):
                plain = changed(laid_out(conf, "vllm", layout, one_head), keys)
                found[name] = steps(planned(plain, process), process)
            (directory / f"{process.rank}.json").write_text(json.dumps(found))
            failing = laid_out(conf, "vllm", "colocated_tp", one_head)
            with built(planned(failing, process), process) as program:
                if process.rank == 2:
                    program.generator.engine.core.step_fn = fail
                train_step(program, process, Phases(process.device), 0)


def fail():
    raise RuntimeError(FAILURE)


if __name__ == "__main__":
    prepare()
    import mesh.engine.vllm.engine  # noqa: F401  # 9 s of CPU time, once instead of on every rank

    directory = Path(sys.argv[1])
    biased = {"family": "qwen2", "qk_norm": False, "qkv_bias": True}
    shared = one_kv_head(directory / "one-head", **biased)
    run_ranks(4, partial(main, directory, sys.argv[2:], shared))
