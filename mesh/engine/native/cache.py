"""The paged KV cache: the manager of its blocks, the sequences that hold them, and the memory.

A block is a page of the kernels: `page_size` tokens in every layer. References are counted: the
samples of one prompt share the full pages of its KV, and copy the page that the prompt fills only
in part. Page 0 is never allocated: rows that only pad a batch write there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mesh.model.attention import KVCache
from mesh.types import FinishReason, ModelShape, RolloutKey


class BlockManager:
    """Owns the free pages and the reference counts of all: 1..num_blocks-1 can be allocated."""

    def __init__(self, num_blocks: int) -> None:
        self.free_pages = list(range(num_blocks - 1, 0, -1))
        self.references = [0] * num_blocks

    @property
    def all_free(self) -> bool:
        return len(self.free_pages) == len(self.references) - 1

    def can_allocate(self, count: int) -> bool:
        return len(self.free_pages) >= count

    def allocate(self, count: int) -> list[int]:
        """Pages with one reference each. Asserts that there are so many."""
        free = len(self.free_pages)
        assert self.can_allocate(count), f"{count} KV pages wanted, {free} free"
        pages = [self.free_pages.pop() for _ in range(count)]
        for page in pages:
            self.references[page] = 1
        return pages

    def share(self, pages: list[int]) -> list[int]:
        """The same pages, with one reference more each."""
        for page in pages:
            self.references[page] += 1
        return list(pages)

    def free(self, pages: list[int]) -> None:
        """Drop one reference of each page."""
        for page in pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                self.free_pages.append(page)


@dataclass
class Sequence:
    """One sample in flight. While it runs, the cache holds all its tokens but the last.

    tokens: all after the prompt, of which the turn that runs has drawn those from `turn` on, with
    these logprobs; max_new_tokens: of that turn, None: the sampling's; computed: tokens whose keys
    and values its pages hold while it does not run.
    """

    prompt_id: int
    sample_id: int
    prompt: tuple[int, ...]
    keeps: bool = False
    max_new_tokens: int | None = None
    turn: int = 0
    computed: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def key(self) -> RolloutKey:
        return self.prompt_id, self.sample_id

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def last_token(self) -> int:
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    @property
    def cached(self) -> tuple[int, ...]:
        """The tokens whose keys and values the cache holds before the next decode step."""
        return (*self.prompt, *self.tokens)[:-1]


def allocate(
    shape: ModelShape, tp: int, pages: int, page_size: int, device: torch.device, dtype: torch.dtype
) -> KVCache:
    """A zeroed cache of `pages` pages for this rank's kv heads."""
    size = (pages, page_size, shape.kv_heads_of_rank(tp), shape.head_dim)
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
