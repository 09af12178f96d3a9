"""Continuous batching: the sequences that run are those for which the KV cache has room.

A sequence is admitted when the cache has room for its tokens so far; pages are allocated one at a
time as it grows. When none is free, sequences that wait for a reply, or for their next turn, give
up theirs, and then the youngest running one is preempted and returns to the queue. Either is
recomputed later, with the same tokens, because random numbers depend on positions only.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from mesh.engine.base import Continuation, num_pages
from mesh.engine.native.cache import BlockManager, Sequence
from mesh.types import Request, RolloutKey


@dataclass
class Fill:
    """Tokens whose keys and values are to be computed into `pages`, for one sample of a prompt or
    (sample_id None) for all that share it. `start` tokens before them are in the pages already.
    """

    tokens: tuple[int, ...]
    pages: list[int]
    prompt_id: int
    sample_id: int | None
    start: int = 0


@dataclass
class Prefix:
    """A prompt's KV (all but its last token), and the samples that have yet to fork from it."""

    pages: list[int]
    waiting: int


@dataclass(frozen=True)
class Scheduled:
    """The work of one step, in this order: fills, copies, one decode step of all that run.

    copies: (source page, target page, tokens), each from the page's first slot. A sequence that is
    preempted in the step that admits it leaves its fill here; before the decode step nothing else
    is written to its pages.
    """

    fills: list[Fill]
    copies: list[tuple[int, int, int]]
    running: list[Sequence]


