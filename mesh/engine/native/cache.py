"""The paged KV cache: which pages are free, who shares them, and the sequences that hold them.

Pages are counted references: the samples of one prompt share the full pages of its KV, and copy
the page that the prompt fills only in part. Page 0 is never handed out: rows that only pad a batch
write there.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from mesh.model.attention import KVCache
from mesh.types import FinishReason, ModelShape


class PagePool:
    """Free pages and reference counts. Pages 1..num_pages-1 can be taken."""

    def __init__(self, num_pages: int) -> None:
        self.free = list(range(num_pages - 1, 0, -1))
        self.references = [0] * num_pages

    def take(self, count: int) -> list[int]:
        assert len(self.free) >= count, f"{count} KV pages wanted, {len(self.free)} free"
        pages = [self.free.pop() for _ in range(count)]
        for page in pages:
            self.references[page] = 1
        return pages

    def share(self, pages: Seq[int]) -> list[int]:
        for page in pages:
            self.references[page] += 1
        return list(pages)

    def release(self, pages: Seq[int]) -> None:
        for page in pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                self.free.append(page)


@dataclass
class Sequence:
    """One sample on its way. All but the last of its tokens are in the cache while it runs."""

    prompt_id: int
    sample_id: int
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def last_token(self) -> int:
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    @property
    def cached(self) -> tuple[int, ...]:
        """The tokens whose keys and values the cache holds before the next step."""
        return (*self.prompt, *self.tokens)[:-1]


def num_pages(tokens: int, page_size: int) -> int:
    """Pages that `tokens` tokens fill, the last one perhaps in part."""
    return -(-tokens // page_size)


def allocate(
    shape: ModelShape, tp: int, pages: int, page_size: int, device: torch.device, dtype: torch.dtype
) -> KVCache:
    """A cache of `pages` pages for this rank's kv heads."""
    size = (pages, page_size, shape.num_kv_heads // tp, shape.head_dim)
    layers = range(shape.num_layers)
    return KVCache(
        [torch.zeros(size, device=device, dtype=dtype) for _ in layers],
        [torch.zeros(size, device=device, dtype=dtype) for _ in layers],
    )


def copy_slots(cache: KVCache, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy keys and values between flat token slots (int64) in every layer."""
    for pages in (*cache.keys, *cache.values):
        slots = pages.flatten(0, 1)
        slots[targets] = slots[sources]
