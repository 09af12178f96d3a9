"""Generation as a loop over an engine's verbs, and the requests that every engine refuses."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mesh.engine.base import Continuation, Engine
from mesh.lifecycle.heartbeat import heartbeat
from mesh.types import Completion, Request, RolloutKey, Sampling


def generate(engine: Engine, requests: Collection[Request], sampling: Sampling) -> list[Completion]:
    """Complete every sample of every request, ordered by (prompt_id, sample_id).

    Raises ValueError for what the engine refuses, and while other requests are unfinished.
    """
    if engine.unfinished or engine.kept:
        raise ValueError(
            "the engine has unfinished requests, whose completions would be lost among these; "
            "call step() until unfinished is False, and drop what it keeps"
        )
    engine.add(requests, sampling)
    completions: list[Completion] = []
    while engine.unfinished:
        heartbeat()
        completions += engine.step()
    assert len(completions) == sum(request.num_samples for request in requests), "samples were lost"
    return sorted(completions, key=lambda c: c.key)


def check_requests(
    requests: Collection[Request],
    sampling: Sampling,
    version: int,
    limit: int,
    unfinished: Collection[int] = (),
    current: Sampling | None = None,
) -> None:
    """Raises ValueError for what no engine completes.

    limit: the most tokens of one sequence; unfinished: the ids of prompts that are being completed
    with the sampling `current`.
    """
    if version < 0:
        raise ValueError("the engine has no weights yet; sync the weight bridge first")
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={sampling.max_new_tokens}: ask for at least 1")
    if unfinished and sampling != current:
        raise ValueError(
            f"requests with {current} are unfinished, and one sampling is in flight at a time: "
            f"call step() until they are finished, then add those with {sampling}"
        )
    ids = [*unfinished, *(request.prompt_id for request in requests)]
    if len(set(ids)) < len(ids):
        twice = next(prompt_id for prompt_id in ids if ids.count(prompt_id) > 1)
        raise ValueError(f"two requests have the same prompt_id={twice}; give each its own")
    for request in requests:
        longest = len(request.tokens) + sampling.max_new_tokens
        if not request.tokens or longest > limit:
            raise ValueError(
                f"prompt {request.prompt_id}: {len(request.tokens)} prompt tokens and "
                f"max_new_tokens={sampling.max_new_tokens} do not fit {limit} tokens; a prompt "
                "has at least one token; raise model.max_length or generator.kv_tokens"
            )


def check_kept(keys: Collection[RolloutKey], kept: Collection[RolloutKey]) -> None:
    """Raises ValueError for samples that are not kept, or that come twice."""
    wrong = [key for key in keys if key not in kept]
    if wrong or len(set(keys)) < len(keys):
        raise ValueError(
            f"(prompt_id, sample_id)={wrong or sorted(keys)}: a sample waits for its next turn "
            "where its request keeps it and its turn has ended, and gets one at a time"
        )


def check_continuations(
    continuations: Collection[Continuation], lengths: Mapping[RolloutKey, int], limit: int
) -> None:
    """Raises ValueError for a turn that no engine completes.

    lengths: tokens of the kept samples so far; limit: the most tokens of one sequence.
    """
    check_kept([one.key for one in continuations], lengths)
    for one in continuations:
        longest = lengths[one.key] + len(one.reply) + one.max_new_tokens
        if one.max_new_tokens < 1 or longest > limit:
            raise ValueError(
                f"(prompt_id, sample_id)={one.key}: {lengths[one.key]} tokens so far, a reply of "
                f"{len(one.reply)} and max_new_tokens={one.max_new_tokens} do not fit {limit} "
                "tokens; a turn has at least one"
            )


def refuse_unfinished(engine: Engine) -> None:
    """Raises RuntimeError if the cache holds keys and values of sequences that are not finished."""
    if engine.unfinished or engine.kept:
        raise RuntimeError(
            "new weights while requests are unfinished, whose keys and values are those of the old "
            "ones; call step() until unfinished is False, and drop what is kept for another turn"
        )
