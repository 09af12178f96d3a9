"""The native engine: the trainer's own model with a paged KV cache and continuous batching.

A step is schedule, run, postprocess. Prefill computes keys and values of all but a sequence's last
token; the decode step of that last token draws the next one. So every token, the first one too, is
drawn in one place, and the samples of a prompt differ only from their first decode step on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

import torch
import torch.distributed as dist

from mesh.engine.base import EngineSettings
from mesh.engine.choice import (
    adopt_weights,
    check_requests,
    choose,
    live_weights,
    tile_logits,
)
from mesh.engine.native.batches import (
    KEY,
    Row,
    decode_inputs,
    decode_rows,
    prefill_inputs,
    slot_copies,
    spans_of,
)
from mesh.engine.native.cache import PagePool, Sequence, allocate, copy_slots, num_pages
from mesh.engine.native.graphs import DecodeGraphs
from mesh.engine.native.scheduler import Admission, Scheduler
from mesh.lifecycle.heartbeat import beat
from mesh.model.logprobs import shard_of
from mesh.model.parallel import local
from mesh.model.policy import Policy
from mesh.types import Completion, ModelShape, Request, Sampling


class NativeEngine:
    """Owns the KV cache of one generator replica. All its tp ranks make the same calls.

    `observer`, where there is one, is told the rows of every forward pass before it; decode steps
    then run without CUDA graphs, in whose replays no Python code, hooks included, is called.
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
        self.preemptions = 0
        self.observer: Callable[[list[Row]], None] | None = None

    def weights(self) -> dict[str, torch.Tensor]:
        """Live local shards by torchtitan's names, tied weights under each; buffers included."""
        return live_weights(self.model)

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take these local tensors, of the same shapes and dtypes, in place of the engine's own."""
        adopt_weights(self.model, tensors)

    def reset(self, version: int) -> None:
        """Weights of `version` are in place. The cache holds nothing between calls of `generate`,
        so there is nothing of another version to serve; it is zeroed all the same, so that keys
        and values of a model that diverged cannot reach a masked product as 0 * inf.
        """
        self.version = version
        for pages in (*self.cache.keys, *self.cache.values):
            pages.zero_()

    def release(self) -> None:
        """Nothing: captured graphs hold the addresses of the cache, so its memory stays."""

    def with_settings(self, settings: EngineSettings) -> NativeEngine:
        """Another engine of the same weights, of the same version."""
        other = NativeEngine(self.model, self.shape, settings, self.group)
        other.reset(self.version)
        return other

    def close(self) -> None:
        """Free the captured graphs: those with collectives in them keep NCCL from shutting down."""
        self.graphs = None

    @torch.no_grad()
    def generate(self, requests: Seq[Request], sampling: Sampling) -> list[Completion]:
        """Complete every sample of every request; see the contract in `mesh.engine`."""
        self._check(requests, sampling)
        settings = self.settings
        pool = PagePool(self.pages)
        scheduler = Scheduler(
            pool, settings.page_size, settings.max_sequences, settings.prefix_cache
        )
        scheduler.add(requests)
        done: list[Sequence] = []
        while scheduler.unfinished:
            beat()
            self._prefill(scheduler.admit())
            scheduler.grow()
            assert scheduler.running, "no sequence can run: the KV cache is too small"
            self._decode(scheduler.running, sampling)
            done += scheduler.retire()
        self.preemptions += scheduler.preemptions
        assert len(pool.free) + sum(map(len, (p.pages for p in scheduler.prefixes.values()))) == (
            self.pages - 1
        ), "KV pages were lost"
        return [_completion(s) for s in sorted(done, key=lambda s: (s.prompt_id, s.sample_id))]

    def _check(self, requests: Seq[Request], sampling: Sampling) -> None:
        limit = min(self.settings.max_length, (self.pages - 2) * self.settings.page_size)
        check_requests(requests, sampling, self.version, limit)

    def _prefill(self, admission: Admission) -> None:
        """Compute the keys and values of newly admitted prompts, and copy shared part pages."""
        for spans in spans_of(admission.fills, self.settings.prefill_tokens):
            if self.observer is not None:
                self.observer([row for span in spans for row in span.rows])
            self.model.hidden(*prefill_inputs(spans, self.cache, self.device))
        if admission.copies:
            slots = slot_copies(admission.copies, self.settings.page_size)
            copy_slots(self.cache, *(torch.from_numpy(s).to(self.device) for s in slots))

    def _decode(self, running: list[Sequence], sampling: Sampling) -> None:
        """Draw the next token of every running sequence."""
        rows_SX = decode_rows(running, sampling, self.settings.page_size).to(self.device)
        if self.observer is not None:
            self.observer([(s.prompt_id, s.sample_id, s.length - 1) for s in running])
        if self.graphs is not None:
            run = self.graphs.run if self.observer is None else self.graphs.run_eagerly
            hidden_SD = run(rows_SX)
        else:
            hidden_SD = self.model.hidden(*decode_inputs(rows_SX, self.cache))
        logits_SV = tile_logits(hidden_SD, local(self.model.lm_head.weight), self.group)
        tokens_S, logprobs_S = choose(logits_SV, rows_SX[:, KEY], sampling, self.group)
        # one transfer for both: float64 holds token ids and fp32 logprobs exactly
        tokens, logprobs = torch.stack([tokens_S.double(), logprobs_S.double()]).tolist()
        for sequence, token, logprob in zip(running, tokens, logprobs, strict=True):
            sequence.tokens.append(int(token))
            sequence.logprobs.append(logprob)
            if int(token) in sampling.stop_tokens:
                sequence.finish_reason = "stop"
            elif len(sequence.tokens) == sampling.max_new_tokens:
                sequence.finish_reason = "length"


def _completion(sequence: Sequence) -> Completion:
    assert sequence.finish_reason is not None
    return Completion(
        sequence.prompt_id,
        sequence.sample_id,
        tuple(sequence.tokens),
        tuple(sequence.logprobs),
        sequence.finish_reason,
    )
