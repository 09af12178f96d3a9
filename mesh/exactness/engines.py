"""L6: another engine's tokens and logprobs are the native engine's, with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mesh.engine.base import Engine
from mesh.engine.kinds import REFERENCE, reference_of
from mesh.exactness.generator import (
    FEW,
    NOT_PREEMPTED,
    PREFILL,
    Variant,
    compare_variant,
    replayer,
    tight,
)
from mesh.exactness.naming import settle
from mesh.exactness.table import Check
from mesh.exactness.walk import Walk, generate, part_of
from mesh.types import Sampling


def engine_checks(walk: Walk, engine: Engine | None, sampling: Sampling) -> Iterator[Check]:
    """The rows of L6, where the generator is not the native engine. Collective; `engine` None off
    the generator. To be walked after weights have changed.
    """
    kind = walk.plan.generator.kind
    if kind is REFERENCE:
        return
    native = reference_of(engine) if engine is not None else None
    base = generate(native, walk.requests, sampling, walk.script) if native is not None else {}
    whole = Variant(walk.requests, script=walk.script)
    few = part_of(walk.requests, min(FEW, sum(r.num_samples for r in walk.requests)))
    settings = walk.plan.generator.engine
    variants = {
        "the whole batch": whole,
        f"prefill {PREFILL} tokens at a time": Variant(few, {"prefill_tokens": PREFILL}),
        "sequences preempted": Variant(
            few, {"kv_tokens": tight(settings, few), "prefix_cache": False}
        ),
    }
    for what, one in variants.items():
        variant = replace(one, script=walk.script)
        found, count = compare_variant(engine, variant, sampling, base)
        sides = replayer(engine, variant, sampling), replayer(native, whole, sampling)
        tally = settle(walk.process, found, *sides, walk.seek)
        idle = (
            "kv_tokens" in variant.settings and tally.passed and not any(walk.process.gather(count))
        )
        yield Check("L6", f"{kind}, {what}", tally, NOT_PREEMPTED if idle else None)
    if native is not None:
        native.close()
