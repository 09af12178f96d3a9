"""The sizes of an engine, resolved from a configuration."""

from __future__ import annotations

from mesh.config.schema import Conf
from mesh.engine.base import EngineSettings, num_pages
from mesh.engine.kinds import kind_of

PROMPT_ROOM = 256
"""Tokens of a prompt, beside its response, for which a GPU's default KV cache has room."""


def engine_settings(conf: Conf, device: str) -> EngineSettings:
    """The engine's sizes, with defaults for the keys that are unset. device: cpu or cuda."""
    kind, generator = kind_of(conf), conf.generator
    page_size = generator.page_size or kind.pages[device].default
    prompt = max(page_size, PROMPT_ROOM) if device == "cuda" else page_size
    longest = max(generator.max_new_tokens, conf.conversation.max_tokens)
    full_response = num_pages(longest + prompt, page_size) * page_size
    room = max(generator.max_sequences * full_response, conf.model.max_length)
    return EngineSettings(
        max_length=conf.model.max_length,
        max_sequences=generator.max_sequences,
        kv_tokens=generator.kv_tokens or room,
        page_size=page_size,
        prefill_tokens=generator.prefill_tokens,
        prefix_cache=generator.prefix_cache,
        cuda_graphs=generator.cuda_graphs,
        releases=kind.releases(conf, device),
    )
