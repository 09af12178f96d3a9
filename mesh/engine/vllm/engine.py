"""vLLM's engine core in this process, with the verbs of `mesh.engine`.

Every tp rank of a replica has a scheduler of its own, and all decide alike. vLLM batches, pages and
caches; tokens are drawn and scored by our functions, whether the trainer's model runs (`titan`) or
vLLM's own (`native`). vLLM's logprobs, LLM class, tokenizer and output processing are left out. Its
first model runner serves CPU and CUDA.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from mesh.engine.base import Continuation, EngineSettings, Row, num_pages
from mesh.engine.choice import adopt_weights, live_weights
from mesh.engine.generation import (
    check_continuations,
    check_kept,
    check_requests,
    generate,
    refuse_unfinished,
)
from mesh.engine.vllm.core import start_core, stop_core
from mesh.engine.vllm.draws import draws_of
from mesh.engine.vllm.fused import unfused
from mesh.engine.vllm.options import engine_options, model_entries
from mesh.engine.vllm.requests import Kept, completion_of, core_request, key_of
from mesh.engine.vllm.sampler import CounterSampler
from mesh.engine.vllm.titan import ARCHITECTURE, TitanModel, blueprint
from mesh.model.attention import AttentionContext
from mesh.model.layouts import weight_names
from mesh.model.policy import Policy
from mesh.types import (
    Completion,
    ModelShape,
    Request,
    RolloutKey,
    Sampling,
)

KV_CACHE = "kv_cache"  # vLLM's tag for its memory


class VllmEngine:
    """Owns vLLM's engine core of one generator replica. All its tp ranks make the same calls.

    model: the policy of this rank (vllm.model=titan), or None for vLLM's own (native), of `dtype`
    on `device`; group: the replica's tp ranks, a group also where there is one.
    """

    def __init__(
        self,
        model: Policy | None,
        shape: ModelShape,
        settings: EngineSettings,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        timeout_seconds: int = 1800,
    ) -> None:
        self.shape, self.settings = shape, settings
        self._start = (group, device, dtype, timeout_seconds)
        self.group = group if group.size() > 1 else None
        self.policy = None if model is None else model.eval().requires_grad_(False)
        self.version = -1
        self.released = False
        self.preemptions = 0
        self.serial = 0  # of the next request
        self.kept: dict[RolloutKey, Kept] = {}
        self.observer: Callable[[list[Row]], None] | None = None
        self.addresses: dict[str, int] = {}
        token = None if model is None else blueprint.set((model, shape, self.group))
        options = engine_options(settings, shape, group.size(), device, dtype, model is not None)
        options["distributed_timeout_seconds"] = timeout_seconds
        entries = model_entries(shape, ARCHITECTURE if model is not None else None)
        try:
            self.core = start_core(entries, options, group, device.index or 0)
        finally:
            if token is not None:
                blueprint.reset(token)
        self.worker = self.core.model_executor.driver_worker.worker
        self.runner = self.worker.model_runner
        graphs = settings.cuda_graphs and device.type == "cuda"
        draws = draws_of(self.runner.get_model(), group, graphs, shape.textless)
        self.sampler = CounterSampler(self.runner, draws)
        self.runner.sampler = self.sampler
        self.captured = graphs

    @property
    def model(self) -> Policy:
        """The trainer's policy; asserts that vLLM does not run a model of its own."""
        assert self.policy is not None, "vLLM's own model has none of our modules"
        return self.policy

    def weights(self) -> dict[str, torch.Tensor]:
        """Live local shards by torchtitan's names, tied weights under each; with the buffers of our
        own model. From the first call on their addresses must not change, which `reset` checks.
        """
        if self.policy is None:
            tp = 1 if self.group is None else self.group.size()
            model = self.runner.get_model()
            weights = unfused(model, self.shape, weight_names(self.shape), tp)
        else:
            weights = live_weights(self.policy)
        self.addresses = self.addresses or _addresses(weights)
        return weights

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take these local tensors, of the same shapes and dtypes, in place of the engine's own.

        Asserts that no graphs were captured, which would replay the old ones.
        """
        assert not self.captured, "captured graphs hold the addresses of the weights"
        adopt_weights(self.model, tensors)
        self.addresses = _addresses(live_weights(self.model))

    def reset(self, version: int) -> None:
        """Weights of `version` are in place. The prefix cache is dropped; its keys also carry the
        version.

        Raises RuntimeError while requests are unfinished, and if vLLM has replaced tensors that it
        handed out, which a sync writes and verifies.
        """
        refuse_unfinished(self)
        moved = _addresses(self.weights()).items() - self.addresses.items()
        if moved:
            raise RuntimeError(
                f"vLLM has replaced {', '.join(sorted(name for name, _ in moved))} since it handed "
                "out its weights: a sync does not reach them"
            )
        self.version = version
        self._drop_prefix_cache()
        if not self.released:
            self._zero_cache()

    def release(self) -> None:
        """Free the KV cache's memory until requests are added. Its addresses are kept, and so are
        captured graphs. Does nothing without settings.releases.
        """
        if self.settings.releases and not self.released:
            self._drop_prefix_cache()
            self.worker.discard((KV_CACHE,))
            self.released = True

    def _wake(self) -> None:
        if self.released:
            self.worker.wake_up([KV_CACHE])
            self.released = False
            self._zero_cache()

    def _drop_prefix_cache(self) -> None:
        if not self.core.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: it still runs requests")

    def _zero_cache(self) -> None:
        for cache in self.runner.kv_caches:
            cache.zero_()

    def with_settings(self, settings: EngineSettings) -> VllmEngine:
        """Another engine of the same weights, of the same version, if the model is ours. It does
        not release its cache, which vLLM supports for one engine of a process.
        """
        settings = replace(settings, releases=False)
        other = VllmEngine(self.model, self.shape, settings, *self._start)
        other.reset(self.version)
        return other

    def close(self) -> None:
        """Free everything that vLLM holds; the program's process groups stay.

        A released cache must be allocated again to be freed. Our draws refer to vLLM's model and
        would keep its cache alive.
        """
        self._wake()
        stop_core(self.core)
        self.runner.sampler = None
        del self.core, self.worker, self.runner, self.sampler
        gc.collect()

    @property
    def unfinished(self) -> bool:
        """Also true while a step is in flight or a finished request is not yet cleared."""
        return self.core.scheduler.has_requests() or bool(self.core.batch_queue)

    def generate(self, requests: Collection[Request], sampling: Sampling) -> list[Completion]:
        return generate(self, requests, sampling)

    def add(self, requests: Collection[Request], sampling: Sampling) -> None:
        """Queue every sample of every request; see the contract in `mesh.engine`."""
        running = {key_of(name)[0] for name in self.sampler.drawn} | {key[0] for key in self.kept}
        sampled = self.sampler.sampling
        check_requests(requests, sampling, self.version, self._limit, running, sampled)
        self._wake()
        most = sampling.max_new_tokens
        samples = [
            Kept((r.prompt_id, sample), r.tokens, len(r.tokens), r.keeps)
            for r in requests
            for sample in range(r.num_samples)
        ]
        self._queue([(sample, most) for sample in samples], sampling)

    def extend(self, continuations: Collection[Continuation]) -> None:
        """Queue the next turn of kept samples: a request of vLLM's with all tokens so far, whose
        full pages it finds in its prefix cache while nobody else has needed them.
        """
        lengths = {key: len(kept.tokens) for key, kept in self.kept.items()}
        check_continuations(continuations, lengths, self._limit)
        turns = []
        for one in continuations:
            kept = self.kept.pop(one.key)
            longer = replace(kept, tokens=(*kept.tokens, *one.reply))
            turns.append((longer, one.max_new_tokens))
        if turns:
            assert self.sampler.sampling is not None, "a sample is kept, and none was added"
            self._queue(turns, self.sampler.sampling)

    def drop(self, keys: Collection[RolloutKey]) -> None:
        """End kept samples; vLLM holds nothing of them but cached pages."""
        check_kept(keys, self.kept)
        for key in keys:
            del self.kept[key]

    def _queue(self, samples: Collection[tuple[Kept, int]], sampling: Sampling) -> None:
        """Give vLLM the next turn of these samples, each with its most new tokens."""
        turns = {}
        for sample, most in samples:
            request = core_request(self.core, sample, sampling, most, self.version, self.serial)
            turns[request] = sample
            self.serial += 1
        self.core.scheduler.stops = sampling.stops
        self.sampler.expect({r.request_id: sample for r, sample in turns.items()}, sampling)
        for request in turns:
            self.core.add_request(request)

    @property
    def _limit(self) -> int:
        """The most tokens of one sequence."""
        return min(self.settings.max_length, self._pages() * self.settings.page_size)

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """Step vLLM's core; return the completions that this finished."""
        self._observe()
        self.core.step_fn()
        self.sampler.read(self._in_flight())
        return [self._finished(request) for request in self.core.scheduler.take_finished()]

    def _in_flight(self) -> int:
        """Steps whose tokens vLLM has not read."""
        steps = self.core.batch_queue or ()
        return sum(output.total_num_scheduled_tokens > 0 for _, output, _ in steps)

    def _finished(self, request: Any) -> Completion:
        self.preemptions += request.num_preemptions
        sample, tokens, logprobs = self.sampler.take(request.request_id)
        completion = completion_of(request, tokens, logprobs)
        if sample.keeps:
            self.kept[sample.key] = replace(sample, tokens=(*sample.tokens, *completion.tokens))
        return completion

    def _pages(self) -> int:
        return num_pages(self.settings.kv_tokens, self.settings.page_size)

    def _observe(self) -> None:
        """Report every forward pass of our own model to the observer. While there is one, decode
        steps run without CUDA graphs, whose replays call no Python code and so no hooks.
        """
        dispatcher = self.runner.cudagraph_dispatcher
        dispatcher.keys_initialized = self.captured and self.observer is None
        model = self.runner.get_model()
        if isinstance(model, TitanModel):
            model.observer = self._report_rows if self.observer is not None else None

    def _report_rows(self, context: AttentionContext, positions_T: torch.Tensor) -> None:
        assert self.observer is not None
        sizes = context.cu_seqlens.diff()[: self.runner.input_batch.num_reqs]
        self.observer(self.sampler.rows_of(sizes.tolist(), positions_T.tolist()))


def _addresses(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in weights.items()}
