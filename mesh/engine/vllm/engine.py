"""The door to vLLM: an engine with the native engine's verbs, in this process.

Every tp rank of a replica has a scheduler of its own, and all decide alike. vLLM batches, pages and
caches; tokens are drawn and scored by our functions, whichever model runs (`titan`, the trainer's,
or `native`, vLLM's own). vLLM's logprobs, its LLM class, tokenizer and output processing are left
out. One runner, vLLM's first, serves CPU and CUDA.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from mesh.engine.base import EngineSettings, Row, num_pages
from mesh.engine.choice import adopt_weights, live_weights
from mesh.engine.generation import check_requests, generate, refuse_unfinished
from mesh.engine.vllm.core import start_core, stop_core
from mesh.engine.vllm.draws import Draws
from mesh.engine.vllm.fused import unfused
from mesh.engine.vllm.requests import completion_of, core_requests, key_of
from mesh.engine.vllm.sampler import CounterSampler
from mesh.engine.vllm.titan import ARCHITECTURE, TitanModel, blueprint
from mesh.lifecycle.heartbeat import beat
from mesh.model.attention import AttentionContext
from mesh.model.families import config_entries
from mesh.model.layouts import weight_names
from mesh.model.policy import Policy
from mesh.types import Completion, ModelShape, Request, Sampling

KV_CACHE = "kv_cache"  # vLLM's name for the memory of it


class VllmEngine:
    """Owns vLLM's engine core of one generator replica. All its tp ranks make the same calls.

    model: the policy of this rank (vllm.model=titan), or None for vLLM's own (native), of `dtype`
    on `device`; group: the replica's tp ranks, also where there is one.
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
        self.observer: Callable[[list[Row]], None] | None = None
        self.places: dict[str, int] = {}
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
        theirs = self.runner.get_model()
        if isinstance(theirs, TitanModel):
            draws = Draws(theirs.head, self.group, graphs)
        elif self.group is None:  # as of our model, the product is left to our draws
            draws = Draws(theirs.compute_logits, None, graphs)
            theirs.compute_logits = _as_they_are
        else:  # it gathers logits, which is not captured
            draws = Draws(_as_they_are, None, graphs)
        self.sampler = CounterSampler(self.runner, draws)
        self.runner.sampler = self.sampler
        self.captured = graphs

    @property
    def model(self) -> Policy:
        """The policy, for those who look into it; an assertion where it is vLLM's own."""
        assert self.policy is not None, "vLLM's own Qwen3 has none of our modules"
        return self.policy

    def weights(self) -> dict[str, torch.Tensor]:
        """Live local shards by torchtitan's names, tied weights under each; of our own model with
        the buffers. From the first call on they have to stay where they are (`reset` looks).
        """
        if self.policy is None:
            tp = 1 if self.group is None else self.group.size()
            model = self.runner.get_model()
            weights = unfused(model, self.shape, weight_names(self.shape), tp)
        else:
            weights = live_weights(self.policy)
        self.places = self.places or _places(weights)
        return weights

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take these local tensors, of the same shapes and dtypes, in place of the engine's own;
        graphs that were captured as the engine started would go on with the old ones.
        """
        assert not self.captured, "captured graphs hold the addresses of the weights"
        adopt_weights(self.model, tensors)
        self.places = _places(live_weights(self.model))

    def reset(self, version: int) -> None:
        """Weights of `version` are in place. Nothing that was cached before is served again: the
        prefix cache is dropped, and its keys carry the version besides. RuntimeError while requests
        are unfinished, and where vLLM has other tensors by now than it handed out, which a sync
        writes and proves.
        """
        refuse_unfinished(self)
        moved = _places(self.weights()).items() - self.places.items()
        if moved:
            raise RuntimeError(
                f"vLLM has replaced {', '.join(sorted(name for name, _ in moved))} since it handed "
                "out its weights: a sync does not reach them"
            )
        self.version = version
        self._forget()
        if not self.released:
            self._zero()

    def release(self) -> None:
        """Give the cache's memory back until `generate` is called next; its addresses stay, so that
        captured graphs do too. Only with settings.releases.
        """
        if self.settings.releases and not self.released:
            self._forget()
            self.worker.discard((KV_CACHE,))
            self.released = True

    def _take_back(self) -> None:
        if self.released:
            self.worker.wake_up([KV_CACHE])
            self.released = False
            self._zero()

    def _forget(self) -> None:
        if not self.core.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: it still runs requests")

    def _zero(self) -> None:
        for cache in self.runner.kv_caches:
            cache.zero_()

    def with_settings(self, settings: EngineSettings) -> VllmEngine:
        """Another engine of the same weights, of the same version; of our own model only. vLLM lets
        one engine of a process release its cache.
        """
        settings = replace(settings, releases=False)
        other = VllmEngine(self.model, self.shape, settings, *self._start)
        other.reset(self.version)
        return other

    def close(self) -> None:
        """Give back what vLLM holds; the program's process groups stay. Memory that is released has
        to be there again to be freed. Our draws know vLLM's model, whose cache would else live on.
        """
        self._take_back()
        stop_core(self.core)
        self.runner.sampler = None
        del self.core, self.worker, self.runner, self.sampler
        gc.collect()

    @property
    def unfinished(self) -> bool:
        """Also true while vLLM has a step in flight, or has not forgotten a finished request."""
        return self.core.scheduler.has_requests() or bool(self.core.batch_queue)

    def generate(self, requests: Collection[Request], sampling: Sampling) -> list[Completion]:
        return generate(self, requests, sampling)

    def add(self, requests: Collection[Request], sampling: Sampling) -> None:
        """Queue every sample of every request; see the contract in `mesh.engine`."""
        limit = min(self.settings.max_length, self._pages() * self.settings.page_size)
        running = {key_of(name)[0] for name in self.sampler.drawn}
        check_requests(requests, sampling, self.version, limit, running, self.sampler.sampling)
        self._take_back()
        added = []
        for request in requests:
            added += core_requests(self.core, request, sampling, self.version, self.serial)
            self.serial += 1
        self.sampler.expect([request.request_id for request in added], sampling)
        for one in added:
            self.core.add_request(one)

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """A step of vLLM's core; the completions that it finished."""
        beat()
        self._observe()
        self.core.step_fn()
        self.sampler.read(self._in_flight())
        return [self._finished(request) for request in self.core.scheduler.take_finished()]

    def _in_flight(self) -> int:
        """Steps that have drawn tokens which vLLM has not read."""
        steps = self.core.batch_queue or ()
        return sum(output.total_num_scheduled_tokens > 0 for _, output, _ in steps)

    def _finished(self, request: Any) -> Completion:
        self.preemptions += request.num_preemptions
        return completion_of(request, *self.sampler.take(request.request_id))

    def _pages(self) -> int:
        return num_pages(self.settings.kv_tokens, self.settings.page_size)

    def _observe(self) -> None:
        """Tell the observer the rows of every forward pass of our own model. While there is one no
        captured graph is replayed, in which no Python code, hooks included, is called.
        """
        dispatcher = self.runner.cudagraph_dispatcher
        dispatcher.keys_initialized = self.captured and self.observer is None
        model = self.runner.get_model()
        if isinstance(model, TitanModel):
            model.observer = self._tell if self.observer is not None else None

    def _tell(self, context: AttentionContext, positions_T: torch.Tensor) -> None:
        assert self.observer is not None
        batch, rows = self.runner.input_batch, []
        sizes = context.cu_seqlens.diff()[: batch.num_reqs].tolist()
        places = iter(positions_T.tolist())
        for name, size, prompt in zip(
            batch.req_ids, sizes, batch.num_prompt_tokens.tolist(), strict=False
        ):
            prompt_id, sample_id = key_of(name)
            # pages of a prompt, but for the last token, may serve all its samples
            rows += [
                (prompt_id, sample_id if p >= prompt - 1 else None, p)
                for p in (next(places) for _ in range(size))
            ]
        self.observer(rows)


