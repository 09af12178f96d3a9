"""L3: every layout of this world makes the same tokens and logprobs from the same weights.

All are compared with one batch, which the configuration's own layout generated: where each layout
of the trainer and each of the generator agrees with that, any two of them agree with each other.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

from mesh.exactness.comparison import Rollouts, Tally, compare_rollouts, of_all_ranks
from mesh.exactness.generator import Variant
from mesh.exactness.generator import replayer as engine_replayer
from mesh.exactness.layouts import built, candidates, scoring_only
from mesh.exactness.naming import named, settle
from mesh.exactness.table import Check
from mesh.exactness.trace import Trace
from mesh.exactness.trainer import replayer as arrangement_replayer
from mesh.exactness.trainer import score_arranged
from mesh.exactness.verdict import AGREED
from mesh.exactness.walk import Walk, generate, sampling_of
from mesh.exchange.rollouts import replica_of
from mesh.program.assembly import Program
from mesh.program.plan import Plan
from mesh.types import Rollout, RolloutKey


def reference_of(walk: Walk, program: Program) -> tuple[dict[RolloutKey, Rollout], Check]:
    """The first engine's batch, on every rank, and the row of L3 that compares all other engines
    with it. Collective.
    """
    engine, process = program.generator.engine, walk.process
    sampling = sampling_of(program.generator)
    mine = generate(engine, walk.requests, sampling, walk.script) if engine is not None else {}
    first = program.meshes.layout.generator_ranks[0]
    reference = process.gather(mine if process.rank == first else {})[first]
    tally = of_all_ranks(process, compare_rollouts(mine, reference))
    alone = len(program.meshes.layout.generator_ranks) == 1
    return reference, Check(
        "L3", "the whole batch on every engine", tally, "one engine" if alone else None
    )


def layout_checks(walk: Walk, reference: Rollouts) -> Iterator[Check]:
    """The rows of L3, one a layout. reference: the own layout's batch."""
    plan, world_size = walk.plan, walk.process.world_size
    if world_size == 1:
        yield Check("L3", "layouts", not_run="one rank")
        return
    gc.collect()
    gc.freeze()  # so that the collection before a layout looks at the last one only
    for candidate in candidates(walk.conf, plan.device, world_size, plan.shape):
        tally, trace = compare_layout(walk, candidate.planned(walk.conf, plan), reference)
        if trace is not None:
            tally = against_own(walk, reference, tally, trace)
        yield Check("L3", str(candidate), tally)
    gc.unfreeze()


def compare_layout(walk: Walk, plan: Plan, reference: Rollouts) -> tuple[Tally, Trace | None]:
    """Both roles of a layout against the reference. Where they differ from it but not from each
    other, also the trainer's trace of the first sequence that does.
    """
    with built(plan, walk.process) as program:
        trainer, generator = program.trainer, program.generator
        sampling, found = sampling_of(generator), Tally()
        share = [
            r for r in walk.requests
            if replica_of(r.prompt_id, generator.replicas) == generator.replica
        ]  # fmt: skip
        if generator.engine is not None:
            mine = generate(generator.engine, share, sampling, walk.script)
            found = compare_rollouts(mine, reference)
        found += compare_rollouts(
            score_arranged(walk, trainer, reference, sampling.scored), reference
        )
        generated = engine_replayer(generator.engine, Variant(share, script=walk.script), sampling)
        trained = arrangement_replayer(walk, trainer, reference, sampling.scored)
        tally = settle(walk.process, found, generated, trained, walk.seek)
        alike = tally.first is not None and tally.first.module == AGREED
        key = tally.first.key if alike and tally.first else None
        return tally, trained(key) if key is not None else None


def against_own(walk: Walk, reference: Rollouts, tally: Tally, trace: Trace) -> Tally:
    """The tally with the module at which a trace diverges from the own layout's trainer."""
    assert tally.first is not None, "there is nothing to look for"
    with built(scoring_only(walk.plan), walk.process) as program:
        scored = program.generator.sampling(0).scored
        own = arrangement_replayer(walk, program.trainer, reference, scored)
        return replace(tally, first=named(walk.process, tally.first, lambda _: trace, own))
