"""The scheduler without a model: what its pages hold is written down symbolically.

Each slot of the cache remembers the tokens whose keys it would hold, so that a page which is lost,
shared wrongly, or overwritten while somebody reads it is seen at the next decode step.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.engine.base import Continuation, num_pages
from mesh.engine.native.cache import BlockManager, Sequence
from mesh.engine.native.scheduler import Fill, Scheduler
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

    def fill(self, fill: Fill) -> None:
        """What is in the pages before the fill is its context; asserts that it is all there."""
        before: tuple[int, ...] = ()
        if fill.start:
            before = self.slots[self.place(fill.pages, fill.start - 1)]
            self.assert_holds(fill.pages, before)
        assert len(before) == fill.start
        self.write(fill.pages, before + fill.tokens, fill.start)

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
    waiting = [*scheduler.waiting, *scheduler.parked.values()]
    assert {s.key: s for s in waiting if s.pages} == scheduler.holders
    holders += [s.pages for s in waiting]
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
        memory.fill(fill)
    for source, target, count in work.copies:
        memory.copy(source, target, count)
    assert work.running == scheduler.running
    assert 0 < len(scheduler.running) <= scheduler.max_sequences
    for sequence in scheduler.running:
        memory.write(sequence.pages, (*sequence.prompt, *sequence.tokens), len(sequence.cached))
    for sequence in scheduler.running:
        memory.assert_holds(sequence.pages, (*sequence.prompt, *sequence.tokens))
        sequence.tokens.append(1000 * sequence.sample_id + len(sequence.tokens))
        if len(sequence.tokens) - sequence.turn == response(sequence):
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


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), max_size=5),
    samples=st.integers(0, 4),
    page_size=st.integers(1, 9),
    slack=st.integers(0, 60),
    max_sequences=st.integers(1, 9),
    share=st.booleans(),
    data=st.data(),
)
def test_conversations_end_and_their_pages_are_theirs_or_given_up(
    lengths, samples, page_size, slack, max_sequences, share, data
):
    """Replies of any length come at any step, also while prompts arrive; some samples are dropped
    instead. Whatever waits, the others go on: nothing runs dry.
    """
    pages = 2 + num_pages(max(lengths, default=0) + 3 * (7 + 9) + slack, page_size)
    scheduler = Scheduler(BlockManager(pages), page_size, max_sequences, share)
    draw = data.draw(st.randoms(use_true_random=False))
    asked = [
        Request(i, tuple(range(100 * i, 100 * i + n)), samples, keeps=True)
        for i, n in enumerate(lengths)
    ]
    memory, turns = Memory(page_size), Counter()
    for request in asked:
        scheduler.add([request])
        for _ in range(draw.randrange(4)):
            converse(scheduler, memory, turns, draw)
            assert_counted(scheduler, pages)
    while scheduler.unfinished or scheduler.parked:
        converse(scheduler, memory, turns, draw)
        assert_counted(scheduler, pages)
    assert set(turns) == {(r.prompt_id, sample) for r in asked for sample in range(samples)}
    assert scheduler.blocks.all_free and not scheduler.holders and not scheduler.prefixes


def converse(scheduler: Scheduler, memory: Memory, turns: Counter, draw) -> None:
    """A step, where there is one to take, and answers to some of those that wait for one."""
    if scheduler.unfinished:
        for sequence in step(scheduler, memory):
            turns[sequence.key] += 1
            assert scheduler.parked[sequence.key] is sequence
    answered = [key for key in scheduler.parked if draw.random() < 0.4]
    going_on = [key for key in answered if turns[key] < 3 and draw.random() < 0.8]
    scheduler.extend(
        Continuation(*key, tuple(range(draw.randrange(9))), response(scheduler.parked[key]))
        for key in draw.sample(going_on, len(going_on))
    )
    scheduler.drop(key for key in answered if key not in going_on)


def two_turns(kv_tokens: int) -> tuple[Scheduler, list[int], list[int]]:
    """(scheduler, first positions of the fills, their lengths) of a prompt of 11 tokens that says
    one token and gets three, while another prompt of 8 tokens is answered.
    """
    scheduler, memory = Scheduler(BlockManager(1 + kv_tokens // 4), 4, 8, share=False), Memory(4)
    scheduler.add([Request(0, tuple(range(11)), 1, keeps=True)])
    while not scheduler.parked:
        step(scheduler, memory)
    scheduler.add([Request(1, tuple(range(100, 108)), 1)])
    while scheduler.unfinished:
        step(scheduler, memory)
    scheduler.extend([Continuation(0, 0, (7, 8, 9), 1)])
    fills = scheduler.schedule().fills
    return scheduler, [fill.start for fill in fills], [len(fill.tokens) for fill in fills]


def test_a_second_turn_computes_the_last_token_and_the_reply():
    assert two_turns(64)[1:] == ([11], [3])


def test_pages_that_others_needed_are_computed_again():
    assert two_turns(16)[1:] == ([0], [14])


def test_parked_sequences_give_up_their_pages_before_a_running_one_is_preempted():
    scheduler, memory = Scheduler(BlockManager(9), 4, 8, share=False), Memory(4)
    scheduler.add([Request(i, tuple(range(100 * i, 100 * i + 8)), 1, keeps=True) for i in (0, 1)])
    while len(scheduler.parked) < 2:
        step(scheduler, memory)
    first, second = scheduler.parked.values()
    assert (len(first.pages), len(second.pages)) == (2, 4)
    scheduler.add([Request(2, tuple(range(16)), 1)])
    step(scheduler, memory)
    assert not first.pages and second.pages
    step(scheduler, memory)
    assert not second.pages and scheduler.running and scheduler.preemptions == 0


def test_a_turn_that_needs_the_whole_cache_gets_the_prefix_of_samples_that_have_not_begun():
    scheduler, memory = Scheduler(BlockManager(6), 4, 1, share=True), Memory(4)
    scheduler.add([Request(0, tuple(range(8)), 2, keeps=True)])
    step(scheduler, memory)
    assert list(scheduler.parked) == [(0, 0)] and scheduler.prefixes[0].waiting == 1
    scheduler.extend([Continuation(0, 0, tuple(range(9)), 1)])
    while scheduler.unfinished:
        step(scheduler, memory)
    assert len(scheduler.parked) == 2


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
