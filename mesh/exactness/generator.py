"""L1 on the generator: a sequence alone and among any others, chunked, cached and preempted.

Every engine of the world generates the whole batch, so every device is seen; tokens are drawn by
counter, so they must be the same as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from mesh.engine.base import Engine, EngineSettings, num_pages
from mesh.engine.conversation import Script
from mesh.exactness.comparison import Rollouts, Tally, compare_rollouts
from mesh.exactness.naming import NOTHING, Replay, settle
from mesh.exactness.table import Check
from mesh.exactness.trace import Trace, trace_generation
from mesh.exactness.walk import Walk, generate, part_of
from mesh.types import Request, RolloutKey, Sampling

SIZES = (1, 2, 3, 7, 8, 17, 33, 64, 129, 257)
FEW = 33  # sequences of the variants that run only few of them at a time
PREFILL = 7  # tokens of a forward pass: neither pages nor tiles divide by it
MOST = 64  # sequences at a time: the next one joins when one has ended
NOT_PREEMPTED = "every response fits the pages of its prompt"


@dataclass(frozen=True)
class Variant:
    """Part of the batch, generated with settings that differ from the engine's own. script: the
    replies in it, if there are any.
    """

    requests: list[Request]
    settings: dict[str, Any] = field(default_factory=dict)
    script: Script | None = None


@contextmanager
def engine_with(engine: Engine, settings: dict[str, Any]) -> Iterator[Engine]:
    """An engine of the same weights with other settings, for a block; the same one without any."""
    if not settings:
        yield engine
        return
    other = engine.with_settings(replace(engine.settings, **settings))
    yield other
    other.close()


def variants(
    settings: EngineSettings, requests: Sequence[Request], on_cuda: bool
) -> dict[str, list[Variant]]:
    """The rows of the table, and the variants that each of them compares with the whole batch."""
    whole = list(requests)
    total = sum(r.num_samples for r in requests)
    sizes = [size for size in SIZES if size <= total]
    few = part_of(requests, min(FEW, sizes[-1]))
    most = min(MOST, -(-total // 2))
    cached, captured = settings.prefix_cache, settings.cuda_graphs
    found = {
        f"generator, batches of {', '.join(map(str, sizes))}": [
            Variant(part_of(requests, size), _room(settings, size)) for size in sizes
        ],
        "generator, reversed order": [Variant(whole[::-1])],
        f"generator, prefill {PREFILL} tokens at a time": [
            Variant(few, {"prefill_tokens": PREFILL})
        ],
        f"generator, {most} sequences at a time": [Variant(whole, {"max_sequences": most})],
        f"generator, prefix cache {_other(cached)}": [Variant(whole, {"prefix_cache": not cached})],
        "generator, sequences preempted": [
            Variant(few, {"kv_tokens": tight(settings, few), "prefix_cache": False})
        ],
    }
    if on_cuda:
        found[f"generator, CUDA graphs {_other(captured)}"] = [
            Variant(whole, {"cuda_graphs": not captured})
        ]
    return found


def _room(settings: EngineSettings, size: int) -> dict[str, Any]:
    """Settings that let so many sequences be decoded at a time, where the engine's own do not."""
    if size <= settings.max_sequences:
        return {}
    return {"max_sequences": size, "kv_tokens": settings.kv_tokens * 2}


def _other(on: bool) -> str:
    return "off" if on else "on"


def tight(settings: EngineSettings, requests: Sequence[Request]) -> int:
    """A KV cache for all these prompts and none of their responses, or for one whole sequence."""
    page = settings.page_size
    prompts = sum(r.num_samples * num_pages(len(r.tokens), page) for r in requests)
    return max(prompts, num_pages(settings.max_length, page)) * page


def generator_checks(walk: Walk, engine: Engine | None, sampling: Sampling) -> Iterator[Check]:
    """The rows of L1 on the generator. Collective; `engine` None off it."""
    settings, whole = walk.plan.generator.engine, Variant(walk.requests, script=walk.script)
    base = generate(engine, walk.requests, sampling, walk.script) if engine is not None else {}
    for what, some in variants(settings, walk.requests, walk.plan.device == "cuda").items():
        tally, preempted = Tally(), 0
        for variant in (replace(one, script=walk.script) for one in some):
            found, count = compare_variant(engine, variant, sampling, base)
            sides = replayer(engine, variant, sampling), replayer(engine, whole, sampling)
            seek = walk.seek and tally.first is None
            tally += settle(walk.process, found, *sides, seek)
            preempted += sum(walk.process.gather(count))
        idle = "kv_tokens" in some[0].settings and not preempted and tally.passed
        reason = NOT_PREEMPTED if idle else None
        yield Check("L1", what, tally, reason)


def compare_variant(
    engine: Engine | None, variant: Variant, sampling: Sampling, base: Rollouts
) -> tuple[Tally, int]:
    """This engine's tally of one variant against the whole batch, and its preemptions."""
    if engine is None:
        return Tally(), 0
    with engine_with(engine, variant.settings) as other:
        before = other.preemptions
        found = generate(other, variant.requests, sampling, variant.script)
        return compare_rollouts(found, base), other.preemptions - before


def replayer(engine: Engine | None, variant: Variant, sampling: Sampling) -> Replay:
    """Generates one variant again and traces a sequence of it, where this engine has it."""

    def trace(key: RolloutKey) -> Trace:
        if engine is None or key[0] not in {request.prompt_id for request in variant.requests}:
            return NOTHING
        with engine_with(engine, variant.settings) as other:
            return trace_generation(other, variant.requests, sampling, key, variant.script)

    return trace
