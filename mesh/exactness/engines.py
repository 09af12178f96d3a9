"""L6: what vLLM makes of the batch, the native engine makes of it too, with the same weights."""

from __future__ import annotations

from collections.abc import Iterator

from mesh.engine.base import Engine
from mesh.engine.kinds import REFERENCE, kind_of, reference_of
from mesh.exactness.batch import Walk, generate, part_of
from mesh.exactness.generator import FEW, NOT_PREEMPTED, PREFILL, Way, compare_way, tight, tracer
from mesh.exactness.naming import settle
from mesh.exactness.table import Check
from mesh.roles.generator import engine_settings
from mesh.types import Sampling


def engine_checks(walk: Walk, engine: Engine | None, sampling: Sampling) -> Iterator[Check]:
    """The rows of L6, where the generator is not the native engine. Collective; `engine` None off
    the generator. To be walked after weights have changed.
    """
    if kind_of(walk.conf) is REFERENCE:
        return
    native = reference_of(engine) if engine is not None else None
    base = generate(native, walk.requests, sampling) if native is not None else {}
    whole = Way(walk.requests)
    few = part_of(walk.requests, min(FEW, sum(r.num_samples for r in walk.requests)))
    settings = engine_settings(walk.conf, walk.process.device)
    ways = {
        "vLLM, the whole batch": whole,
        f"vLLM, prefill {PREFILL} tokens at a time": Way(few, {"prefill_tokens": PREFILL}),
        "vLLM, sequences preempted": Way(
            few, {"kv_tokens": tight(settings, few), "prefix_cache": False}
        ),
    }
    for what, way in ways.items():
        found, count = compare_way(engine, way, sampling, base)
        sides = tracer(engine, way, sampling), tracer(native, whole, sampling)
        tally = settle(walk, found, *sides)
        idle = "kv_tokens" in way.settings and tally.passed and not any(walk.process.gather(count))
        yield Check("L6", what, tally, NOT_PREEMPTED if idle else None)
    if native is not None:
        native.close()
