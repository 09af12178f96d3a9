"""The scheduler without a model: what its pages hold is written down symbolically.

Each slot of the cache remembers the tokens whose keys it would hold, so that a page which is lost,
shared wrongly, or overwritten while somebody reads it is seen at the next decode step.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.engine.base import num_pages
from mesh.engine.native.cache import BlockManager, Sequence
from mesh.engine.native.scheduler import Scheduler
from mesh.types import Request


class Memory:
    """The cache: what is in every slot. A slot's key is the whole context of its token."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}

    def place(self, pages: list[int], position: int) -> tuple[int, int]:
        return pages[position // self.page_size], position % self.page_size

    def write(self, pages: list[int], tokens: tuple[int, ...], start: int = 0) -> None:
        for position in range(start, len(tokens)):
            self.slots[self.place(pages, position)] = tokens[: position + 1]

    def copy(self, source: int, target: int, count: int) -> None:
        for offset in range(count):
            self.slots[target, offset] = self.slots[source, offset]

    def assert_holds(self, pages: list[int], tokens: tuple[int, ...]) -> None:
        for position in range(len(tokens)):
            assert self.slots[self.place(pages, position)] == tokens[: position + 1]


def response(sequence: Sequence) -> int:
    """How many tokens a sample makes, and which: any fixed rule that tells samples apart."""
    return (sequence.prompt_id * 5 + sequence.sample_id * 3) % 7 + 1


def assert_counted(scheduler: Scheduler, num_pages_: int) -> None:
    """Every page is free or held, held as often as its count says, and page 0 is nobody's."""
    holders = [s.pages for s in scheduler.running]
    holders += [prefix.pages for prefix in scheduler.prefixes.values()]
    held = Counter(page for pages in holders for page in pages)
    free = Counter(scheduler.blocks.free_pages)
    assert set(held) | set(free) == set(range(1, num_pages_)) and not set(held) & set(free)
    assert max(free.values(), default=1) == 1
    references = scheduler.blocks.references
    assert held == {page: count for page, count in enumerate(references) if count}


def step(scheduler: Scheduler, memory: Memory) -> list[Sequence]:
    """What the engine does, on symbols."""
    work = scheduler.schedule()
    for fill in work.fills:
        memory.write(fill.pages, fill.tokens)
    for source, target, count in work.copies:
        memory.copy(source, target, count)
    assert work.running == scheduler.running
    assert 0 < len(scheduler.running) <= scheduler.max_sequences
    for sequence in scheduler.running:
        memory.write(sequence.pages, (*sequence.prompt, *sequence.tokens), len(sequence.cached))
    for sequence in scheduler.running:
        memory.assert_holds(sequence.pages, (*sequence.prompt, *sequence.tokens))
        sequence.tokens.append(1000 * sequence.sample_id + len(sequence.tokens))
        if len(sequence.tokens) == response(sequence):
            sequence.finish_reason = "stop"
    return scheduler.finish()


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), max_size=5),
    samples=st.integers(0, 5),
    page_size=st.integers(1, 9),
    slack=st.integers(0, 60),
    max_sequences=st.integers(1, 9),
    share=st.booleans(),
    arrivals=st.lists(st.integers(0, 12), min_size=5, max_size=5),
)
def test_every_sample_finishes_once_and_no_page_is_lost_or_shared_wrongly(
    lengths, samples, page_size, slack, max_sequences, share, arrivals
):
    """Prompts arrive at any step, also while others run."""
    pages = 2 + num_pages(max(lengths, default=0) + 7 + slack, page_size)
    scheduler = Scheduler(BlockManager(pages), page_size, max_sequences, share)
    asked = [Request(i, tuple(range(100 * i, 100 * i + n)), samples) for i, n in enumerate(lengths)]
    memory, done = Memory(page_size), []
    for now in range(20 * (samples * len(lengths) + 1) * 8):
        scheduler.add([r for r, then in zip(asked, arrivals, strict=False) if then == now])
        if scheduler.unfinished:
            done += step(scheduler, memory)
        assert_counted(scheduler, pages)
        assert scheduler.prefixes == {} or scheduler.unfinished
    expected = {(r.prompt_id, sample) for r in asked for sample in range(samples)}
    assert len(done) == len(expected)
    assert {(s.prompt_id, s.sample_id) for s in done} == expected
    assert all(len(s.tokens) == response(s) for s in done)


def prefilled(share: bool) -> tuple[int, int]:
    """(tokens filled, tokens copied) for 4 samples of a prompt of 11 tokens, pages of 4."""
    scheduler = Scheduler(BlockManager(64), 4, 8, share)
    scheduler.add([Request(0, tuple(range(11)), 4)])
    work = scheduler.schedule()
    filled = sum(len(fill.tokens) for fill in work.fills)
    return filled, sum(count for _, _, count in work.copies)


def test_samples_share_their_prompt_but_for_its_last_token():
    assert prefilled(share=True) == (10, 4 * 2)
    assert prefilled(share=False) == (4 * 10, 0)


def test_blocks_are_free_when_all_who_share_them_have_freed_them():
    blocks = BlockManager(5)
    pages = blocks.allocate(2)
    blocks.share(pages[:1])
    blocks.free(pages)
    assert len(blocks.free_pages) == 3 and not blocks.all_free
    blocks.free(pages[:1])
    assert blocks.all_free and blocks.can_allocate(4) and not blocks.can_allocate(5)
    assert sorted(blocks.allocate(4)) == [1, 2, 3, 4]
    with pytest.raises(AssertionError, match="1 KV pages wanted, 0 free"):
        blocks.allocate(1)