def _places(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The addresses of tensors."""
    return {name: tensor.data_ptr() for name, tensor in weights.items()}


def _as_they_are(features_SX: torch.Tensor) -> torch.Tensor:
    return features_SX


def model_entries(shape: ModelShape, architecture: str | None) -> dict[str, Any]:
    """The config.json that vLLM reads, of the architecture that it is to build; None: its own."""
    entries: dict[str, Any] = config_entries(shape, ())
    del entries["eos_token_id"]
    return entries if architecture is None else entries | {"architectures": [architecture]}


def engine_options(
    settings: EngineSettings,
    shape: ModelShape,
    tp: int,
    device: torch.device,
    dtype: torch.dtype,
    ours: bool,
) -> dict[str, Any]:
    """vLLM's arguments for these sizes. Block 0 is vLLM's own and holds no sequence."""
    blocks = 1 + num_pages(settings.kv_tokens, settings.page_size)
    token = 2 * shape.num_layers * (shape.num_kv_heads // tp) * shape.head_dim * dtype.itemsize
    graphs = settings.cuda_graphs and device.type == "cuda"
    compiled = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"} if ours and graphs else {}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": settings.max_length,
        # vLLM counts the tokens of decode steps as well
        "max_num_seqs": min(settings.max_sequences, settings.prefill_tokens),
        "max_num_batched_tokens": settings.prefill_tokens,
        "block_size": settings.page_size,
        "num_gpu_blocks_override": blocks,
        "kv_cache_memory_bytes": blocks * settings.page_size * token,
        # vLLM wants this share of the device to be free, and takes no more of it than said above
        "gpu_memory_utilization": 0.01,
        "enable_sleep_mode": settings.releases,
        # of kernels that draw tokens, which is not left to vLLM
        "kernel_config": {"enable_jit_warmup": False},
        "enable_prefix_caching": settings.prefix_cache,
        "enforce_eager": not graphs,
        "compilation_config": compiled,
    }
