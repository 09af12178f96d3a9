"""The bitwise on-policy validation run: the exactness ladder walked on this machine, rung by rung.

    torchrun --nproc-per-node=4 recipes/validate.py conf=qwen3_tiny

To be run before a new machine, driver or model is trusted: with the shapes of the model that `conf`
names and its layout, batch invariance on whatever `conf` says. A table says what was compared, how
often, and whether every bit was equal; where one was not, which module made it first, in which
sequence at which position. RUN_DIR/validation.json holds the same and the machine. The status is 1
if a rung fails that this world can show. `validate.control=true` walks a second time with ordinary
kernels: what differs then shows that the comparisons can see.

    L0  the same steps twice: tokens, rewards, logprobs, loss, gradient norm, weights
    L1  a sequence alone or among any others, chunked, cached, preempted, packed: the same logprobs
    L2  trainer logprobs == generator logprobs, in steps of the real loop and at other temperatures
    L3  L2 in every layout of this world, with the same tokens and logprobs in all of them
    L6  with engine=vllm: the native engine's tokens and logprobs, with weights that were trained

Left out: L4 and L5 (whole runs on other meshes, resuming), gradients compared between
layouts, contexts beyond 1,024 prompt tokens, and more than one draw of the weights and prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace

from mesh.config.loading import to_yaml
from mesh.config.schema import Conf
from mesh.exactness.batch import Walk, mixed_requests, sampling_of
from mesh.exactness.bits import Rollouts
from mesh.exactness.crossing import layout_checks, reference_of
from mesh.exactness.engines import engine_checks
from mesh.exactness.generator import generator_checks
from mesh.exactness.layouts import built
from mesh.exactness.loop import loop_checks, mixed_check, twice_checks
from mesh.exactness.table import Check, as_json, header, line, passed, verdict, with_control
from mesh.exactness.trainer import trainer_checks
from mesh.invariant.switch import batch_invariant
from mesh.layout.meshes import resolve_device
from mesh.lifecycle.process import Process, start
from mesh.model.products import self_test_of
from mesh.program.assembly import Parts, check, dtype_of, read_command
from mesh.runs.directory import create_run_dir


def main(argv: list[str]) -> None:
    name, conf = read_command(argv)
    conf.batch_invariant = True
    with ExitStack() as switch:
        switch.enter_context(batch_invariant(True, resolve_device(conf), conf.invariant.chunks))
        with start(conf.device, conf.timeout_seconds, conf.stall_seconds) as process:
            parts = check(conf, process.world_size, held_out=False)
            run_dir = create_run_dir(process, conf.run_dir, f"validate-{name}", to_yaml(conf))
            tested = self_test(conf, process, parts)
            process.say(f"{tested}\n\n{header()}")
            checks = said(process, ladder(walk_of(conf, process, parts, seek=True)))
            if conf.validate.control:
                switch.close()  # from here on the ordinary kernels
                plain = replace(conf, batch_invariant=False)
                control = ladder(walk_of(plain, process, parts, seek=False))
                checks = with_control(checks, list(control))
                process.say("\n".join(["", header(control=True), *map(line, checks)]))
            process.say(f"\n{verdict(checks)}; {run_dir / 'validation.json'}")
            process.write(run_dir / "validation.json", as_json(conf, process, tested, checks))
    sys.exit(not passed(checks))


def ladder(walk: Walk) -> Iterator[Check]:
    """The rungs from the lowest up, a row at a time."""
    reference = yield from in_own_layout(walk)
    yield from layout_checks(walk, reference)


def in_own_layout(walk: Walk) -> Generator[Check, None, Rollouts]:
    """L0 to L2 in the configuration's layout. Returns what its generator makes of the batch."""
    with built(walk.conf, walk.process, walk.parts) as program:
        yield from twice_checks(walk, program)
        reference, engines = reference_of(walk, program)
        sampling = sampling_of(program.generator)
        yield from generator_checks(walk, program.generator.engine, sampling)
        yield from trainer_checks(walk, program.trainer, reference, sampling.temperature)
        yield mixed_check(walk, program, reference, sampling)
        yield from loop_checks(walk, program)
        yield from engine_checks(walk, program.generator.engine, sampling)
    yield engines
    return reference


def self_test(conf: Conf, process: Process, parts: Parts) -> str:
    """What the start-up self-test of the model's own products says. Collective."""
    dtype = dtype_of(conf.trainer.dtype, process.device)
    degrees = conf.invariant.chunks
    return self_test_of(parts.shape, degrees, dtype, process.device, process.cpu_group)


def walk_of(conf: Conf, process: Process, parts: Parts, seek: bool) -> Walk:
    return Walk(conf, process, parts, mixed_requests(conf, parts), seek)


def said(process: Process, checks: Iterator[Check]) -> list[Check]:
    """The checks as a list; each is printed when it is there."""
    found = []
    for row in checks:
        process.say(line(row))
        found.append(row)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
