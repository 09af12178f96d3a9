"""The native engine: the trainer's own model with a paged KV cache and continuous batching.

A step is schedule, run, finish. Prefill computes keys and values of all but a sequence's last
token; the decode step of that last token draws the next one. So every token, the first one too, is
drawn in one place, and the samples of a prompt differ only from their first decode step on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
import torch.distributed as dist

from mesh.engine.base import Continuation, EngineSettings, Row, num_pages
from mesh.engine.choice import adopt_weights, choose, live_weights, tile_logits
from mesh.engine.generation import (
    check_continuations,
    check_kept,
    check_requests,
    generate,
    refuse_unfinished,
)
from mesh.engine.native.batches import (
    KEY,
    decode_inputs,
    decode_rows,
    prefill_inputs,
    slot_copies,
    spans_of,
)
from mesh.engine.native.cache import BlockManager, Sequence, allocate, copy_slots
from mesh.engine.native.graphs import DecodeGraphs
from mesh.engine.native.scheduler import Scheduled, Scheduler
from mesh.model.parallel import local
from mesh.model.policy import Policy
from mesh.model.tiles import shard_of
from mesh.types import Completion, ModelShape, Request, RolloutKey, Sampling


class NativeEngine:
    """Owns the KV cache of one generator replica. All its tp ranks make the same calls.

    `observer`, where there is one, is called with the rows of every forward pass before it; decode
    steps then run without CUDA graphs, whose replays call no Python code and so no hooks.
    """

    def __init__(
        self,
        model: Policy,
        shape: ModelShape,
        settings: EngineSettings,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.shape = shape
        self.settings = settings
        self.group = group
        self.version = -1
        weight = local(model.norm.weight)
        self.device = weight.device
        # one page that only pads, and one in which a prompt's shared KV ends
        self.pages = 2 + num_pages(settings.kv_tokens, settings.page_size)
        self.table_width = num_pages(settings.max_length, settings.page_size)
        _, tp = shard_of(group)
        self.cache = allocate(shape, tp, self.pages, settings.page_size, self.device, weight.dtype)
        graphs = settings.cuda_graphs and self.device.type == "cuda"
        self.graphs = DecodeGraphs(self.model, self.cache, self.table_width) if graphs else None
        self.scheduler = self._new_scheduler()
        self.sampling: Sampling | None = None  # of all sequences in flight
        self.observer: Callable[[list[Row]], None] | None = None

    def weights(self) -> dict[str, torch.Tensor]:
        """Live local shards by torchtitan's names, tied weights under each; buffers included."""
        return live_weights(self.model)

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take these local tensors, of the same shapes and dtypes, in place of the engine's own."""
        adopt_weights(self.model, tensors)

    def reset(self, version: int) -> None:
        """Weights of `version` are in place. RuntimeError while requests are unfinished.

        The cache of an idle engine holds nothing that could be served; it is zeroed all the same,
        so that keys and values of a model that diverged cannot reach a masked product as 0 * inf.
        """
        refuse_unfinished(self)
        self.version = version
        for pages in (*self.cache.keys, *self.cache.values):
            pages.zero_()

    def release(self) -> None:
        """Do nothing: captured graphs hold the addresses of the cache, so its memory stays."""

    def with_settings(self, settings: EngineSettings) -> NativeEngine:
        """Another engine of the same weights, of the same version."""
        other = NativeEngine(self.model, self.shape, settings, self.group)
        other.reset(self.version)
        return other

    def close(self) -> None:
        """Free the captured graphs: those with collectives in them keep NCCL from shutting down."""
        self.graphs = None

    @property
    def unfinished(self) -> bool:
        return self.scheduler.unfinished

    @property
    def kept(self) -> Collection[RolloutKey]:
        """The samples that wait for their next turn."""
        return self.scheduler.parked.keys()

    @property
    def preemptions(self) -> int:
        return self.scheduler.preemptions

    def generate(self, requests: Collection[Request], sampling: Sampling) -> list[Completion]:
        return generate(self, requests, sampling)

    def add(self, requests: Collection[Request], sampling: Sampling) -> None:
        """Queue every sample of every request; see the contract in `mesh.engine`."""
        running = self.scheduler.prompt_ids
        check_requests(requests, sampling, self.version, self._limit, running, self.sampling)
        self.sampling = sampling
        self.scheduler.add(requests)

    def extend(self, continuations: Collection[Continuation]) -> None:
        """Queue the next turn of kept samples; see the contract in `mesh.engine`."""
        lengths = {key: s.length for key, s in self.scheduler.parked.items()}
        check_continuations(continuations, lengths, self._limit)
        self.scheduler.extend(continuations)

    def drop(self, keys: Collection[RolloutKey]) -> None:
        """End kept samples, and free their pages."""
        check_kept(keys, self.kept)
        self.scheduler.drop(keys)

    @property
    def _limit(self) -> int:
        """The most tokens of one sequence."""
        return min(self.settings.max_length, (self.pages - 2) * self.settings.page_size)

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """Draw a token for every sequence that fits; return the completions that this finished.

        After an error the engine is empty, and its unfinished requests and kept samples are lost.
        """
        if not self.unfinished:
            return []
        try:
            work = self.scheduler.schedule()
            self._prefill(work)
            self._decode(work.running)
        except BaseException:
            self.scheduler = self._new_scheduler()  # the old one's cache is only partly written
            raise
        return [_completion(sequence) for sequence in self.scheduler.finish()]

    def _new_scheduler(self) -> Scheduler:
        settings, blocks = self.settings, BlockManager(self.pages)
        return Scheduler(blocks, settings.page_size, settings.max_sequences, settings.prefix_cache)

    def _prefill(self, work: Scheduled) -> None:
        """Compute the keys and values of newly admitted prompts, and copy shared part pages."""
        for spans in spans_of(work.fills, self.settings.prefill_tokens):
            if self.observer is not None:
                self.observer([row for span in spans for row in span.rows])
            self.model.hidden(*prefill_inputs(spans, self.cache, self.device))
        if work.copies:
            slots = slot_copies(work.copies, self.settings.page_size)
            copy_slots(self.cache, *(torch.from_numpy(s).to(self.device) for s in slots))

    def _decode(self, running: list[Sequence]) -> None:
        """Draw the next token of every running sequence."""
        assert self.sampling is not None, "sequences run, and none was added"
        rows_SX = decode_rows(running, self.sampling, self.settings.page_size).to(self.device)
        hidden_SD = self._decode_hidden(running, rows_SX)
        logits_SV = tile_logits(hidden_SD, local(self.model.lm_head.weight), self.group)
        tokens_S, logprobs_S = choose(
            logits_SV, rows_SX[:, KEY], self.sampling, self.group, self.shape.textless
        )
        # one transfer for both: float64 holds token ids and fp32 logprobs exactly
        tokens, logprobs = torch.stack([tokens_S.double(), logprobs_S.double()]).tolist()
        for sequence, token, logprob in zip(running, tokens, logprobs, strict=True):
            _append(sequence, int(token), logprob, self.sampling)

    def _decode_hidden(self, running: list[Sequence], rows_SX: torch.Tensor) -> torch.Tensor:
        """Hidden states [S, D] of each sequence's last token."""
        if self.observer is not None:
            self.observer([(s.prompt_id, s.sample_id, s.length - 1) for s in running])
        if self.graphs is None:
            return self.model.hidden(*decode_inputs(rows_SX, self.cache))
        if self.observer is not None:
            return self.graphs.run_eagerly(rows_SX)
        return self.graphs.run(rows_SX)


def _append(sequence: Sequence, token: int, logprob: float, sampling: Sampling) -> None:
    """Append a drawn token, and finish the sequence if it is its last."""
    sequence.tokens.append(token)
    sequence.logprobs.append(logprob)
    stops = sampling.stops
    if token in sampling.stop_tokens or (
        stops is not None and stops(sequence.tokens, sequence.turn)
    ):
        sequence.finish_reason = "stop"
    elif len(sequence.logprobs) == (sequence.max_new_tokens or sampling.max_new_tokens):
        sequence.finish_reason = "length"


def _completion(sequence: Sequence) -> Completion:
    assert sequence.finish_reason is not None
    tokens, logprobs = tuple(sequence.tokens[sequence.turn :]), tuple(sequence.logprobs)
    return Completion(*sequence.key, tokens, logprobs, sequence.finish_reason)
