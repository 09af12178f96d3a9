"""Continuous batching: the sequences that run are those for which the KV cache has room.

A sequence is admitted when the cache has room for its tokens so far; pages are allocated one at a
time as it grows. When none is free the youngest sequence is preempted: it returns to the queue and
is recomputed later, with the same tokens, because random numbers depend on positions only.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from mesh.engine.base import num_pages
from mesh.engine.native.cache import BlockManager, Sequence
from mesh.types import Request


@dataclass
class Fill:
    """Tokens whose keys and values are to be computed into `pages`, for one sample of a prompt or
    (sample_id None) for all that share it.
    """

    tokens: tuple[int, ...]
    pages: list[int]
    prompt_id: int
    sample_id: int | None


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

    share: the samples of one prompt share its KV.
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
        self.prefixes: dict[int, Prefix] = {}
        self.preemptions = 0
        self._forks: Counter[int] = Counter()  # by prompt: samples that have yet to fork from it

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def prompt_ids(self) -> set[int]:
        """Prompts with an unfinished sample."""
        return {sequence.prompt_id for sequence in (*self.waiting, *self.running)}

    def add(self, requests: Iterable[Request]) -> None:
        """Queue every sample of every request."""
        for request in requests:
            self._forks[request.prompt_id] += request.num_samples
            for sample in range(request.num_samples):
                self.waiting.append(Sequence(request.prompt_id, sample, request.tokens))

    def schedule(self) -> Scheduled:
        """Admit sequences while batch and cache have room, then allocate a page to each that needs
        one for its next token. Asserts that something can run.
        """
        work = Scheduled([], [], self.running)
        while self.waiting and len(self.running) < self.max_sequences:
            if not self._admit(self.waiting[0], work):
                break
            self.running.append(self.waiting.popleft())
        self._append_pages()
        assert self.running, "no sequence can run: the KV cache is too small"
        return work

    def _admit(self, sequence: Sequence, work: Scheduled) -> bool:
        # with the page after the last cached token, which the coming decode step needs
        pages = num_pages(sequence.length, self.page_size)
        if self.share and not sequence.tokens and len(sequence.prompt) > 1:
            return self._fork(sequence, pages, work)
        if not self.blocks.can_allocate(pages):
            return False
        sequence.pages = self.blocks.allocate(pages)
        if sequence.cached:
            work.fills.append(
                Fill(sequence.cached, sequence.pages, sequence.prompt_id, sequence.sample_id)
            )
        return True

    def _fork(self, sequence: Sequence, pages: int, work: Scheduled) -> bool:
        """Start a sample from its prompt's shared KV, which is computed for the first one."""
        cached = len(sequence.prompt) - 1
        full = cached // self.page_size
        prefix = self.prefixes.get(sequence.prompt_id)
        own = 0 if prefix else num_pages(cached, self.page_size)
        if not self.blocks.can_allocate(own + pages - full):
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
            if self.blocks.can_allocate(missing):
                sequence.pages += self.blocks.allocate(missing)
                index += 1
            elif self.prefixes:
                self._free_prefixes(idle_only=False)
            else:
                self._preempt_youngest()

    def _free_prefixes(self, idle_only: bool) -> None:
        """Free the shared KV of prompts: of those with no sample left to fork, or of all."""
        for prompt_id, prefix in list(self.prefixes.items()):
            if not idle_only or prefix.waiting <= 0:
                self.blocks.free(prefix.pages)
                del self.prefixes[prompt_id]

    def _preempt_youngest(self) -> None:
        assert len(self.running) > 1, "one sequence alone does not fit the KV cache"
        youngest = self.running.pop()
        self.blocks.free(youngest.pages)
        youngest.pages = []
        self._forks[youngest.prompt_id] += not youngest.tokens
        self.waiting.appendleft(youngest)
        self.preemptions += 1

    def finish(self) -> list[Sequence]:
        """Take the finished sequences out of the batch and free their pages.

        With the last of them all prefixes are freed, so that nothing cached outlives an idle
        engine. Asserts that no page was lost.
        """
        done = [sequence for sequence in self.running if sequence.finish_reason]
        self.running = [sequence for sequence in self.running if not sequence.finish_reason]
        for sequence in done:
            self.blocks.free(sequence.pages)
        if not self.unfinished:
            self._free_prefixes(idle_only=False)
            self._forks.clear()
            assert self.blocks.all_free, "KV pages were lost"
        return done
