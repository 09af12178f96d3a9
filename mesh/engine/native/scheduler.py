"""Continuous batching: which sequences run, admitted by the cache that is free.

A sequence is admitted when the cache has room for what it has so far; pages are taken one at a time
as it grows. When none is left the youngest sequence goes back to the queue and is computed again
later: its tokens do not change, because random numbers depend on positions only.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from mesh.engine.native.cache import PagePool, Sequence, num_pages
from mesh.types import Request


@dataclass
class Fill:
    """Tokens whose keys and values are to be computed into `pages`: for one sample of a prompt, or
    (sample_id None) for all that start from it.
    """

    tokens: tuple[int, ...]
    pages: list[int]
    prompt_id: int
    sample_id: int | None


@dataclass
class Prefix:
    """A prompt's KV (all but its last token) and the samples that still wait for it."""

    pages: list[int]
    waiting: int


@dataclass(frozen=True)
class Scheduled:
    """The work of one step, in this order: fills, copies, one decode step of all that run.

    copies: (source page, target page, tokens), each from the page's first slot. A sequence that is
    preempted in the step that admits it leaves its fill here: its pages hold nothing else before
    the decode step.
    """

    fills: list[Fill]
    copies: list[tuple[int, int, int]]
    running: list[Sequence]


class Scheduler:
    """Owns the queue, the running batch and the pages. All tp ranks of an engine decide alike."""

    def __init__(self, pool: PagePool, page_size: int, max_sequences: int, share: bool) -> None:
        self.pool = pool
        self.page_size = page_size
        self.max_sequences = max_sequences
        self.share = share
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prefixes: dict[int, Prefix] = {}
        self.preemptions = 0
        self._samples: Counter[int] = Counter()  # by prompt: samples that will ask for its prefix

    def add(self, requests: Seq[Request]) -> None:
        for request in requests:
            self._samples[request.prompt_id] += request.num_samples
            for sample in range(request.num_samples):
                self.waiting.append(Sequence(request.prompt_id, sample, request.tokens))

    @property
    def prompt_ids(self) -> set[int]:
        """Prompts of which a sample is not finished."""
        return {sequence.prompt_id for sequence in (*self.waiting, *self.running)}

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> Scheduled:
        """Admit sequences while batch and cache have room, and find all that run a page each for
        their next token. Asserts that something can run.
        """
        work = Scheduled([], [], self.running)
        while self.waiting and len(self.running) < self.max_sequences:
            if not self._admit(self.waiting[0], work):
                break
            self.running.append(self.waiting.popleft())
        self._grow()
        assert self.running, "no sequence can run: the KV cache is too small"
        return work

    def _admit(self, sequence: Sequence, work: Scheduled) -> bool:
        # the page after the last cached token is needed by the very next decode step
        pages = num_pages(sequence.length, self.page_size)
        if self.share and not sequence.tokens and len(sequence.prompt) > 1:
            return self._fork(sequence, pages, work)
        if len(self.pool.free) < pages:
            return False
        sequence.pages = self.pool.take(pages)
        if sequence.cached:
            work.fills.append(
                Fill(sequence.cached, sequence.pages, sequence.prompt_id, sequence.sample_id)
            )
        return True

    def _fork(self, sequence: Sequence, pages: int, work: Scheduled) -> bool:
        """Start a sample from its prompt's shared KV, computed when the first one asks for it."""
        cached = len(sequence.prompt) - 1
        full = cached // self.page_size
        prefix = self.prefixes.get(sequence.prompt_id)
        own = 0 if prefix else num_pages(cached, self.page_size)
        if len(self.pool.free) < own + pages - full:
            return False
        if prefix is None:
            prefix = Prefix(self.pool.take(own), self._samples[sequence.prompt_id])
            self.prefixes[sequence.prompt_id] = prefix
            work.fills.append(Fill(sequence.cached, prefix.pages, sequence.prompt_id, None))
        sequence.pages = self.pool.share(prefix.pages[:full]) + self.pool.take(pages - full)
        if cached % self.page_size:
            work.copies.append((prefix.pages[full], sequence.pages[full], cached % self.page_size))
        prefix.waiting -= 1
        self._samples[sequence.prompt_id] -= 1
        return True

    def release_prefixes(self, idle_only: bool) -> None:
        """Give up prompts' KV that no waiting sample needs, or all of it when pages run out."""
        for prompt_id, prefix in list(self.prefixes.items()):
            if not idle_only or prefix.waiting <= 0:
                self.pool.release(prefix.pages)
                del self.prefixes[prompt_id]

    def _grow(self) -> None:
        """Give every running sequence a page for its next token, oldest first."""
        self.release_prefixes(idle_only=True)
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            missing = num_pages(sequence.length, self.page_size) - len(sequence.pages)
            if missing and not self.pool.free:
                self._make_room()
                continue
            sequence.pages += self.pool.take(missing)
            index += 1

    def _make_room(self) -> None:
        if self.prefixes:
            return self.release_prefixes(idle_only=False)
        assert len(self.running) > 1, "one sequence alone does not fit the KV cache"
        youngest = self.running.pop()
        self.pool.release(youngest.pages)
        youngest.pages = []
        self._samples[youngest.prompt_id] += not youngest.tokens
        self.waiting.appendleft(youngest)
        self.preemptions += 1

    def finish(self) -> list[Sequence]:
        """Take the finished sequences out of the batch and free their pages.

        When none is left no prefix is either, so that the next weights and prompts find an empty
        cache. Asserts that no page was lost.
        """
        done = [sequence for sequence in self.running if sequence.finish_reason]
        self.running = [sequence for sequence in self.running if not sequence.finish_reason]
        for sequence in done:
            self.pool.release(sequence.pages)
        if not self.unfinished:
            self.release_prefixes(idle_only=False)
            self._samples.clear()
            assert len(self.pool.free) == len(self.pool.references) - 1, "KV pages were lost"
        return done