class Scheduler:
    """Owns the queue, the running batch and its pages. All tp ranks of an engine decide alike.

    share: the samples of one prompt share its KV; parked: sequences between two turns, in the order
    in which they ended their last one; holders: those of them, and of the queue, that have pages.
    """

    def __init__(
        self, blocks: BlockManager, page_size: int, max_sequences: int, share: bool
    ) -> None:
        self.blocks = blocks
        self.page_size = page_size
        self.max_sequences = max_sequences
        self.share = share
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.parked: dict[RolloutKey, Sequence] = {}
        self.holders: dict[RolloutKey, Sequence] = {}
        self.prefixes: dict[int, Prefix] = {}
        self.preemptions = 0
        self._forks: Counter[int] = Counter()  # by prompt: samples that have yet to fork from it

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def prompt_ids(self) -> set[int]:
        """Prompts with an unfinished or parked sample."""
        sequences = (*self.waiting, *self.running, *self.parked.values())
        return {sequence.prompt_id for sequence in sequences}

    def add(self, requests: Iterable[Request]) -> None:
        """Queue every sample of every request."""
        for r in requests:
            self._forks[r.prompt_id] += r.num_samples
            for sample in range(r.num_samples):
                self.waiting.append(Sequence(r.prompt_id, sample, r.tokens, r.keeps))

    def extend(self, continuations: Iterable[Continuation]) -> None:
        """Queue the next turn of parked sequences, before prompts that have not begun."""
        first = next((i for i, s in enumerate(self.waiting) if not s.tokens), len(self.waiting))
        for place, one in enumerate(continuations, first):
            sequence = self.parked.pop(one.key)
            sequence.tokens += one.reply
            sequence.turn, sequence.max_new_tokens = len(sequence.tokens), one.max_new_tokens
            sequence.logprobs, sequence.finish_reason = [], None
            if self.holders.pop(one.key, None):  # behind those that have no reply
                self.holders[one.key] = sequence
            self.waiting.insert(place, sequence)

    def drop(self, keys: Iterable[RolloutKey]) -> None:
        """End parked sequences, and free their pages."""
        for key in keys:
            self._take_pages(self.parked.pop(key))
        self._settle()

    def schedule(self) -> Scheduled:
        """Admit sequences while batch and cache have room, then allocate a page to each that needs
        one for its next token. Asserts that something can run.
        """
        work = Scheduled([], [], self.running)
        while self.waiting and len(self.running) < self.max_sequences:
            if self._admit(self.waiting[0], work):
                self.running.append(self.waiting.popleft())
            elif self.prefixes and not self.running:
                self._free_prefixes(idle_only=False)
            else:
                break
        self._append_pages()
        assert self.running, "no sequence can run: the KV cache is too small"
        return work

    def _admit(self, sequence: Sequence, work: Scheduled) -> bool:
        # with the page after the last cached token, which the coming decode step needs
        pages = num_pages(sequence.length, self.page_size)
        if self.share and not sequence.tokens and len(sequence.prompt) > 1:
            return self._fork(sequence, pages, work)
        missing = pages - len(sequence.pages)
        if not self._make_room(missing, sequence):
            return False
        self.holders.pop(sequence.key, None)
        sequence.pages += self.blocks.allocate(missing)
        start, sequence.computed = sequence.computed, 0
        if tokens := sequence.cached[start:]:
            ids = sequence.key
            work.fills.append(Fill(tokens, sequence.pages, *ids, start))
        return True

    def _fork(self, sequence: Sequence, pages: int, work: Scheduled) -> bool:
        """Start a sample from its prompt's shared KV, which is computed for the first one."""
        cached = len(sequence.prompt) - 1
        full = cached // self.page_size
        prefix = self.prefixes.get(sequence.prompt_id)
        own = 0 if prefix else num_pages(cached, self.page_size)
        if not self._make_room(own + pages - full):
            return False
        if prefix is None:
            prefix = Prefix(self.blocks.allocate(own), self._forks[sequence.prompt_id])
            self.prefixes[sequence.prompt_id] = prefix
            work.fills.append(Fill(sequence.cached, prefix.pages, sequence.prompt_id, None))
        shared, allocated = prefix.pages[:full], self.blocks.allocate(pages - full)
        sequence.pages = self.blocks.share(shared) + allocated
        if cached % self.page_size:
            copied = (prefix.pages[full], sequence.pages[full], cached % self.page_size)
            work.copies.append(copied)
        prefix.waiting -= 1
        self._forks[sequence.prompt_id] -= 1
        return True

    def _append_pages(self) -> None:
        """Allocate a page to each running sequence whose next token needs one, oldest first."""
        self._free_prefixes(idle_only=True)
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            missing = num_pages(sequence.length, self.page_size) - len(sequence.pages)
            if self._make_room(missing):
                sequence.pages += self.blocks.allocate(missing)
                index += 1
            elif self.prefixes:
                self._free_prefixes(idle_only=False)
            else:
                self._preempt_youngest()

    def _make_room(self, count: int, sequence: Sequence | None = None) -> bool:
        """Have `count` pages free, with pages of other sequences that do not run if need be: of
        parked ones, the oldest first, then of the queue, the last first. False where that would not
        be enough; then nothing is taken.
        """
        if self.blocks.can_allocate(count):
            return True
        holders = [s for s in self.holders.values() if s is not sequence]
        parked = [s for s in holders if s.key in self.parked]
        queued = [s for s in holders if s.key not in self.parked]
        held = Counter(page for s in holders for page in s.pages)
        theirs = sum(self.blocks.references[page] == num for page, num in held.items())
        if not self.blocks.can_allocate(count - theirs):
            return False
        for holder in (*parked, *reversed(queued)):
            if self.blocks.can_allocate(count):
                break
            self._take_pages(holder)
        return True

    def _take_pages(self, sequence: Sequence) -> None:
        """Free the pages of a sequence that does not run."""
        self.holders.pop(sequence.key, None)
        self.blocks.free(sequence.pages)
        sequence.pages, sequence.computed = [], 0

    def _free_prefixes(self, idle_only: bool) -> None:
        """Free the shared KV of prompts: of those with no sample left to fork, or of all."""
        for prompt_id, prefix in list(self.prefixes.items()):
            if not idle_only or prefix.waiting <= 0:
                self.blocks.free(prefix.pages)
                del self.prefixes[prompt_id]

    def _preempt_youngest(self) -> None:
        assert len(self.running) > 1, "one sequence alone does not fit the KV cache"
        youngest = self.running.pop()
        self._take_pages(youngest)
        self._forks[youngest.prompt_id] += not youngest.tokens
        self.waiting.appendleft(youngest)
        self.preemptions += 1

    def finish(self) -> list[Sequence]:
        """Take the sequences whose turn has ended out of the batch: those that are kept are parked
        with their pages, the others' are freed.
        """
        done = [sequence for sequence in self.running if sequence.finish_reason]
        self.running = [sequence for sequence in self.running if not sequence.finish_reason]
        for sequence in done:
            if sequence.keeps:
                sequence.computed = len(sequence.cached)
                self.parked[sequence.key] = self.holders[sequence.key] = sequence
            else:
                self._take_pages(sequence)
        self._settle()
        return done

    def _settle(self) -> None:
        """Free all prefixes once nothing is left to run, so that nothing cached outlives an idle
        engine. Asserts that no page was lost.
        """
        if self.unfinished:
            return
        self._free_prefixes(idle_only=False)
        self._forks.clear()
        if not self.parked:
            assert self.blocks.all_free, "KV pages were lost"
